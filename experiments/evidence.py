"""Write what `byom recommend` is installed with from the committed records: python -m experiments.evidence."""

from __future__ import annotations

import os
from pathlib import Path

from byom.cli.evidence import gather
from byom.report.evidence import FILE, Evidence
from byom.storage.atomic import write_text

ROOT = Path(__file__).parents[1]


def folders() -> list[Path]:
    """Return the results folders that hold records of runs, as seen from the repository's root, where commands run."""
    found = (path.parent.relative_to(ROOT) for path in (ROOT / "results").rglob("runs"))
    return sorted(path for path in found if "scratch" not in path.parts)


def evidence() -> Evidence:
    """Return what the committed records say; the process must be in the repository's root."""
    return gather(folders())


if __name__ == "__main__":
    os.chdir(ROOT)
    write_text(FILE, evidence().text())

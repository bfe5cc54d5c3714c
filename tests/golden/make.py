"""Write the golden scores of the tiny pipeline, when a change of numbers is meant: python -m tests.golden.make."""

from __future__ import annotations

import tempfile
from pathlib import Path

import byom
from byom.storage.atomic import write_json
from tests.e2e.tiny import overrides

ROWS = {
    "pretrained": ("merge=pretrained", "byom=none"),
    "single_task": ("merge=pretrained", "byom=single_task"),
    "average": ("merge=average", "byom=none"),
    "ties": ("merge=ties", "byom=none"),
    "fft": ("merge=average", "byom=fft", "byom.density=0.1"),
}


def scores(cell):
    """Return the test accuracies of the golden rows; `cell` runs one."""
    records = {name: cell(*options) for name, options in ROWS.items()}
    return {name: {t: r["accuracy"] for t, r in row["scores"]["test"].items()} for name, row in records.items()}


def main() -> None:
    """Run the rows in a temporary folder and write the file."""
    with tempfile.TemporaryDirectory() as folder:
        found = scores(lambda *options: byom.run([*overrides(Path(folder)), *options]))
    write_json(Path(__file__).with_name("tiny_vision.json"), found)


if __name__ == "__main__":
    main()

"""Failed cells: what each of them raised, kept by the jobs of a sweep, and said once for every reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from byom.errors import ByomError
from byom.storage.atomic import write_json

LISTED = 5
"""Cells that are named for each reason of a failure."""
FOLDER = "failed"


def failures(cells: Sequence[Sequence[str]], failed: Sequence[tuple[Sequence[str], Exception]]) -> str:
    """Return which cells failed and why, every reason once.

    Args:
        cells: Overrides of every cell; what all of them share is not repeated.
        failed: Those that failed, and what they raised.

    Returns:
        Lines; the empty text if none failed.
    """
    by_reason = _by_reason(cells, failed)
    return "".join(_failed(reason, names, f"of {len(cells)} cells") for reason, names in by_reason.items())


def _by_reason(
    cells: Sequence[Sequence[str]], failed: Sequence[tuple[Sequence[str], Exception]]
) -> dict[str, list[str]]:
    shared = set(cells[0]).intersection(*cells) if len(cells) > 1 else set()
    by_reason: dict[str, list[str]] = {}
    for cell, error in failed:
        by_reason.setdefault(_reason(error), []).append(" ".join(o for o in cell if o not in shared))
    return by_reason


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, ByomError) else f"{type(error).__name__}: {error}"


def _failed(reason: str, names: Sequence[str], total: str) -> str:
    more = [f"and {len(names) - LISTED} more"] if len(names) > LISTED else []
    lines = [f"byom: {len(names)} {total} failed: {reason}", *names[:LISTED], *more]
    return "\n    ".join(lines) + "\n"


def forget(sweep: Path) -> None:
    """Delete what failed jobs of an earlier sweep left in a folder."""
    shutil.rmtree(sweep / FOLDER, ignore_errors=True)


def keep(sweep: Path, number: int, overrides: Sequence[str], error: Exception) -> None:
    """Keep what a job of a sweep raised, where the command that started it finds it, whatever process it ran in.

    Args:
        sweep: The sweep's folder.
        number: The job's number.
        overrides: The job's own.
        error: What it raised.
    """
    write_json(sweep / FOLDER / f"{number:06d}.json", {"overrides": list(overrides), "reason": _reason(error)})


def kept(sweep: Path) -> list[tuple[list[str], Exception]]:
    """Return what the failed jobs of a sweep raised, in their order."""
    files = sorted((sweep / FOLDER).glob("*.json"))
    values = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return [(value["overrides"], ByomError(value["reason"])) for value in values]


def said(failed: Sequence[tuple[Sequence[str], Exception]]) -> ByomError:
    """Return the error that names every failed job of a sweep, and each reason once."""
    by_reason = _by_reason([cell for cell, _ in failed], failed)
    text = "".join(_failed(reason, names, "jobs" if len(names) > 1 else "job") for reason, names in by_reason.items())
    return ByomError(text.removeprefix("byom: ").rstrip("\n"))

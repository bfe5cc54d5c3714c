"""What a command prints once its cells have records: the tables of every suite among them, published ones beside."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from byom.cli import config
from byom.errors import ByomError, NothingFinished, OptionError, suggest

if TYPE_CHECKING:
    from byom.report.published import Published

LISTED = 5
"""Cells that are named for each reason of a failure."""

MANY = 3
"""From more suites than this on, their common table is printed in place of one each."""


class Place(NamedTuple):
    """A results folder, suite and backbone: what a table is of."""

    results: Path
    suite: str
    backbone: str
    whole: str
    """The suite that this one is a subset of; its own name if of none."""


def places(cells: Sequence[Sequence[str]]) -> list[Place]:
    """Return what tables some cells belong to."""
    seen = dict.fromkeys(tuple(o for o in cell if _tells(o)) for cell in cells)
    return list(dict.fromkeys(place(some) for some in seen))


def place(overrides: Sequence[str]) -> Place:
    """Return what table a run belongs to."""
    built = config.settings(list(overrides))
    option = built.resolved["suite"]["name"]
    return Place(built.place().root, built.suite.name, built.names["backbone"], option)


def write_all(cells: Sequence[Sequence[str]], published: Sequence[str]) -> None:
    """Write and print the tables of some cells.

    Args:
        cells: Overrides of every cell; a suite without a finished one has no table, which is said.
        published: Published tables to stand beside ours.
    """
    found = [each for each in places(cells) if _finished(each)]
    groups: dict[tuple[Path, str, str], list[str]] = {}
    for each in found:
        groups.setdefault((each.results, each.backbone, each.whole), []).append(each.suite)
    for each in found:
        if len(groups[each.results, each.backbone, each.whole]) <= MANY:
            write(each, published)
    for (results, backbone, whole), suites in groups.items():
        if len(suites) > 1:
            from byom.report import scaling

            _print(*scaling.generate(results, backbone, suites, whole))


def _finished(of: Place) -> bool:
    from byom.report.runs import read_runs

    try:
        read_runs(of.results, of.suite, of.backbone)
    except NothingFinished:
        sys.stderr.write(f"byom: no table of {of.suite} with {of.backbone}: none of its cells has finished\n")
        return False
    return True


def failures(cells: Sequence[Sequence[str]], failed: Sequence[tuple[Sequence[str], Exception]]) -> str:
    """Say which cells failed and why, every reason once.

    Args:
        cells: Overrides of every cell; what all of them share is not repeated.
        failed: Those that failed, and what they raised.

    Returns:
        Lines, the empty text if none failed.
    """
    shared = set(cells[0]).intersection(*cells) if len(cells) > 1 else set()
    by_reason: dict[str, list[str]] = {}
    for cell, error in failed:
        reason = str(error) if isinstance(error, ByomError) else f"{type(error).__name__}: {error}"
        by_reason.setdefault(reason, []).append(" ".join(o for o in cell if o not in shared))
    return "".join(_failed(reason, names, len(cells)) for reason, names in by_reason.items())


def _failed(reason: str, names: Sequence[str], total: int) -> str:
    more = [f"and {len(names) - LISTED} more"] if len(names) > LISTED else []
    lines = [f"byom: {len(names)} of {total} cells failed: {reason}", *names[:LISTED], *more]
    return "\n    ".join(lines) + "\n"


def write(of: Place, published: Sequence[str] = ()) -> None:
    """Write and print the tables of one suite and backbone."""
    from byom.report.report import generate

    made = generate(of.results, of.suite, of.backbone)
    _print(made.text, made.files)
    if published:
        from byom.report import published_table

        _print(*published_table.generate(of.results, of.suite, of.backbone, published_tables(published)))


def published_tables(names: Sequence[str]) -> list[Published]:
    """Return published tables by their names, in order.

    Raises:
        OptionError: If there is none of a name, or one contradicts itself.
    """
    from byom.report.published import read

    known = config.options("published")
    if unknown := [name for name in names if name not in known]:
        raise OptionError(f"there is no published table '{unknown[0]}'; {suggest(unknown[0], known)}")
    return [read(config.folder() / "published" / f"{name}.yaml") for name in names]


def _print(text: str, files: Sequence[Path]) -> None:
    sys.stdout.write(f"\n{text}\n\n" + "".join(f"{file}\n" for file in files))


def _tells(override: str) -> bool:
    """Whether an override says which table its cell belongs to."""
    name = override.partition("=")[0]
    return name in ("backbone", "results", "suite", "suite.size", "suite.draw", "suite.only")

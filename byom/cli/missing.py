"""Cells of a sweep that have no record: run here one after another, or handed to one of Hydra's launchers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byom.cli import sweeps
from byom.errors import ByomError
from byom.storage.record import Record

if TYPE_CHECKING:
    from byom.pipeline.forecast import Forecast
    from byom.pipeline.settings import Settings

Failures = list[tuple[list[str], Exception]]
"""The overrides of cells that failed, and what they raised."""

Composed = Callable[..., "Settings"]
"""Gives the settings of a cell's overrides, composed once however often they are asked for."""

UNKNOWN = " " * 13
REFUSED = Path("refused")
"""Has no lock."""


def run_missing(every: Sequence[list[str]], composed: Composed, launcher: Sequence[str] = ()) -> Failures:
    """Run the cells without a record; those that fail do not keep the others from running.

    How many have one is said once. The others run in an order in which what they share is made once.

    Args:
        every: Overrides of every cell.
        composed: Gives their settings.
        launcher: Hydra's own overrides; with any, its launcher runs the cells.

    Returns:
        Those that failed, in the order in which they were given.
    """
    cells = [_settings(cell, composed) for cell in every]
    records = {place: values for place, cell in enumerate(cells) if cell and (values := _record(cell, mirror=True))}
    missing = [place for place in range(len(every)) if place not in records]
    if records or launcher:
        sys.stdout.write(f"{len(records)} of {len(every)} cells finished before, {len(missing)} to run\n")
        sys.stdout.flush()
    if launcher:
        failed = _launched(every, cells, missing, launcher) if missing else {}
    else:
        failed = _in_turn(every, cells, missing, composed, _learnt(cells, records))
    return [(every[place], failed[place]) for place in sorted(failed)]


def _settings(cell: Sequence[str], composed: Composed) -> Settings | None:
    """Return a cell's settings; None where they are refused, which its own job says."""
    try:
        return composed(*cell)
    except ByomError:
        return None


def _record(cell: Settings, *, mirror: bool = False) -> dict[str, Any] | None:
    """Return a cell's record if there is one, and tell its logger if asked to: no job of the cell's own will."""
    try:
        place = cell.place()
        if (values := place.finished()) is not None and mirror:
            cell.logger.mirror(Record.lift(values), place.done)
    except ByomError:  # a damaged one, which the cell's own job says
        return None
    return values


def _learnt(cells: Sequence[Settings | None], records: Mapping[int, dict[str, Any]]) -> Forecast:
    """Return a forecast of the cells without a record, after what records of this machine say."""
    from byom.pipeline.forecast import Forecast
    from byom.pipeline.provenance import same_machine

    forecast = Forecast([cell for place, cell in enumerate(cells) if cell and place not in records])
    for place, values in records.items():
        if (cell := cells[place]) and same_machine(values):
            forecast.earlier(cell, values)
    return forecast


def _in_turn(
    every: Sequence[list[str]],
    cells: Sequence[Settings | None],
    missing: Sequence[int],
    composed: Composed,
    forecast: Forecast,
) -> dict[int, Exception]:
    """Run cells one after another in this process, those last that other processes are running."""
    from byom.pipeline import order, run
    from byom.pipeline.cached import free_first
    from byom.weights import cuts

    failed: dict[int, Exception] = {}
    turns = [missing[place] for place in order.neighbours([cells[place] for place in missing])]
    locks = {place: run.running(cell) if (cell := cells[place]) else REFUSED for place in turns}
    for turn, place in enumerate(free_first(locks), 1):
        sys.stdout.write(f"[{turn:>3}/{len(turns)}] {_left(forecast)} ")
        sys.stdout.flush()
        try:
            with cuts.sweep(_densities(cells)):
                run.job(composed(*every[place]))
        except Exception as error:  # marked in its own record; the other cells still run
            failed[place] = error
        if cell := cells[place]:
            stages = (_record(cell) or {}).get("stages", {})
            forecast.finished(cell, {stage: taken["seconds"] for stage, taken in stages.items()})
    return failed


def _launched(
    every: Sequence[list[str]], cells: Sequence[Settings | None], missing: Sequence[int], launcher: Sequence[str]
) -> dict[int, Exception]:
    """Hand cells to one of Hydra's launchers, and return what those raised that still have no record."""
    from byom.pipeline import order, run

    turns = [missing[place] for place in order.spread([cells[place] for place in missing])]
    try:
        raised = sweeps.launch([every[place] for place in turns], run.job, launcher, _densities(cells))
    except ByomError:
        raise
    except Exception as error:  # a job that vanished takes the launcher along; what has a record is kept
        raised = [error] * len(turns)
    pairs = zip(turns, raised, strict=True)
    return {place: error for place, error in pairs if error and not ((cell := cells[place]) and _record(cell))}


def _densities(cells: Sequence[Settings | None]) -> list[float]:
    """Return the densities of all variants, so that one pass over a difference finds the cuts of all of them."""
    return sorted({float(density) for cell in cells if (density := getattr(cell and cell.byom, "density", None))})


def _left(forecast: Forecast) -> str:
    """Return the time that is left; with a sign where something is left of which nothing is known, or blank."""
    seconds, unmeasured = forecast.left()
    if not seconds:
        return UNKNOWN
    return f"{'>' if unmeasured else ' '}{int(seconds // 60):>3}:{int(seconds % 60):02d} left "

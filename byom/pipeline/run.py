"""One run: its settings, its name, and its record."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from byom.errors import OptionError, fraction
from byom.pipeline import cell
from byom.pipeline.checks import require_possible, require_routable
from byom.pipeline.labs import Labs
from byom.pipeline.provenance import provenance
from byom.pipeline.settings import Evaluation, Settings
from byom.storage.lock import alone
from byom.storage.place import Place, now
from byom.storage.record import FORMAT, Record
from byom.storage.signature import signature
from byom.weights import cuts
from byom.weights.kept import keeping

__all__ = ["Evaluation", "Settings", "job", "keeper", "metric", "run", "running"]

DENSITIES = "BYOM_DENSITIES"
"""Variable through which the jobs of a launcher hear of all densities of their sweep."""


def run(settings: Settings, labs: Labs | None = None) -> dict[str, Any]:
    """Run one cell, or return its record if it has finished before.

    Args:
        settings: The run.
        labs: Keeps the lab for the runs that follow; None lets it end with this one.

    Returns:
        The record.

    Raises:
        Exception: Whatever the run raised, after a ``.failed.json`` has been written next to the place of its record.
    """
    place = settings.place()
    finished = place.finished()
    if finished is not None:
        settings.logger.skipped(Record.lift(finished), place.done)
        return finished
    place.require_writable()
    record, path = _header(settings, place), place.done
    try:
        require_possible(settings)
        require_routable(settings)
        with alone(running(settings)):
            if (finished := place.finished()) is None:  # no other process has run it meanwhile
                record |= _measured(settings, labs) | {"status": "done"}
                path = place.write(record)
    except BaseException as error:
        record |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        path = place.write(record)
        if isinstance(error, Exception):  # whoever stops a run does not want to wait for a logger
            settings.logger.failed(Record.lift(record), path)
        raise
    if finished is not None:
        settings.logger.skipped(Record.lift(finished), place.done)
        return finished
    settings.logger.finished(Record.lift(record), path)
    return record


def _measured(settings: Settings, labs: Labs | None) -> dict[str, Any]:
    """Do a cell's work, sharing cuts with all cells that have the same cache, and return what is measured."""
    with keeping(settings.cache / "cuts"), cuts.sweep(_densities()):
        return cell.execute(cell.Cell(settings, labs and labs.of(settings)))


def running(settings: Settings) -> Path:
    """Return whose lock a process holds while it runs a cell, so that others run different ones."""
    place = settings.place()
    return settings.cache / "running" / signature(str(place.root.resolve()), place.signature)


@cache
def keeper() -> Labs:
    """Return the keeper of this process's lab, which the commands close when they end.

    It is the only object that outlives a call. A launcher hands jobs to a worker process one by one, each pickled on
    its own, so they can share a lab only through something that belongs to a module.
    """
    return Labs()


def job(settings: Settings) -> float:
    """Run one cell and return its metric; launchers import this function in their own processes."""
    return metric(run(settings, keeper()))


def _densities() -> list[float]:
    """Return the densities of the sweep that this process works for, if its command said any.

    Raises:
        OptionError: If the variable holds anything else.
    """
    said = os.environ.get(DENSITIES, "")
    try:
        return [fraction("density", float(density)) for density in said.split()]
    except ValueError as error:  # fraction's is one, too
        raise OptionError(
            f"{DENSITIES}={said!r} is set in the environment, where sweeps leave their densities for launchers, and "
            "holds something else; unset it"
        ) from error


def metric(record: Mapping[str, Any]) -> float:
    """Return what a sweep maximises: mean validation accuracy, or test where validation was not evaluated."""
    summary = record["summary"]
    return summary.get("validation", summary.get("test"))["absolute"]


def _header(settings: Settings, place: Place) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "signature": place.signature,
        "created": now(),
        "overrides": [each for each in settings.overrides if not each.startswith("cache=")],  # a place of this machine
        "tasks": [task.name for task in settings.suite.tasks],
        "choices": settings.choices(),
        "titles": {
            "merge": settings.effective()[0].title,
            "byom": settings.byom.title,
            "router": settings.router.title,
        },
        "needs": settings.needs.to_json(),
        "config": {key: value for key, value in settings.resolved.items() if key not in ("results", "cache")},
        **({"contents": settings.contents} if settings.contents else {}),
        "family": settings.experts.family,
        "skipped_tasks": list(settings.suite.missing),
        **({"note": settings.note} if settings.note else {}),
        "provenance": provenance(),
    }

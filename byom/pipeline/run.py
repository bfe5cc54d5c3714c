"""One run: its settings, its name, and its record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from byom.pipeline.provenance import provenance
from byom.pipeline.settings import Settings
from byom.storage.place import Place, now
from byom.storage.record import FORMAT, Record


def run(settings: Settings) -> dict[str, Any]:
    """Run one cell, or return its record if it has finished before.

    Args:
        settings: What to run.

    Returns:
        The record.

    Raises:
        Exception: Whatever the run raised, after a ``.failed.json`` has been written next to where its record would be.
    """
    place = settings.place()
    finished = place.finished()
    if finished is not None:
        settings.logger.skipped(Record.lift(finished), place.done)
        return finished
    place.require_writable()
    from byom.pipeline.cell import execute

    record = _header(settings, place)
    try:
        record |= execute(settings) | {"status": "done"}
    except BaseException as error:
        place.write(record | {"status": "failed", "error": f"{type(error).__name__}: {error}"})
        raise
    path = place.write(record)
    settings.logger.finished(Record.lift(record), path)
    return record


def metric(record: Mapping[str, Any]) -> float:
    """Return what a sweep maximises: mean validation accuracy, or test where validation was not evaluated."""
    summary = record["summary"]
    return summary.get("validation", summary.get("test"))["absolute"]


def _header(settings: Settings, place: Place) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "signature": place.signature,
        "created": now(),
        "overrides": list(settings.overrides),
        "tasks": [task.name for task in settings.suite.tasks],
        "choices": settings.choices(),
        "titles": {
            "merge": settings.effective()[0].title,
            "byom": settings.byom.title,
            "router": settings.router.title,
        },
        "needs": settings.needs.to_json(),
        "config": {key: value for key, value in settings.resolved.items() if key not in ("results", "cache")},
        "family": settings.experts.family,
        "skipped_tasks": list(settings.suite.missing),
        **({"note": settings.note} if settings.note else {}),
        "provenance": provenance(),
    }

"""Bytes of a row apart by who needs them: one model, what else all tasks share, and each task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from byom.errors import ByomError
from byom.report.rows import Row
from byom.storage.record import Record


@dataclass(frozen=True)
class Stored:
    """What a row stores, as means over its seeds.

    Args:
        model: Bytes of one model.
        shared: Bytes of what all tasks share beside one model, a router among it.
        routing: Bytes of the router.
        each: Bytes of each task.
    """

    model: float
    shared: float
    routing: float
    each: float

    def beside(self, tasks: int) -> float:
        """Return the bytes that a task takes beside one model, with its part of what else is shared.

        Args:
            tasks: Among how many tasks that is divided.
        """
        return self.each + self.shared / tasks


def stored_of(row: Row, rows: Sequence[Row]) -> Stored:
    """Return what a row stores.

    Args:
        row: The row.
        rows: All rows of its table, of which those that store nothing for their tasks give one model's size.

    Raises:
        ByomError: If a record does not say what it stores for each task, and no row gives one model's size.
    """
    alone = [record.storage.bytes for one in rows if one.one_model for record in one.records]
    parts = [record_bytes(record, alone) for record in row.records]
    shared, each = (float(np.mean(part)) for part in zip(*parts, strict=True))
    model = min(alone, default=shared)
    routers = float(np.mean([record.storage.router_bytes for record in row.records]))
    return Stored(model, max(0.0, shared - model) + routers, routers, each)


def record_bytes(record: Record, alone: Sequence[float]) -> tuple[float, float]:
    """Return the bytes that all tasks share and those of each, which the oldest records say in one number.

    Args:
        record: The record.
        alone: Bytes of rows that are one model and nothing else, whose sizes are the same.

    Raises:
        ByomError: If the record does not say it and `alone` is empty.
    """
    storage, tasks = record.storage, len(record.test)
    values = sum(storage.task_parameters.values())
    if storage.task_bytes:
        each = sum(storage.task_bytes.values())
    elif values == storage.parameters:
        each = storage.bytes
    elif values == 0:
        each = 0
    elif alone:
        each = storage.bytes - min(alone)
    else:
        raise ByomError(
            f"record {record.signature} does not say what it stores for each task; run `byom run merge=pretrained "
            f"byom=none suite={record.choices.suite}` beside it, whose record says what one model takes"
        )
    return storage.bytes - each, each / tasks

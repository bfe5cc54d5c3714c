"""Rows of tables as entries of the evidence: bytes apart by who shares them, and intervals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from byom.report.bootstrap import relative_interval
from byom.report.evidence import Course, Entry
from byom.report.report import Runs, Tables
from byom.report.rows import Row, flatten, full
from byom.report.scaling import summarised
from byom.report.stored import stored_of
from byom.storage.record import Record

DIGITS = 6  # of fractions, beyond which machines may differ


@dataclass(frozen=True)
class Command:
    """What the options of a record's run say beyond the record.

    Args:
        options: As `Entry.options`.
        stores: As `Entry.stores`.
        apart: Whether the variant packs each task for itself, given what it packs against.
    """

    options: tuple[str, ...]
    stores: str
    apart: bool


def entry(row: Row, tables: Tables, results: str, command: Command) -> Entry:
    """Return what a row of a table says.

    Args:
        row: The row.
        tables: The tables that it is in, of which others give the tasks' own scores and one model's size.
        results: The folder of the records.
        command: How it is run.
    """
    first, needs = row.records[0], row.needs
    stored = stored_of(row, tables.rows)
    lower, upper = _interval(row, tables.rows)
    merges = first.choices.merge != "pretrained"
    return Entry(
        suite=tables.runs.suite,
        backbone=tables.runs.backbone,
        results=results,
        row=row.named,
        records=tuple(record.signature for record in row.records),
        seeds=tuple(record.choices.seed for record in row.records),
        finetune=first.choices.finetune or "full",
        options=command.options,
        kind=row.kind,
        merges=merges,
        apart=command.apart and not merges,
        inputs=tuple(needs.inputs),
        labels=needs.labels,
        members=needs.members,
        joint=needs.joint,
        searched=max(record.tuning.searched for record in row.records),
        chosen=chosen(row.records),
        router=first.titles.router,
        mix=first.routed.mix if first.routed else "",
        stores=command.stores,
        tasks=len(first.test),
        model=round(stored.model),
        shared=round(stored.shared),
        routing=round(stored.routing),
        each=round(stored.each),
        accuracy=_mean(record.mean for record in row.records),
        relative=_mean(record.summary["test"].normalised for record in row.records),
        lower=lower,
        upper=upper,
    )


def chosen(records: Iterable[Record]) -> tuple[str, ...]:
    """Return what searches chose as overrides, each outcome once, in the order of the records."""
    outcomes = [
        " ".join(f"{full(name)}={value}" for name, value in sorted(flatten(record.tuning.chosen)))
        for record in records
        if record.tuning.chosen
    ]
    return tuple(dict.fromkeys(outcomes))


def _mean(values: Iterable[float]) -> float:
    return round(float(np.mean(list(values))), DIGITS)


def _interval(row: Row, rows: Sequence[Row]) -> tuple[float | None, float | None]:
    """Return the interval of a row's relative accuracy over the seeds of which the tasks' own models are recorded."""
    own = {record.choices.seed: record.test for one in rows if one.kind == "single_task" for record in one.records}
    pairs = [(record.test, own[record.choices.seed]) for record in row.records if record.choices.seed in own]
    if not pairs:
        return None, None
    lower, upper = relative_interval(pairs)
    return (None, None) if np.isnan(lower) else (round(lower, DIGITS), round(upper, DIGITS))


def courses(every: Sequence[Runs], results: str, suite: str) -> list[Course]:
    """Return methods by number of tasks.

    Args:
        every: Finished runs of subsets of one suite, one entry per subset.
        results: The folder of the records.
        suite: The whole suite's name.
    """
    finetune = every[0].done[0].choices.finetune or "full"
    made = []
    for _, part in summarised(every).groupby(["method", "density"], sort=False, dropna=False):
        first, ordered = part.iloc[0], part.sort_values("tasks")
        density = float(first["density"])
        name = str(first["method"]) + ("" if np.isnan(density) else f", {100 * density:.6g} %")
        sizes, subsets = ([int(n) for n in ordered[column]] for column in ("tasks", "subsets"))
        relative = tuple(round(float(value), DIGITS) for value in ordered["normalised"])
        merges = first["merge"] != "pretrained"
        made.append(
            Course(
                suite, finetune, results, name, str(first["kind"]), bool(merges), tuple(sizes), relative, tuple(subsets)
            )
        )
    return made

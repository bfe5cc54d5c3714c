"""Evidence: what records say of every method, in one small file that is installed with byom."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from byom.errors import ByomError
from byom.report.bootstrap import relative_interval
from byom.report.report import Runs, Tables
from byom.report.rows import Row, flatten, full
from byom.report.scaling import summarised
from byom.storage.record import Record

FILE = Path(__file__).with_name("evidence.json")
FORMAT = 1
DIGITS = 6  # of fractions, beyond which machines may differ


@dataclass(frozen=True)
class Entry:
    """One row of a table: what it needs, stores and reaches, and how to run it.

    Args:
        suite: The suite.
        backbone: The encoder.
        results: The folder of the records.
        row: The row as ``byom why`` takes it.
        records: Signatures of its records, by seed.
        seeds: Their seeds.
        finetune: The recipe of fine-tuning.
        options: Overrides that run it, beside suite, seed and folder.
        kind: As `byom.report.rows.Row.kind`.
        merges: Whether models are merged, or each task is packed for itself.
        inputs: Splits whose inputs it looks at.
        labels: Whether their labels are used as well.
        members: Fine-tuned models that it needs of each task.
        joint: Whether it needs a jointly fine-tuned model.
        searched: Settings that were compared on labelled validation examples.
        chosen: What was chosen of them, each outcome over the seeds once.
        router: What tells tasks apart; empty where the task is known, or one model serves all.
        mix: What is routed, ``sample`` or ``batch``; empty where nothing is.
        stores: Contents of what is stored for each task, in words.
        tasks: Number of tasks.
        model: Bytes of one model.
        shared: Bytes of what all tasks share beside one model, a router among it.
        each: Bytes of each task.
        accuracy: Mean accuracy over tasks and seeds.
        relative: The same, divided by the tasks' own models' task by task.
        lower: Lower end of its interval over test examples; None where the own models' scores are not recorded.
        upper: The upper end.
    """

    suite: str
    backbone: str
    results: str
    row: str
    records: tuple[str, ...]
    seeds: tuple[int, ...]
    finetune: str
    options: tuple[str, ...]
    kind: str
    merges: bool
    inputs: tuple[str, ...]
    labels: bool
    members: int
    joint: bool
    searched: int
    chosen: tuple[str, ...]
    router: str
    mix: str
    stores: str
    tasks: int
    model: int
    shared: int
    each: int
    accuracy: float
    relative: float
    lower: float | None
    upper: float | None

    def kilobytes(self, tasks: int) -> float:
        """Return what a task takes beside one model, in units of 1000 bytes, with its part of what else is shared.

        Args:
            tasks: Among how many tasks that is divided.
        """
        return (self.each + self.shared / tasks) / 1000


@dataclass(frozen=True)
class Course:
    """One method at several numbers of tasks: subsets of one suite.

    Args:
        suite: The whole suite.
        results: The folder of the records.
        row: The method.
        kind: As `byom.report.rows.Row.kind`.
        merges: Whether models are merged.
        sizes: Numbers of tasks.
        relative: For each, the mean over subsets of the accuracy relative to the tasks' own models.
        subsets: For each, the number of subsets.
    """

    suite: str
    results: str
    row: str
    kind: str
    merges: bool
    sizes: tuple[int, ...]
    relative: tuple[float, ...]
    subsets: tuple[int, ...]


@dataclass(frozen=True)
class Evidence:
    """What some records say.

    Args:
        entries: Rows of whole suites.
        courses: Methods by number of tasks.
        records: Number of records that were read.
        notes: What every table of them must say.
    """

    entries: tuple[Entry, ...]
    courses: tuple[Course, ...]
    records: int
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """Return the content of a file, one entry on a line."""
        parts = [f'{{\n"format": {FORMAT},\n"records": {self.records},\n"notes": {json.dumps(list(self.notes))}']
        for name, rows in (("entries", self.entries), ("courses", self.courses)):
            lines = ",\n".join(json.dumps(asdict(row), ensure_ascii=False) for row in rows)
            parts.append(f'"{name}": [\n{lines}\n]')
        return ",\n".join(parts) + "\n}\n"

    @classmethod
    def read(cls, file: Path = FILE) -> Evidence:
        """Read a file that `text` made.

        Raises:
            ByomError: If it is missing, damaged or of another byom.
        """
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            if values["format"] != FORMAT:
                raise ByomError(f"{file} has format {values['format']}, this byom reads {FORMAT}; install byom again")
            entries = tuple(Entry(**_tuples(one)) for one in values["entries"])
            courses = tuple(Course(**_tuples(one)) for one in values["courses"])
            return cls(entries, courses, values["records"], tuple(values["notes"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ByomError(f"{file} cannot be read ({error}); install byom again") from error


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


@dataclass(frozen=True)
class Command:
    """What the options of a record's run say beyond the record.

    Args:
        options: As `Entry.options`.
        stores: As `Entry.stores`.
    """

    options: tuple[str, ...]
    stores: str


def entry(row: Row, tables: Tables, results: str, command: Command) -> Entry:
    """Return what a row of a table says.

    Args:
        row: The row.
        tables: The tables that it is in, of which others give the tasks' own scores and one model's size.
        results: The folder of the records.
        command: How it is run.
    """
    first, needs = row.records[0], row.needs
    model, shared, each = _bytes(row, tables.rows)
    lower, upper = _interval(row, tables.rows)
    return Entry(
        tables.runs.suite, tables.runs.backbone, results, row.named,
        tuple(record.signature for record in row.records), tuple(record.choices.seed for record in row.records),
        first.choices.finetune or "full", command.options, row.kind, first.choices.merge != "pretrained",
        tuple(needs.inputs), needs.labels, needs.members, needs.joint,
        max(record.tuning.searched for record in row.records), chosen(row.records),
        first.titles.router, first.routed.mix if first.routed else "", command.stores, len(first.test),
        model, shared, each,
        _mean(record.mean for record in row.records),
        _mean(record.summary["test"].normalised for record in row.records), lower, upper,
    )  # fmt: skip


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


def _bytes(row: Row, rows: Sequence[Row]) -> tuple[int, int, int]:
    """Return the bytes of one model, of what else all tasks share, and of each task; the means over seeds."""
    alone = [record.storage.bytes for one in rows if one.one_model for record in one.records]
    parts = [_stored(record, alone) for record in row.records]
    shared, each = (float(np.mean(part)) for part in zip(*parts, strict=True))
    model = min(alone, default=shared)
    routers = float(np.mean([record.storage.router_bytes for record in row.records]))
    return round(model), round(max(0.0, shared - model) + routers), round(each)


def _stored(record: Record, alone: Sequence[float]) -> tuple[float, float]:
    """Return the bytes that all tasks share and those of each, which the oldest records say in one number.

    Args:
        record: The record.
        alone: Bytes of rows that are one model and nothing else, whose sizes are the same.
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


def courses(every: Sequence[Runs], results: str, suite: str) -> list[Course]:
    """Return methods by number of tasks.

    Args:
        every: Finished runs of subsets of one suite, one entry per subset.
        results: The folder of the records.
        suite: The whole suite's name.
    """
    frame = summarised(every)
    made = []
    for _, part in frame.groupby(["method", "density"], sort=False, dropna=False):
        first, ordered = part.iloc[0], part.sort_values("tasks")
        density = float(first["density"])
        name = first["method"] if np.isnan(density) else f"{first['method']}, {100 * density:.6g} %"
        made.append(
            Course(
                suite, results, str(name), str(first["kind"]), first["merge"] != "pretrained",
                tuple(int(n) for n in ordered["tasks"]), tuple(round(float(v), DIGITS) for v in ordered["normalised"]),
                tuple(int(n) for n in ordered["subsets"]),
            )
        )  # fmt: skip
    return made

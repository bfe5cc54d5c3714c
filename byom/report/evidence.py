"""Evidence: what records say of every method, in one small file that is installed with byom."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from byom.errors import ByomError

FILE = Path(__file__).with_name("evidence.json")
FORMAT = 1


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
        merges: Whether models are merged.
        apart: Whether each task is packed for itself, whatever the others are.
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
        routing: Bytes of the router.
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
    apart: bool
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
    routing: int
    each: int
    accuracy: float
    relative: float
    lower: float | None
    upper: float | None

    @property
    def method(self) -> frozenset[str]:
        """The method and the variant, whatever their hyperparameters."""
        return frozenset(each for each in self.options if each.startswith(("merge=", "byom=")))

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
        finetune: The recipe of fine-tuning.
        results: The folder of the records.
        row: The method.
        kind: As `byom.report.rows.Row.kind`.
        merges: Whether models are merged.
        sizes: Numbers of tasks.
        relative: For each, the mean over subsets of the accuracy relative to the tasks' own models.
        subsets: For each, the number of subsets.
    """

    suite: str
    finetune: str
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
        digest: SHA-256 of their files.
        notes: What every table of them must say.
    """

    entries: tuple[Entry, ...]
    courses: tuple[Course, ...]
    records: int
    digest: str = ""
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """Return the content of a file, one entry on a line."""
        head = {"format": FORMAT, "records": self.records, "digest": self.digest, "notes": list(self.notes)}
        parts = ["{\n" + ",\n".join(f'"{name}": {json.dumps(value)}' for name, value in head.items())]
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
            return cls(entries, courses, values["records"], values["digest"], tuple(values["notes"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ByomError(f"{file} cannot be read ({error}); install byom again") from error


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}

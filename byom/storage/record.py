"""Records: one immutable JSON file for each run, and every shape that one was ever written in, lifted to one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from byom.errors import ByomError
from byom.storage.parts import (
    Choices,
    Cost,
    Density,
    Needs,
    Norms,
    Routed,
    Stage,
    Storage,
    Summary,
    TaskScore,
    Titles,
    Tuning,
)  # fmt: skip

FORMAT = 1
AGAIN = "run that cell again"
NEEDED = ("choices", "hyperparameters", "scores", "summary", "storage", "signature")
MERGES = {
    "pretrained": "Pre-trained", "average": "Averaging", "task_arithmetic": "Task Arithmetic", "ties": "TIES",
}  # fmt: skip
"""Titles of merge methods, for records of the time before they held titles."""
VARIANTS = {
    "single_task": "Single-task", "post_pruning": "Post-Pruning", "fft": "BYOM-FFT", "lora": "BYOM-LoRA",
}  # fmt: skip
"""Titles of variants, for the same records."""
WRAPPERS = ("awd", "dare", "lines", "svc")
WRAPPED = {"TaskArithmetic": "Task Arithmetic", "Ties": "TIES", "TaskSingularVectors": "TSV-M"}
"""Titles of what these wrap, by class, for records of the time before their titles said it."""

RETITLED = {"Model Tinting": "SyMerge"}
"""Titles of variants in records, and those under which the methods were published since."""

Json = Mapping[str, Any]


def values_of(path: Path, again: str) -> dict[str, Any]:
    """Return what a record's file holds.

    Args:
        path: The file.
        again: What makes a damaged one anew.

    Raises:
        ByomError: If it is not JSON, or of a format that this byom does not know.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ByomError(f"{path} is not JSON ({error}); delete it and {again}") from None
    known = values.get("format") if isinstance(values, dict) else None
    if known != FORMAT:
        raise ByomError(f"{path} has format {known!r}, this byom reads {FORMAT}: use the byom that wrote it")
    return values


def require_fields(values: Json, needed: Iterable[str], path: Path, again: str) -> None:
    """Refuse a record without one of its fields.

    Raises:
        ByomError: Naming the file, what it lacks, and the remedy (`again`, as in `values_of`).
    """
    if missing := [name for name in needed if name not in values]:
        raise ByomError(f"{path} lacks {', '.join(missing)}; delete it and {again}")


@dataclass(frozen=True)
class Record:
    """One run, finished or failed; a failed one lacks everything that is measured.

    Args:
        signature: Hash of everything that determines the scores.
        status: ``done`` or ``failed``.
        choices: Names of the options.
        titles: How tables write them.
        hyperparameters: Group (``merge``, ``byom``, ``router``, ``statistics``) to field to value, as used.
        scores: Split to task to score.
        single_task: Split to task to the score of the task's own model.
        summary: Split to means over tasks.
        tuning: The search of hyperparameters.
        storage: What serving stores.
        routed: Evaluation without task identity; None where tasks are known.
        norms: Task to distances; empty where they were not measured.
        cost: Time and memory; None in the oldest records.
        stages: Name to time and memory of this process.
        needs: What the methods were given.
        data: Task to split to the fingerprint of its examples.
        config: The configuration as plain containers.
        overrides: What it was composed of; empty in older records.
        tasks: The suite's tasks in their order; empty in older records.
        family: Whose checkpoints the tasks' own models are.
        validation_examples: Whether these were trained on validation examples: ``seen``, ``unseen``, ``unknown``.
        caution: What tables of these checkpoints must say.
        skipped_tasks: Tasks that could not be had, with the reason.
        note: Shown above every table that the record is in.
        dirty: Whether it comes from code with uncommitted changes.
        created: Time in UTC.
        error: Why it failed.
        contents: Digests and commits of what options name without saying what is in it; empty in older records.
        path: Its file, if it was read from one.
    """

    signature: str
    status: str
    choices: Choices
    titles: Titles
    hyperparameters: Mapping[str, Mapping[str, Any]]
    scores: Mapping[str, Mapping[str, TaskScore]]
    single_task: Mapping[str, Mapping[str, float]]
    summary: Mapping[str, Summary]
    tuning: Tuning
    storage: Storage
    routed: Routed | None
    norms: Mapping[str, Norms]
    cost: Cost | None
    stages: Mapping[str, Stage]
    needs: Needs
    data: Mapping[str, Mapping[str, str]]
    config: Mapping[str, Any]
    overrides: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    family: str = "trained"
    validation_examples: str = "unknown"
    caution: str = ""
    skipped_tasks: tuple[str, ...] = ()
    note: str = ""
    dirty: bool = False
    created: str = ""
    error: str = ""
    contents: Mapping[str, str] = field(default_factory=dict)
    path: Path | None = None

    @property
    def test(self) -> Mapping[str, TaskScore]:
        """Task to score on the test split."""
        return self.scores["test"]

    @property
    def mean(self) -> float:
        """Mean score over tasks on the test split."""
        return self.summary["test"].absolute

    @property
    def variant_settings(self) -> Mapping[str, Any]:
        """The variant's hyperparameters."""
        return self.hyperparameters.get("byom", {})

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a record, whenever it was written.

        Args:
            path: Its file.

        Raises:
            ByomError: If the file is damaged, or of a format that this byom does not know.
        """
        values = values_of(path, AGAIN)
        needed = ("choices", "signature", "status") if values.get("status") == "failed" else ("status", *NEEDED)
        require_fields(values, needed, path, AGAIN)
        return cls.lift(values, path)

    @classmethod
    def lift(cls, values: Json, path: Path | None = None) -> Self:
        """Return the record of a file's values.

        Args:
            values: What the file holds.
            path: The file.
        """
        choices = Choices.lift(values["choices"])
        scores = values.get("scores") or {}
        return cls(
            signature=values["signature"],
            status=values["status"],
            choices=choices,
            titles=_titles(choices, values.get("titles") or {}, values.get("hyperparameters") or {}),
            hyperparameters=values.get("hyperparameters") or {},
            scores={split: {task: TaskScore.lift(row) for task, row in rows.items()} for split, rows in scores.items()},
            single_task=values.get("single_task") or {},
            summary={split: Summary.lift(row) for split, row in (values.get("summary") or {}).items()},
            tuning=Tuning.lift(values.get("tuning") or {}),
            storage=_storage(values.get("storage") or {}),
            routed=Routed.lift(values["routed"]) if values.get("routed") else None,
            norms={task: Norms.lift(row) for task, row in (values.get("norms") or {}).items()},
            cost=_cost(values["cost"]) if values.get("cost") else None,
            stages={name: Stage.lift(row) for name, row in (values.get("stages") or {}).items()},
            needs=_needs(values),
            data=(values.get("fingerprints") or {}).get("data") or {},
            config=values.get("config") or {},
            overrides=tuple(values.get("overrides") or ()),
            tasks=tuple(values.get("tasks") or ()),
            family=values.get("family", "trained"),
            validation_examples=(values.get("experts") or {}).get("validation", "unknown"),
            caution=(values.get("experts") or {}).get("caution", ""),
            skipped_tasks=tuple(_skipped(task) for task in values.get("skipped_tasks") or ()),
            note=values.get("note") or "",
            dirty=bool((values.get("provenance") or {}).get("dirty")),
            created=values.get("created", ""),
            contents=values.get("contents") or {},
            error=_reason(values.get("error")),
            path=path,
        )


def _titles(choices: Choices, titles: Json, hyperparameters: Json) -> Titles:
    merge = titles.get("merge") or MERGES.get(choices.merge, _worded(choices.merge))
    if choices.merge in WRAPPERS and " of " not in merge:
        merge += _wrapped((hyperparameters.get("merge") or {}).get("then"))
    variant = titles.get("byom") or VARIANTS.get(choices.byom, _worded(choices.byom))
    return Titles(merge, RETITLED.get(variant, variant), titles.get("router", ""))


def _wrapped(then: Any) -> str:
    """Return what a title adds of the method that is wrapped, such as `` of TIES``; nothing where that is not known."""
    name = then.get("class", "") if isinstance(then, Mapping) else ""
    return f" of {WRAPPED.get(name, name)}" if name else ""


def _worded(name: str) -> str:
    return name.replace("_", " ").title()


def _storage(values: Json) -> Storage:
    density = Density.lift(values.get("density") or {})
    frozen = (values.get("with_frozen") or {}).get("parameters")
    return Storage.lift({"parameters": 0, "bytes": 0, **values, "density": density, "with_frozen": frozen})


def _cost(values: Json) -> Cost:
    return Cost(*(Stage.lift(values.get(name) or {}) for name in ("merge", "variant", "statistics")))


def _needs(values: Json) -> Needs:
    """Return what the methods were given.

    The oldest records say nothing of it, and all methods merged weights alone then; later ones have it in words,
    among them the statistics that are named by their hyperparameters.
    """
    needs = values.get("needs") or {}
    if "inputs" in needs:
        lists = {name: tuple(needs[name]) for name in ("inputs", "statistics")}
        return Needs.lift({**needs, **lists})
    words = needs.get("words", "weights")
    members = re.match(r"(\d+) models", words)
    return Needs(
        words,
        inputs=tuple(re.findall(r"(\w+) inputs", words)),
        labels=bool(re.search(r"\blabelled", words)),
        statistics=tuple(sorted((values.get("hyperparameters") or {}).get("statistics") or ())),
        members=int(members[1]) if members else 1,
        joint=values["choices"]["merge"] == "mtl",
        sees_test=needs.get("sees_test", False),
    )


def _skipped(task: str | Json) -> str:
    return task if isinstance(task, str) else f"{task.get('task')} ({task.get('reason', 'no reason recorded')})"


def _reason(error: str | Json | None) -> str:
    return str(error.get("message", error)) if isinstance(error, Mapping) else error or ""

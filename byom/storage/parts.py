"""The parts of a record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self


class Lifted:
    """A part of a record, read from the fields that both have."""

    @classmethod
    def lift(cls, values: Mapping[str, Any]) -> Self:
        """Return the part with the fields that the record holds, the others at their defaults."""
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})  # pyright: ignore


RENAMED = {("byom", "tinting"): "symerge"}
"""Group and former name of an option to its name today; files of records are named by the former one, always."""


@dataclass(frozen=True)
class Choices(Lifted):
    """The names of the options, as tables write them.

    Args:
        suite: The suite.
        backbone: The encoder.
        merge: The merge method.
        byom: The variant.
        seed: Draws data and orders training.
        finetune: The recipe of fine-tuning.
        tune: How hyperparameters were chosen.
        router: The router; None where tasks are known.
        experts: Where the tasks' own models come from; None where they were fine-tuned here.
    """

    suite: str
    backbone: str
    merge: str
    byom: str
    seed: int
    finetune: str | None = None
    tune: str | None = None
    router: str | None = None
    experts: str | None = None

    @classmethod
    def lift(cls, values: Mapping[str, Any]) -> Self:
        """Return the names that a record holds as they are today; see `Lifted.lift`."""
        return super().lift({group: RENAMED.get((group, name), name) for group, name in values.items()})

    @property
    def named(self) -> dict[str, Any]:
        """The chosen names by group."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class TaskScore:
    """The score of one model on one split of one task.

    Args:
        metric: Name of the metric.
        value: The score; 1 is perfect.
        examples: Number of examples (N).
        hits: Which examples are right, N bits in hexadecimal, most significant bit first; for metrics that are the
            share of such examples.
        points: What each example scores, N numbers; for metrics that are any other mean over examples.
        predictions: For other metrics, N numbers.
        labels: For other metrics, N numbers.
    """

    metric: str
    value: float
    examples: int = 0
    hits: str = ""
    points: tuple[float, ...] = ()
    predictions: tuple[float, ...] = ()
    labels: tuple[float, ...] = ()

    @classmethod
    def lift(cls, row: Mapping[str, Any]) -> Self:
        """Return the score of a record's row; rows of accuracies once named no metric."""
        lists = {name: tuple(row[name]) for name in ("points", "predictions", "labels") if name in row}
        value = row["value"] if "value" in row else row["accuracy"]
        return cls(row.get("metric", "accuracy"), value, row.get("examples", 0), row.get("hits", ""), **lists)


@dataclass(frozen=True)
class Summary(Lifted):
    """Means over tasks: of the scores, and of the scores divided by those of the tasks' own models."""

    absolute: float
    normalised: float


@dataclass(frozen=True)
class Needs(Lifted):
    """The needs of the methods of a run besides theta_0 (`byom.merge.base.needs.Needs`).

    Args:
        words: The same as the entry of a table's column.
        inputs: Splits whose inputs were looked at.
        labels: Whether their labels were used as well.
        statistics: Names of per-task statistics.
        members: Fine-tuned models of each task.
        joint: Whether a jointly fine-tuned model was needed.
        sees_test: Whether test inputs were looked at.
    """

    words: str = "weights"
    inputs: tuple[str, ...] = ()
    labels: bool = False
    statistics: tuple[str, ...] = ()
    members: int = 1
    joint: bool = False
    sees_test: bool = False


@dataclass(frozen=True)
class Tuning(Lifted):
    """The search of hyperparameters: how many settings were tried, which one was chosen, and what each reached."""

    searched: int = 0
    chosen: Mapping[str, Any] = field(default_factory=dict)
    trail: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Density(Lifted):
    """Values stored for each task as a part of all parameters, and of those that fine-tuning changed."""

    of_all: float = 0.0
    of_differing: float = 0.0


@dataclass(frozen=True)
class Storage(Lifted):
    """The values and bytes that serve all tasks.

    Args:
        parameters: Values alone, shared ones and those of every task.
        bytes: Everything, positions and masks included.
        model_parameters: Values of one model; 0 where a record does not say.
        task_parameters: Task to its values.
        task_bytes: Task to its bytes; empty in the oldest records.
        router_bytes: Of the router.
        density: Values for each task relative to a model's.
        with_frozen: ``parameters`` as papers count whose checkpoints hold frozen parameters too.
    """

    parameters: float
    bytes: float
    model_parameters: float = 0
    task_parameters: Mapping[str, int] = field(default_factory=dict)
    task_bytes: Mapping[str, int] = field(default_factory=dict)
    router_bytes: int = 0
    density: Density = Density()
    with_frozen: float | None = None


@dataclass(frozen=True)
class Norms(Lifted):
    """Euclidean norms of theta_t - theta_0, theta_t - reference, what was kept of that, and what was dropped."""

    to_pretrained: float
    to_merged: float
    kept: float
    dropped: float


@dataclass(frozen=True)
class Stage(Lifted):
    """Seconds and peak resident memory of one stage, and the memory above its start, in MiB."""

    seconds: float = 0.0
    peak_mib: float = 0.0
    extra_mib: float = 0.0


@dataclass(frozen=True)
class Cost:
    """The cost of a method when its result was first computed."""

    merge: Stage
    variant: Stage
    statistics: Stage


@dataclass(frozen=True)
class Routed(Lifted):
    """Evaluation without task identity: split to task to the share of examples sent to their own task's model.

    Args:
        accuracy: That share.
        mix: What is routed: ``sample`` or ``batch``.
        heads: Whose head answers.
    """

    accuracy: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    mix: str = ""
    heads: str = ""


@dataclass(frozen=True)
class Titles(Lifted):
    """The options as tables write them."""

    merge: str
    byom: str
    router: str = ""

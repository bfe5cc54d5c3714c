"""Records of previews: every method's accuracy over a grid of task weights, read from JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from byom.functional.pareto import Agreement
from byom.storage.parts import Lifted
from byom.storage.record import Json, require_fields, values_of

NEEDED = ("choices", "tasks", "titles", "points", "joint", "pretrained", "experts", "summary")
AGAIN = "preview again"


@dataclass(frozen=True)
class Seconds(Lifted):
    """Time to make a model, and to evaluate it on all tasks."""

    make: float
    evaluate: float


@dataclass(frozen=True)
class Weighting:
    """A model and what it scores.

    Args:
        weights: Task weights it was made with; empty for the pre-trained model.
        accuracy: Split to the accuracy of every task.
        seconds: How long that took.
    """

    weights: tuple[float, ...]
    accuracy: Mapping[str, tuple[float, ...]]
    seconds: Seconds

    @classmethod
    def lift(cls, row: Json) -> Self:
        """Return the weighting of a record's row."""
        accuracy = {split: tuple(values) for split, values in row["accuracy"].items()}
        return cls(tuple(row["weights"]), accuracy, Seconds.lift(row["seconds"]))

    def to_json(self) -> dict[str, Any]:
        """Return the row of a record."""
        accuracy = {split: list(values) for split, values in self.accuracy.items()}
        return {"weights": list(self.weights), "accuracy": accuracy, "seconds": asdict(self.seconds)}


def accuracies(rows: Sequence[Weighting], split: str) -> np.ndarray:
    """Return ``[N, T]`` accuracies of scored weightings."""
    return np.array([row.accuracy[split] for row in rows])


@dataclass(frozen=True)
class Summary:
    """What a method's preview says on one split.

    Args:
        best: The place of the weighting with the best mean accuracy.
        pareto: The places of those that no other beats.
        hypervolume: The volume below these; None where it was not measured.
        agreement: With joint fine-tuning; None where nothing was jointly fine-tuned.
    """

    best: int
    pareto: tuple[int, ...]
    hypervolume: float | None
    agreement: Agreement | None

    @classmethod
    def lift(cls, values: Json) -> Self:
        """Return the summary that a record holds."""
        agreement = _agreement(values["agreement"]) if values["agreement"] else None
        return cls(values["best"], tuple(values["pareto"]), values["hypervolume"], agreement)

    def to_json(self) -> dict[str, Any]:
        """Return what a record holds."""
        return asdict(self)


def _agreement(values: Json) -> Agreement:
    lists = {name: tuple(values[name]) for name in ("difference", "bias", "rank")}
    return Agreement(**{**values, **lists})


@dataclass(frozen=True)
class PreviewRecord:
    """One finished preview.

    Args:
        suite: The suite.
        backbone: The encoder.
        finetune: The recipe of fine-tuning.
        seed: Draws data and orders training.
        tasks: The weighted tasks, in the order of weights and accuracies.
        titles: Method to how tables write it.
        points: Method to its scored weightings.
        joint: Jointly fine-tuned models, at weights that were previewed too.
        pretrained: The pre-trained model.
        experts: Every task's own model, on all tasks.
        summary: Split to method to what its preview says.
        path: Its file, if it was read from one.
    """

    suite: str
    backbone: str
    finetune: str
    seed: int
    tasks: tuple[str, ...]
    titles: Mapping[str, str]
    points: Mapping[str, tuple[Weighting, ...]]
    joint: tuple[Weighting, ...]
    pretrained: Weighting
    experts: tuple[Weighting, ...]
    summary: Mapping[str, Mapping[str, Summary]]
    path: Path | None = None

    @property
    def choosing(self) -> str:
        """The split that weights are chosen on: validation, or test where nothing else was scored."""
        return "validation" if "validation" in self.summary else next(iter(self.summary))

    @property
    def shown(self) -> str:
        """The split whose accuracies tables show: test, or validation where nothing else was scored."""
        return "test" if "test" in self.summary else next(iter(self.summary))

    @property
    def chosen(self) -> Mapping[str, Summary]:
        """Method to its summary on the split that weights are chosen on."""
        return self.summary[self.choosing]

    def best(self, method: str, split: str) -> Weighting:
        """Return a method's weighting with the best mean accuracy on a split."""
        return self.points[method][self.summary[split][method].best]

    def single_task(self, split: str) -> np.ndarray:
        """Return the accuracy ``[T]`` of every expert on its own task."""
        return np.diag(accuracies(self.experts, split))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a record.

        Args:
            path: Its file.

        Raises:
            ByomError: If the file is damaged, or of a format that this byom does not know.
        """
        values = values_of(path, AGAIN)
        require_fields(values, NEEDED, path, AGAIN)
        return cls.lift(values, path)

    @classmethod
    def lift(cls, values: Json, path: Path | None = None) -> Self:
        """Return the record of a file's values.

        Files are sorted by name; the methods are in the order in which they were asked for.

        Args:
            values: What the file holds.
            path: The file.
        """
        methods = (values.get("preview") or {}).get("methods") or list(values["points"])
        return cls(
            **{name: values["choices"][name] for name in ("suite", "backbone", "finetune", "seed")},
            tasks=tuple(values["tasks"]),
            titles={name: values["titles"][name] for name in methods},
            points={name: _rows(values["points"][name]) for name in methods},
            joint=_rows(values["joint"]),
            pretrained=Weighting.lift(values["pretrained"]),
            experts=_rows(values["experts"]),
            summary={
                split: {name: Summary.lift(rows[name]) for name in methods} for split, rows in values["summary"].items()
            },
            path=path,
        )


def _rows(rows: Sequence[Json]) -> tuple[Weighting, ...]:
    return tuple(map(Weighting.lift, rows))

"""What a server asks of a bundle's model: prepare an input, switch, answer, and tell tasks apart."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from byom.errors import OptionError
from byom.serving.queue import Key

Kind = Literal["classification", "multi_label", "regression", "generation", "features"]
Answer = dict[str, Any]


@dataclass(frozen=True)
class Served:
    """A task as it is served.

    Args:
        name: Its name.
        kind: What it answers with.
        input: ``text`` or ``image``.
        labels: Names of the classes in the order of the logits; empty where there are none.
        columns: Names of the texts of one item, where there are several; an item is then a mapping from them.
    """

    name: str
    kind: Kind
    input: Literal["text", "image"]
    labels: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return what clients are told of it."""
        told: dict[str, Any] = {"name": self.name, "kind": self.kind, "input": self.input, "labels": list(self.labels)}
        return told | ({"columns": list(self.columns)} if self.columns else {})


class Model(ABC):
    """A bundle's model with the heads of its tasks. One thread switches and asks; any may prepare."""

    tasks: Mapping[str, Served]
    held: Key = None
    """The task whose weights the encoder holds; None for the bundle's reference."""
    routes: bool = False
    """True where it tells tasks apart."""
    routes_on_reference: bool = True
    """True where it tells them apart with the reference in the encoder, False where it needs no switch for it."""

    def prepare(self, item: Any) -> Any:
        """Return what is kept of an input while it waits; called outside of the model's thread.

        Args:
            item: A text, a mapping from columns to texts, or a PIL image.
        """
        return item

    @abstractmethod
    def switch(self, task: Key) -> None:
        """Give the encoder a task's weights, or those of the reference; `held` is the task afterwards.

        Raises:
            CheckpointError: If they cannot be had; the encoder then holds no task's weights.
        """

    @abstractmethod
    def predict(self, items: Sequence[Any]) -> list[Answer]:
        """Return an answer of the held task for each prepared item."""

    def route(self, items: Sequence[Any]) -> list[str]:
        """Return the likeliest task of each prepared item.

        Raises:
            OptionError: If the bundle has no router (`routes` is False).
        """
        raise OptionError("the bundle has no router, so every request names its task")


def classified(labels: Sequence[str], probabilities: Tensor) -> list[Answer]:
    """Return an answer per row of class probabilities ``[B, C]``: the likeliest label, its score, and all of them."""
    best = probabilities.argmax(-1).tolist()
    return [
        {"label": labels[place], "score": row[place], "probabilities": dict(zip(labels, row, strict=True))}
        for place, row in zip(best, _rounded(probabilities), strict=True)
    ]


def labelled(labels: Sequence[str], probabilities: Tensor) -> list[Answer]:
    """Return an answer per row of independent probabilities ``[B, C]``: all labels of 0.5 or more."""
    return [
        {
            "labels": [label for label, value in zip(labels, row, strict=True) if value >= 0.5],
            "probabilities": dict(zip(labels, row, strict=True)),
        }
        for row in _rounded(probabilities)
    ]


def _rounded(values: Tensor) -> list[list[float]]:
    return [[float(f"{value:.6g}") for value in row] for row in values.tolist()]

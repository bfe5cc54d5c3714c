"""Evaluation: the predictions of one model on one split, and their score."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from byom.data.splits import Split
from byom.errors import OptionError
from byom.functional.metrics import METRICS, metric


@dataclass(frozen=True)
class Score:
    """The predictions of a model, or what each example scored where only that is known.

    Args:
        predictions: ``[N, ...]``, class numbers int64 or values float32, in the split's order.
        labels: ``[N]``.
        metric: Name of the metric.
        known: ``[N]``, what each example scored; predictions and labels are empty then.
    """

    predictions: Tensor
    labels: Tensor
    metric: str = "accuracy"
    known: Tensor | None = None

    @property
    def points(self) -> Tensor:
        """The score of each example, ``[N]``: bool where one is right or wrong, else numbers.

        Raises:
            OptionError: If the metric is not a mean over examples.
        """
        if self.known is not None:
            return self.known
        of = metric(self.metric)
        if of.points is None:
            raise OptionError(f"{of.title} is not a mean over examples, so that no example has a score of its own")
        return torch.from_numpy(np.asarray(of.points(self.predictions.numpy(), self.labels.numpy())))

    @property
    def value(self) -> float:
        """The score: 1 is perfect."""
        of = metric(self.metric)
        return float(np.mean(self.points.numpy())) if of.decomposes else of(self.predictions, self.labels)

    def to_json(self) -> dict[str, object]:
        """Return the score and what it is made of.

        Where it is a mean over examples, what each of them scored: as packed bits in hexadecimal (``hits``) if that is
        right or wrong, else as numbers (``points``). For other metrics predictions and labels.
        """
        row: dict[str, object] = {"metric": self.metric, "value": self.value}
        if not metric(self.metric).decomposes:
            pairs = {"predictions": _listed(self.predictions), "labels": _listed(self.labels)}
            return {**row, "examples": len(self.labels), **pairs}
        row |= {"accuracy": self.value} if self.metric == "accuracy" else {}
        row["examples"] = len(self.points)
        if self.points.dtype == torch.bool:
            return {**row, "hits": np.packbits(self.points.numpy()).tobytes().hex()}
        return {**row, "points": self.points.tolist()}

    @classmethod
    def from_json(cls, row: Mapping[str, Any], metric: str = "accuracy") -> Score:
        """Return the score that `to_json` wrote.

        Args:
            row: What it wrote.
            metric: The metric of rows of the time before they named theirs.
        """
        name = row.get("metric", metric)
        if "points" in row:
            return cls.of(torch.tensor(row["points"], dtype=torch.float64), name)
        if "hits" in row:
            packed = np.frombuffer(bytes.fromhex(row["hits"]), np.uint8)
            return cls.of(torch.from_numpy(np.unpackbits(packed, count=row["examples"]).astype(bool)), name)
        return cls(torch.tensor(row["predictions"]), torch.tensor(row["labels"]), name)

    @classmethod
    def of(cls, points: Tensor, metric: str = "accuracy") -> Score:
        """Return the score of which only that of each example is known, ``[N]``."""
        return cls(torch.empty(0), torch.empty(0), metric, points)


def _listed(values: Tensor) -> list[float]:
    return [float(f"{v:.6g}") for v in values.tolist()] if values.is_floating_point() else values.tolist()


@torch.inference_mode()
def score(
    predict: Callable[[dict[str, Tensor]], Tensor], batches: Iterable[tuple], examples: int, metric: str = "accuracy"
) -> Score:
    """Collect predictions.

    Args:
        predict: Maps a batch of inputs to predictions ``[B, ...]``.
        batches: Yields ``(inputs, labels [B], index [B])``, where index is each example's place in the split.
        examples: Number of examples (N) that the batches cover.
        metric: Name of the metric.

    Returns:
        The score, in the split's order.
    """
    columns: dict[str, Tensor] = {}
    for inputs, labels, index in batches:
        for name, values in (("predictions", predict(inputs).cpu()), ("labels", labels)):
            columns.setdefault(name, torch.zeros(examples, *values.shape[1:], dtype=values.dtype))[index] = values
    return Score(columns["predictions"], columns["labels"], metric)


def evaluate(
    encoder: nn.Module,
    head: Callable[[Tensor], Tensor],
    split: Split,
    batch_size: int = 50,
    metric: str = "accuracy",
) -> Score:
    """Score an encoder with a task's head.

    Args:
        encoder: The encoder, put in evaluation mode.
        head: The task's head: features ``[B, D]`` to logits ``[B, C]``; its ``predict`` takes logits to
            predictions where it has one, unless the metric says how.
        split: Labelled examples.
        batch_size: Examples a forward pass.
        metric: Name of the metric.

    Returns:
        The score.
    """
    encoder.eval()
    device = next(encoder.parameters()).device
    predict = METRICS[metric].predict or getattr(head, "predict", best)
    return score(
        lambda inputs: predict(head(encoder(**{k: v.to(device) for k, v in inputs.items()}))),
        split.batches(batch_size),
        len(split),
        metric,
    )


def best(logits: Tensor) -> Tensor:
    """Return the class with the largest logit, int64 ``[B]`` of ``[B, C]``."""
    return logits.argmax(-1)

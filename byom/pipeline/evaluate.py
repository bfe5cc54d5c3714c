"""Evaluation: the predictions of one model on one split, and their score."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from byom.data.splits import Split
from byom.functional.metrics import metric


@dataclass(frozen=True)
class Score:
    """What a model predicted.

    Args:
        predictions: ``[N]``, class numbers int64 or values float32, in the split's order.
        labels: ``[N]``.
        metric: Name of the metric.
    """

    predictions: Tensor
    labels: Tensor
    metric: str = "accuracy"

    @property
    def hits(self) -> Tensor:
        """Which examples are right, bool ``[N]``."""
        return self.predictions == self.labels

    @property
    def value(self) -> float:
        """The score: 1 is perfect."""
        return metric(self.metric)(self.predictions, self.labels)

    def to_json(self) -> dict[str, object]:
        """Return the score and what it is made of.

        Hits as packed bits in hexadecimal where the score is their mean, else predictions and labels.
        """
        if metric(self.metric).decomposes:
            packed = np.packbits(self.hits.numpy()).tobytes().hex()
            return {"accuracy": self.value, "examples": len(self.hits), "hits": packed}
        pairs = {"predictions": _listed(self.predictions), "labels": _listed(self.labels)}
        return {"metric": self.metric, "value": self.value, "examples": len(self.labels), **pairs}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Score:
        """Return the score that `to_json` wrote; of hits, those that are right are 1 and expected to be."""
        if "hits" not in row:
            return cls(torch.tensor(row["predictions"]), torch.tensor(row["labels"]), row["metric"])
        packed = np.frombuffer(bytes.fromhex(row["hits"]), np.uint8)
        return cls.of(torch.from_numpy(np.unpackbits(packed, count=row["examples"]).astype(bool)))

    @classmethod
    def of(cls, hits: Tensor) -> Score:
        """Return the score of which only the hits are known, bool ``[N]``."""
        return cls(hits.long(), torch.ones(len(hits), dtype=torch.int64))


def _listed(values: Tensor) -> list[float]:
    return [float(f"{v:.6g}") for v in values.tolist()] if values.is_floating_point() else values.tolist()


@torch.inference_mode()
def score(
    predict: Callable[[dict[str, Tensor]], Tensor], batches: Iterable[tuple], examples: int, metric: str = "accuracy"
) -> Score:
    """Collect predictions.

    Args:
        predict: Maps a batch of inputs to predictions ``[B]``.
        batches: Yields ``(inputs, labels [B], index [B])``, where index is the example's place in the split.
        examples: Number of examples (N) that the batches cover.
        metric: Name of the metric.

    Returns:
        The score, in the split's order.
    """
    found: dict[str, Tensor] = {}
    for inputs, labels, index in batches:
        for name, values in (("predictions", predict(inputs).cpu()), ("labels", labels)):
            found.setdefault(name, torch.zeros(examples, dtype=values.dtype))[index] = values
    return Score(found["predictions"], found["labels"], metric)


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
            predictions, where it has one.
        split: Labelled examples.
        batch_size: Examples a forward pass.
        metric: Name of the metric.

    Returns:
        The score.
    """
    encoder.eval()
    device = next(encoder.parameters()).device
    predict = getattr(head, "predict", best)
    return score(
        lambda inputs: predict(head(encoder(**{k: v.to(device) for k, v in inputs.items()}))),
        split.batches(batch_size),
        len(split),
        metric,
    )


def best(logits: Tensor) -> Tensor:
    """Return the class with the largest logit, int64 ``[B]`` of ``[B, C]``."""
    return logits.argmax(-1)

"""Evaluation: the predictions of one model on one split, and their score."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from byom.data.feed import feed
from byom.data.splits import Split
from byom.errors import OptionError
from byom.functional.metrics import METRICS, metric
from byom.functional.precision import DEFAULT, exact, lowered, products
from byom.functional.tensors import wide
from byom.pipeline.batch_size import BatchSize


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
    rows = Rows()
    for inputs, labels, index in batches:
        rows.add(index, predict(inputs), labels)
    predictions, truth = rows.ordered(examples)
    return Score(predictions, truth, metric)


def evaluate(
    encoder: nn.Module,
    head: Callable[[Tensor], Tensor],
    split: Split,
    batch_size: int | BatchSize = 50,
    metric: str = "accuracy",
    precision: str = DEFAULT,
) -> Score:
    """Score an encoder with a task's head.

    Args:
        encoder: The encoder, put in evaluation mode.
        head: The task's head: features ``[B, D]`` to logits ``[B, C]``; its ``predict`` takes logits to
            predictions where it has one, unless the metric says how.
        split: Labelled examples.
        batch_size: Examples a forward pass.
        metric: Name of the metric.
        precision: That of the encoder; logits are computed in fp32 always.

    Returns:
        The score.
    """
    predict = METRICS[metric].predict or getattr(head, "predict", best)
    rows = Rows()

    def see(values: Tensor, labels: Tensor, index: Tensor) -> None:
        rows.add(index, predict(head(values)), labels)

    with torch.inference_mode():
        encode(encoder, split, batch_size, precision, see)
    predictions, truth = rows.ordered(len(split))
    return Score(predictions, truth, metric)


@torch.no_grad()  # not inference mode, in which models that answer in words would generate
def features(encoder: nn.Module, split: Split, batch_size: int | BatchSize, precision: str = DEFAULT) -> Tensor:
    """Return the features of a split in its order, fp32 ``[N, D]`` on the CPU; for the arguments see `evaluate`."""
    rows = Rows()
    encode(encoder, split, batch_size, precision, lambda values, _, index: rows.add(index, values.float()))
    return rows.ordered(len(split))[0]


def encode(
    encoder: nn.Module,
    split: Split,
    batch_size: int | BatchSize,
    precision: str,
    see: Callable[[Tensor, Tensor, Tensor], None],
) -> None:
    """Pass every example of a split through an encoder.

    Args:
        encoder: The encoder, put in evaluation mode.
        split: The examples.
        batch_size: Examples a forward pass.
        precision: That of the encoder.
        see: Called with features ``[B, D]`` in fp32, labels ``[B]`` and places int64 ``[B]``, the first two on the
            encoder's device.
    """
    encoder.eval()
    device = next(encoder.parameters()).device
    size = batch_size if isinstance(batch_size, BatchSize) else BatchSize(batch_size, device)
    with (
        products(precision, device),
        lowered(precision, device),  # around all batches: weights are cast once
        closing(feed(size.batches(split), device)) as batches,
    ):
        for inputs, labels, index in batches:
            start = None if size.settled else _clock(device)
            for rows, values in size.run(lambda part: encoder(**part), inputs, len(index)):
                with exact(precision, device):
                    see(wide(values), labels[rows], index[rows])
            if start is not None:
                size.observe(len(index), sum(v.numel() for v in inputs.values()), _clock(device) - start)


def _clock(device: torch.device) -> float:
    """Return the time at which a device has done what it was asked for."""
    if device.type == "cuda" and torch.cuda.is_available():
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Rows:
    """Columns of a table that come batch by batch; they stay where they were computed until the last has come."""

    def __init__(self) -> None:
        self._places: list[Tensor] = []
        self._parts: list[tuple[Tensor, ...]] = []

    def add(self, index: Tensor, *columns: Tensor) -> None:
        """Take in rows ``[B, ...]`` of every column at places ``[B]``."""
        self._places.append(index)
        self._parts.append(columns)

    def ordered(self, examples: int) -> list[Tensor]:
        """Return the columns on the CPU, ``[N, ...]``, in the order of their places."""
        places = torch.cat(self._places)
        columns = [torch.cat(parts).cpu() for parts in zip(*self._parts, strict=True)]
        return [torch.zeros(examples, *v.shape[1:], dtype=v.dtype).index_copy_(0, places, v) for v in columns]


def best(logits: Tensor) -> Tensor:
    """Return the class with the largest logit, int64 ``[B]`` of ``[B, C]``."""
    return logits.argmax(-1)

"""Evaluation: per-example hits of one model on one split."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from byom.data import Split


@dataclass(frozen=True)
class Score:
    """Which examples a model got right.

    Args:
        hits: bool ``[N]``, in the split's order.
    """

    hits: Tensor

    @property
    def accuracy(self) -> float:
        """Fraction of examples that are right."""
        return float(self.hits.double().mean())

    def to_json(self) -> dict[str, object]:
        """Return accuracy, number of examples, and the hits as packed bits in hexadecimal."""
        packed = np.packbits(self.hits.numpy()).tobytes().hex()
        return {"accuracy": self.accuracy, "examples": len(self.hits), "hits": packed}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Score:
        """Return the score that `to_json` wrote."""
        packed = np.frombuffer(bytes.fromhex(row["hits"]), np.uint8)
        return cls(torch.from_numpy(np.unpackbits(packed, count=row["examples"]).astype(bool)))


@torch.inference_mode()
def score(logits: Callable[[dict[str, Tensor]], Tensor], batches: Iterable[tuple], examples: int) -> Score:
    """Compare arg-max predictions with labels.

    Args:
        logits: Maps a batch of inputs to logits ``[B, C]``.
        batches: Yields ``(inputs, labels [B], index [B])``, where index is the example's place in the split.
        examples: Number of examples (N) that the batches cover.

    Returns:
        The score, in the split's order.
    """
    hits = torch.zeros(examples, dtype=torch.bool)
    for inputs, labels, index in batches:
        hits[index] = logits(inputs).argmax(-1).cpu() == labels
    return Score(hits)


def evaluate(encoder: nn.Module, head: Callable[[Tensor], Tensor], split: Split, batch_size: int = 50) -> Score:
    """Score an encoder with a task's head.

    Args:
        encoder: The encoder, put in evaluation mode.
        head: The task's head: features ``[B, D]`` to logits ``[B, C]``.
        split: Labelled examples.
        batch_size: Examples a forward pass.

    Returns:
        The score.
    """
    encoder.eval()
    device = next(encoder.parameters()).device
    return score(
        lambda inputs: head(encoder(**{k: v.to(device) for k, v in inputs.items()})),
        split.batches(batch_size),
        len(split),
    )

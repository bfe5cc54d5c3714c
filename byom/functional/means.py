"""Weighted means over tasks: pure functions on stacked tensors ``[T, *shape]``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from byom.functional.deltas import total


def weighted_mean(deltas: Tensor, weights: Sequence[float]) -> Tensor:
    """Average ``[T, *shape]`` with one weight per task, whose sum need not be 1."""
    whole = sum(weights)
    return total(torch.stack([weight / whole * row for weight, row in zip(weights, deltas, strict=True)]))


def precision_mean(deltas: Tensor, precisions: Tensor, weights: Sequence[float], prior: float = 0.0) -> Tensor:
    """Average with a weight per element: ``sum_t c_t H_t tau_t / (prior + sum_t c_t H_t)``; 0 where that is 0 / 0.

    Args:
        deltas: ``[T, *shape]`` (tau_t).
        precisions: ``[T, *shape]``, at least 0 (H_t).
        weights: One per task (c_t).
        prior: Precision of tau = 0.

    Returns:
        ``[*shape]``.
    """
    scaled = torch.stack([weight * row for weight, row in zip(weights, precisions.to(deltas), strict=True)])
    whole = total(scaled) + prior
    shares = scaled.div_(whole.masked_fill_(whole == 0, 1))
    return total(shares * deltas)

"""Arithmetic on weights: each tensor is computed when the result's is read, in fp32 or wider."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from byom.functional.tensors import wide
from byom.weights.spec import Reader, Spec, Tensors


def lifted(weights: Tensors, compute: Reader) -> Reader:
    """Return what reads a computation on wide tensors; whatever is not floating point passes through.

    Args:
        weights: The left operand.
        compute: Gives a tensor by canonical name.
    """
    return lambda name: compute(name) if weights.dtype(name).is_floating_point else weights.raw(name)


def scaled(weights: Tensors, op: Callable[[Tensor, float], Tensor], factor: float) -> Reader:
    """Return what reads every tensor combined with a number."""
    return lifted(weights, lambda name: op(wide(weights.raw(name)), factor))


def combined(left: Tensors, right: Tensors, op: Callable[[Tensor, Tensor], Tensor]) -> Reader:
    """Return what reads every tensor of two sets of weights combined."""
    return lifted(left, lambda name: op(wide(left.raw(name)), wide(right.raw(name))))


def widened(weights: Tensors) -> dict[str, Spec]:
    """Return shapes, and the dtypes of differences: fp32, or fp64 where the weights are."""
    return {name: Spec(weights.shape(name), _wide(weights.dtype(name))) for name in weights}


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.is_floating_point and dtype != torch.float64 else dtype

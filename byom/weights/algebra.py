"""Arithmetic on weights: each tensor is computed when the result's is read, in fp32 or wider."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from byom.functional.tensors import wide, widened
from byom.weights.match import fits, may_be_mask, require_alike
from byom.weights.spec import Reader, Spec, Tensors

Op = Callable[..., Tensor]


def scaled(weights: Tensors, op: Op, factor: float) -> Reader:
    """Return what reads every tensor combined with a number; what is not merged passes through."""

    def read(name: str) -> Tensor:
        value = weights.raw(name)
        return op(wide(value), factor) if weights.merges(name) else value

    return read


def combined(left: Tensors, right: Tensors, op: Op, *, difference: bool) -> Reader:
    """Return what reads every tensor of two sets of weights combined; what is not merged passes through.

    Args:
        left: The left operand, whose buffers the result has where the right one has none.
        right: The right operand.
        op: Of two wide tensors.
        difference: Whether it subtracts: of infinities that are equal, the difference is 0.
    """

    def read(name: str) -> Tensor:
        value = left.raw(name)
        if not fits(name, left, right):
            return value
        if not left.merges(name):
            return require_alike(name, (left.origin, value), (right.origin, partial(right.raw, name)))
        ours, theirs = wide(value), wide(right.raw(name))
        result = op(ours, theirs)
        masked = difference and may_be_mask(name, left.shape(name))
        return result.masked_fill(ours == theirs, 0) if masked else result

    return read


def results(weights: Tensors, *, difference: bool = False) -> dict[str, Spec]:
    """Return shapes and types of a result: the operand's, but wide for differences and where 8 bits would overflow."""
    return {name: _result(weights.shape(name), weights.dtype(name), difference) for name in weights}


def _result(shape: tuple[int, ...], dtype: torch.dtype, difference: bool) -> Spec:
    wide = dtype.is_floating_point and (dtype.itemsize == 1 or difference)
    return Spec(shape, widened(dtype) if wide else dtype)

"""Differences kept as the product of a few singular vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from byom.errors import CheckpointError
from byom.functional.linalg import truncated_svd
from byom.variants.base.delta import Parts


def factor(delta: Tensor, rank: int) -> Parts:
    """Keep the largest singular values of a matrix and their vectors: ``k (m + n + 1)`` values.

    Args:
        delta: ``[m, n]`` in fp32 or fp64, or ``[E, m, n]``, a matrix for each expert of a mixture.
        rank: How many are kept of each matrix (k).

    Returns:
        ``left [m, k]``, ``singular [k]`` and ``right [k, n]`` in the dtype of `delta`, for a stack with E in front;
        nothing if k is 0 or `delta` is zero.
    """
    if not rank or not delta.any():
        return {}
    if delta.ndim == 3:
        every = [_factor(each, rank) for each in delta]
        return {part: torch.stack([parts[part] for parts in every]) for part in every[0]}
    return _factor(delta, rank)


def _factor(delta: Tensor, rank: int) -> Parts:
    left, singular, right = (each.to(delta.dtype).contiguous() for each in truncated_svd(delta, rank))
    return {"left": left, "singular": singular, "right": right}


def add(parts: Parts, reference: Tensor) -> Tensor:
    """Add the kept product to the reference: ``W + U diag(s) Vt``.

    Args:
        parts: What `factor` returned.
        reference: ``[m, n]`` or ``[E, m, n]``; not modified.

    Returns:
        A tensor of that shape in the reference's dtype.

    Raises:
        CheckpointError: If the factors do not fit the reference.
    """
    left, singular, right = parts["left"], parts["singular"], parts["right"]
    *stack, rows, columns = reference.shape if reference.ndim > 1 else (-1, -1)
    rank = singular.shape[-1:]
    if (left.shape, singular.shape, right.shape) != ((*stack, rows, *rank), (*stack, *rank), (*stack, *rank, columns)):
        raise CheckpointError(
            f"factors {tuple(left.shape)} and {tuple(right.shape)} do not fit a tensor of shape "
            f"{tuple(reference.shape)}; pack or fetch it again"
        )
    add_product = torch.baddbmm if stack else torch.addmm
    moved = add_product(reference.to(left.dtype), left * singular.unsqueeze(-2), right)
    return moved.to(reference.dtype)

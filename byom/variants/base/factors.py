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
        delta: ``[m, n]`` in fp32 or fp64.
        rank: How many are kept (k).

    Returns:
        ``left [m, k]``, ``singular [k]`` and ``right [k, n]`` in the dtype of `delta`; nothing if k is 0 or `delta`
        is zero.
    """
    if not rank or not delta.any():
        return {}
    left, singular, right = (each.to(delta.dtype).contiguous() for each in truncated_svd(delta, rank))
    return {"left": left, "singular": singular, "right": right}


def add(parts: Parts, reference: Tensor) -> Tensor:
    """Add the kept product to the reference: ``W + U diag(s) Vt``.

    Args:
        parts: What `factor` returned.
        reference: ``[m, n]``; not modified.

    Returns:
        ``[m, n]`` in the reference's dtype.

    Raises:
        CheckpointError: If the factors do not fit the reference.
    """
    left, singular, right = parts["left"], parts["singular"], parts["right"]
    if (len(left), len(singular), *right.shape) != (len(reference), left.shape[1], len(singular), *reference.shape[1:]):
        raise CheckpointError(
            f"factors {tuple(left.shape)} and {tuple(right.shape)} do not fit a tensor of shape "
            f"{tuple(reference.shape)}; pack or fetch it again"
        )
    moved = torch.addmm(reference.to(left.dtype), left * singular, right)
    return moved.to(reference.dtype)

"""The elementwise mathematics of task vectors: pure functions on stacked differences ``[T, *shape]``."""

from __future__ import annotations

from collections.abc import Sequence
from threading import local

import torch
from torch import Tensor

PIECE = 1 << 20  # elements of all tasks widened to fp64 at a time: 8 MB, which stay in the caches


def total(stacked: Tensor) -> Tensor:
    """Sum over tasks, one after the other.

    ``Tensor.sum`` adds in an order that depends on the width of what it is given, so that from five tasks on a
    piece of a tensor would not get the bits of the whole.

    Args:
        stacked: ``[T, *shape]``.

    Returns:
        ``[*shape]``.
    """
    result = stacked[0].clone()
    for row in stacked[1:]:
        result += row
    return result


def weighted(deltas: Tensor, weights: Sequence[float]) -> Tensor:
    """Multiply the values of each task by its weight, in place.

    Args:
        deltas: ``[T, *shape]`` task vectors.
        weights: One per task, of either sign; empty changes nothing.

    Returns:
        The same tensor.
    """
    for row, weight in zip(deltas, weights, strict=True) if weights else ():
        row.mul_(weight)
    return deltas


def elect_sign(deltas: Tensor, majority: float = 0.0) -> Tensor:
    """Elect one sign per coordinate by total mass: ``sgn(sum_t tau_t)``.

    Args:
        deltas: ``[T, *shape]`` trimmed task vectors.
        majority: Sign (-1, 0 or 1) given to coordinates whose sum is exactly 0; TIES uses the sign that most
            coordinates of the whole model elected.

    Returns:
        ``[*shape]`` with values -1, 0, 1.

    References:
        TIES-Merging, section 3, step 2. https://arxiv.org/abs/2306.01708
    """
    sign = total(deltas).sign()
    return sign if majority == 0 else torch.where(sign == 0, torch.full_like(sign, majority), sign)


def agreeing(deltas: Tensor, sign: Tensor) -> Tensor:
    """Zero what disagrees with the elected sign.

    Args:
        deltas: ``[T, *shape]`` task vectors.
        sign: ``[*shape]`` elected signs.

    Returns:
        ``[T, *shape]`` with only the entries whose sign is the elected one.
    """
    return deltas * (deltas * sign > 0)


def disjoint_mean(deltas: Tensor, weights: Sequence[float] = ()) -> Tensor:
    """Average the non-zero entries of each coordinate; 0 where all are zero.

    Args:
        deltas: ``[T, *shape]`` agreeing task vectors, multiplied by their weights.
        weights: One per task; the sum is divided by the magnitudes of those that still have a value. Empty divides by
            their number.

    Returns:
        ``[*shape]``, the mean over the tasks that still have a value.
    """
    left = deltas != 0
    if not weights:
        return total(deltas) / left.sum(0).clamp_(min=1)
    whole = total(weighted(left.to(deltas.dtype), [abs(weight) for weight in weights]))
    return total(deltas) / whole.masked_fill_(whole == 0, 1)


def tall_mask(delta: Tensor, unified: Tensor, scale: float) -> Tensor:
    """Say where a task's own change outweighs what the other tasks add to it: ``|tau_t| > scale |tau_MTL - tau_t|``.

    Args:
        delta: ``[*shape]`` the task vector.
        unified: ``[*shape]`` the multi-task vector (tau_MTL) that the mask is to be applied to.
        scale: How much the change must outweigh the rest (lambda), at least 0; a larger one keeps less, and 0 keeps
            what is not zero.

    Returns:
        Bool ``[*shape]``; false where the delta is zero.

    References:
        Localizing Task Information for Improved Model Merging and Compression, TALL-masks.
        https://arxiv.org/abs/2405.07813
    """
    return delta.abs() > scale * (unified - delta).abs()


def inner_products(deltas: Tensor) -> Tensor:
    """Return the inner products between task vectors, ``<tau_i, tau_j>``, accumulated in fp64.

    Args:
        deltas: ``[T, *shape]``.

    Returns:
        ``[T, T]`` in fp64, on the CPU.
    """
    gram = torch.zeros(len(deltas), len(deltas), dtype=torch.float64, device=deltas.device)
    for piece in deltas.reshape(len(deltas), -1).split(piece_length(len(deltas)), dim=1):
        gram += products(_widened(piece))
    return gram.cpu()


def _widened(piece: Tensor) -> Tensor:
    return room(*piece.shape).copy_(piece) if piece.device.type == "cpu" else piece.double()


def piece_length(tasks: int) -> int:
    """Return how many elements of each task are widened to fp64 at a time."""
    return max(1, PIECE // tasks)


def products(rows: Tensor) -> Tensor:
    """Return the inner products ``[T, T]`` of rows ``[T, n]`` that are fp64."""
    return rows @ rows.T


def room(*shape: int) -> Tensor:
    """Return fp64 memory with any values in it, the same at each call of a thread while it is large enough.

    What is this large comes from the system page by page at every allocation, which takes longer than to fill it.
    """
    held = getattr(_ROOMS, "held", None)
    size = torch.Size(shape).numel()
    if held is None or len(held) < size:
        held = _ROOMS.held = torch.empty(size, dtype=torch.float64)
    return held[:size].view(shape)


_ROOMS = local()

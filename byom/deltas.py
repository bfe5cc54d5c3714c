"""The elementwise mathematics of task vectors: pure functions on stacked differences ``[T, *shape]``."""

from __future__ import annotations

import torch
from torch import Tensor


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


def disjoint_mean(deltas: Tensor) -> Tensor:
    """Average the non-zero entries of each coordinate; 0 where there is none.

    Args:
        deltas: ``[T, *shape]`` agreeing task vectors.

    Returns:
        ``[*shape]``, the mean over the tasks that still have a value.
    """
    return total(deltas) / (deltas != 0).sum(0).clamp_(min=1)

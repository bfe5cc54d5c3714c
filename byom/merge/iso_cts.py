"""Isotropic merging in common and task-specific subspaces (Iso-CTS)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from byom.errors import fraction, one_of
from byom.functional.deltas import total
from byom.functional.iterative import square
from byom.functional.linalg import SAFE, VANISHING, polar, thin_svd, truncated_each, truncated_svd
from byom.functional.selection import kept as floored
from byom.merge.base import Group, Problem, TensorwiseMethod
from byom.merge.base.matrices import by_matrix, is_matrix, is_stack, patterns
from byom.merge.iso_c import Rank

Triplets = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class IsotropicMergingCommonTaskSpecific(TensorwiseMethod):
    """Keep the sum's leading singular directions, add each task's leading ones outside them, and level all values.

    Of ``r = min(m, n)`` directions each task gets ``n = round((r - floor(common * r)) / T)``, halves going to the
    even number and at most ``floor(r / T)``; the other ``r - n T`` are the leading left vectors ``U_c`` of
    ``sum_t tau_t``. A task's own are the leading ones of ``tau_t - U_c U_cᵀ tau_t``. With ``U, s, Vt`` all of
    them side by side: ``theta = theta_0 + scale * mean(s) * polar(U) polar(Vt)``. What is not a matrix moves by
    ``scale`` times the mean of the task vectors. Where n is 0 this is Iso-C; `fallbacks` names those matrices.

    Args:
        scale: Scaling coefficient (alpha), any real number; the paper selects 1.5 for eight tasks on ViT-B/32, 1.2
            for 14 and 1.1 for 20.
        common: Share of the directions that is common to all tasks (f), in [0, 1]; 1 is Iso-C.
        rank: ``numerical`` leaves out what the matrices do not have: singular values below 1e-6 of their
            matrix's norm, and in the polar factors what several tasks share; ``full`` keeps all r, as in the paper,
            and lets LAPACK fill them. The two are the same for matrices of full rank.
        exclude: Shell-style patterns of parameter names that are not matrices here.

    Raises:
        OptionError: If `common` is not a fraction, `rank` is unknown or `exclude` is not a list of patterns.

    References:
        No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces, Iso-CTS.
        https://arxiv.org/abs/2502.04959

    Differences:
        The authors search the scale in 0.1, 0.2, ..., 3.0 on validation data; `grid` is coarser. Paper and code
        use the full rank. Their code cuts ``0.29 * 100`` to 28 (29 here), and where rounding up asks for more than
        r directions it fails. Decompositions are in fp64, theirs in fp32.
    """

    scale: float = 1.5
    common: float = 0.8
    rank: Rank = "numerical"
    exclude: tuple[str, ...] = ("*text_projection*",)

    elementwise = False
    title = "Iso-CTS"
    grid: ClassVar = {"scale": (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)}

    def __post_init__(self) -> None:
        fraction("merge.common", self.common)
        one_of("merge.rank", self.rank, ("numerical", "full"))
        object.__setattr__(self, "exclude", patterns("merge.exclude", self.exclude))

    def merge(self, group: Group) -> Tensor:
        """Return ``theta_0`` plus the scaled isotropic change, or the scaled mean for what is not a matrix."""
        deltas = group.deltas
        levelled = by_matrix(group.name, deltas, self._levelled, self.exclude)
        return group.pretrained + self.scale * (total(deltas) / len(deltas) if levelled is None else levelled)

    def _levelled(self, deltas: Tensor) -> Tensor:
        share = own_directions(min(deltas.shape[1:]), len(deltas), self.common)
        return isotropic_with_own(deltas, share, self.rank)

    def simpler(self, problem: Problem) -> list[str]:
        """Name the matrices that are too thin to give each task a direction."""
        shapes = {name: problem.pretrained.shape(name) for name in problem.pretrained.mergeable()}
        kinds = (is_matrix, is_stack)
        matrices = [name for name, shape in shapes.items() if any(kind(name, shape, self.exclude) for kind in kinds)]
        return [n for n in matrices if not own_directions(min(shapes[n][-2:]), len(problem.tasks), self.common)]


def own_directions(rank: int, tasks: int, common: float) -> int:
    """Return how many directions of a matrix each task gets for itself.

    Args:
        rank: The matrix's shorter side (r).
        tasks: Number of tasks (T).
        common: Share that is common to all tasks (f).

    Returns:
        ``round((r - floor(f r)) / T)``, halves to even, at most ``floor(r / T)``.
    """
    return min(round((rank - floored(common, rank)) / tasks), rank // tasks)


def isotropic_with_own(deltas: Tensor, share: int, rank: Rank = "numerical") -> Tensor:
    """Level the singular values of the common directions and of `share` further ones of each task.

    What a matrix with at most as many rows as columns has outside of the common directions is decomposed in the
    coordinates of their complement, which has few rows where most directions are common.

    Args:
        deltas: ``[T, m, n]`` task vectors of one matrix.
        share: Directions of each task's own (n), at most ``floor(min(m, n) / T)``.
        rank: Whether all directions count, or those above rounding.

    Returns:
        ``[m, n]`` in fp64; zero if every task vector is.
    """
    rtol = VANISHING if rank == "numerical" else -1.0
    change = total(deltas)
    common, least = min(change.shape) - share * len(deltas), _least(change, rtol)
    if share and change.shape[0] <= change.shape[1]:
        shared, complement = _with_complement(change.double(), common, least)
        own = _own_within(deltas, complement, share, rtol)
    else:
        shared = _cut(truncated_svd(change, common), common, least)
        own = _own(deltas, shared[0], share, rtol) if share else []
    left, values, right = zip(*own, shared, strict=True)
    level = torch.cat(values).sum() / max(sum(map(len, values)), 1)
    return level * polar(torch.cat(left, 1), rtol) @ polar(torch.cat(right), rtol)


def _own(deltas: Tensor, shared: Tensor, share: int, rtol: float) -> list[Triplets]:
    found = truncated_each((_outside(delta.double(), shared) for delta in deltas), share)
    return [_cut(each, share, _least(delta, rtol)) for each, delta in zip(found, deltas, strict=True)]


def _outside(delta: Tensor, shared: Tensor) -> Tensor:
    return delta - shared @ (shared.T @ delta)


def _own_within(deltas: Tensor, complement: Tensor, share: int, rtol: float) -> list[Triplets]:
    found = truncated_each((complement.T @ delta.double() for delta in deltas), share)
    turned = [(complement @ left, values, right) for left, values, right in found]
    return [_cut(each, share, _least(delta, rtol)) for each, delta in zip(turned, deltas, strict=True)]


def _with_complement(change: Tensor, rank: int, least: float) -> tuple[Triplets, Tensor]:
    """Cut a matrix ``[m, n]`` with ``m <= n``, and complete the left vectors that are kept to a basis ``[m, m]``."""
    squares, left = torch.linalg.eigh(square(change.T))
    values, left = squares.flip(0).clamp(min=0).sqrt(), left.flip(1)
    if (values[:rank] <= SAFE * values[:1]).any():
        left, values, right = thin_svd(change)
    else:
        right = (left[:, :rank].T @ change) / values[:rank, None]
    shared = _cut((left, values, right), rank, least)
    return shared, left[:, len(shared[1]) :]


def _least(matrix: Tensor, rtol: float) -> float:
    return rtol if rtol < 0 else rtol * float(torch.linalg.matrix_norm(matrix, dtype=torch.float64))


def _cut(triplets: Triplets, rank: int, least: float) -> Triplets:
    left, values, right = triplets
    leading = values[:rank] > least
    return left[:, :rank][:, leading], values[:rank][leading], right[:rank][leading]

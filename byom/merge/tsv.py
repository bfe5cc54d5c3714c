"""Task Singular Vectors, merged (TSV-M)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from byom.functional.deltas import total
from byom.functional.linalg import VANISHING, polar, truncated_each
from byom.merge.base import Group, Problem, TensorwiseMethod
from byom.merge.base.matrices import by_matrix, is_matrix, is_stack, patterns


@dataclass(frozen=True)
class TaskSingularVectors(TensorwiseMethod):
    """Keep each task's largest singular directions of every matrix, make them orthogonal across tasks, and add.

    With ``tau_t = U_t diag(s_t) Vt_t`` cut to ``k = floor(min(m, n) / T)`` values, and ``U, s, Vt`` all tasks'
    pieces side by side: ``theta = theta_0 + scale * polar(U) diag(s) polar(Vt)``. What is not a matrix moves by
    ``scale`` times the mean of the task vectors, and so does a matrix with a side below T, for which k is 0;
    `fallbacks` names the latter.

    Directions that carry nothing are left out: a zero task vector, singular values below 1e-6 of the task's
    largest, and what several tasks have in common (their shared direction counts once), so two identical tasks give
    their rank-k truncation. T counts idle tasks too.

    Args:
        scale: Scaling coefficient (alpha), any real number.
        exclude: Shell-style patterns of parameter names that are not matrices here.

    Raises:
        OptionError: If `exclude` is not a list of patterns.

    References:
        Task Singular Vectors: Reducing Task Interference in Model Merging, TSV-Merge. https://arxiv.org/abs/2412.00081

    Differences:
        The authors search the scale in 0.1, 0.2, ..., 3.0 on validation data; `grid` is coarser. Their code leaves
        the polar factor of linearly dependent directions to LAPACK, which fills it with arbitrary ones of full
        weight, keeps the singular vectors of zero matrices, and gives 0 where k is 0. fusion-bench excludes no
        tensor by default. Results depend on how attention is stored: fused (open_clip) or as three matrices.
    """

    scale: float = 1.0
    exclude: tuple[str, ...] = ("*text_projection*",)

    elementwise = False
    title = "TSV-M"
    grid: ClassVar = {"scale": (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)}

    def __post_init__(self) -> None:
        object.__setattr__(self, "exclude", patterns("merge.exclude", self.exclude))

    def merge(self, group: Group) -> Tensor:
        """Return ``theta_0`` plus the scaled sum of orthogonalised task singular vectors, or the scaled mean."""
        deltas = group.deltas
        thin = _thin(deltas.shape[-2:], len(deltas))
        change = None if thin else by_matrix(group.name, deltas, add_orthogonalised, self.exclude)
        return group.pretrained + self.scale * (total(deltas) / len(deltas) if change is None else change)

    def simpler(self, problem: Problem) -> list[str]:
        """Name the matrices with a side below the number of tasks."""
        shapes = {name: problem.pretrained.shape(name) for name in problem.pretrained.mergeable()}
        matrices = [name for name, shape in shapes.items() if _applies(name, shape, self.exclude)]
        return [name for name in matrices if _thin(shapes[name][-2:], len(problem.tasks))]


def add_orthogonalised(deltas: Tensor) -> Tensor:
    """Sum the leading singular directions of all tasks after making them orthogonal across tasks.

    Args:
        deltas: ``[T, m, n]`` task vectors of one matrix, with ``T <= min(m, n)``.

    Returns:
        ``[m, n]`` in fp64.
    """
    rank, changed = min(deltas.shape[1:]) // len(deltas), deltas.flatten(1).any(1)
    if not changed.any():
        return torch.zeros_like(deltas[0], dtype=torch.float64)
    moving = (delta for delta, moves in zip(deltas, changed.tolist(), strict=True) if moves)
    left, values, right = zip(*(existing(*triplets) for triplets in truncated_each(moving, rank)), strict=True)
    return polar(torch.cat(left, 1)) * torch.cat(values) @ polar(torch.cat(right))


def existing(left: Tensor, values: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Leave out directions whose singular value is below 1e-6 of the largest.

    Args:
        left: ``[m, k]``.
        values: ``[k]`` descending.
        right: ``[k, n]``.

    Returns:
        The same with as many directions as carry something.
    """
    leading = values > VANISHING * values[:1]
    return left[:, leading], values[leading], right[leading]


def _applies(name: str, shape: Sequence[int], exclude: Sequence[str]) -> bool:
    return is_matrix(name, shape, exclude) or is_stack(name, shape, exclude)


def _thin(shape: tuple[int, ...], tasks: int) -> bool:
    return min(shape) < tasks

"""DC-Merge: task vectors made alike in what their directions mean, merged in a basis that covers them all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from byom.errors import fraction
from byom.functional.deltas import agreeing, disjoint_mean, elect_sign, total
from byom.functional.linalg import polar, truncated_each
from byom.functional.selection import kept, top_mask
from byom.merge.base import Group, Problem, TensorwiseMethod
from byom.merge.base.matrices import by_matrix, is_matrix, is_stack, patterns
from byom.merge.tsv import existing


@dataclass(frozen=True)
class DirectionalConsistency(TensorwiseMethod):
    """Express each task's leading directions in one orthonormal basis, merge the largest coordinates, and go back.

    With ``tau_t`` cut to ``k = floor(min(m, n) / T)`` singular values, ``U = polar([U_1, ..., U_T])`` and V alike: the
    coordinates ``M_t = Uᵀ tau_t V`` keep the share `density` of their largest entries, are merged as by TIES (the mean
    of those whose sign is that of the sum), and count only within the T diagonal blocks of ``k x k``:
    ``theta = theta_0 + scale * U M Vᵀ``. What is not a matrix moves by ``scale`` times the mean of the task vectors,
    and so does a matrix with a side below T; `fallbacks` names the latter.

    Args:
        density: Share of the coordinates that each task keeps, in [0, 1], of ``min(m, n)^2``; one at least.
        scale: Scaling coefficient (alpha), any real number.
        exclude: Shell-style patterns of parameter names that are not matrices here.

    Raises:
        OptionError: If a hyperparameter is out of range.

    References:
        DC-Merge: Improving Model Merging with Directional Consistency, and its code for full fine-tunes.
        https://arxiv.org/abs/2603.06242

    Differences:
        The paper smooths singular values before it merges, its code for full fine-tunes does not. Directions below 1e-6
        of a task's largest are left out, where theirs are filled by LAPACK with arbitrary ones; entries that tie with
        the last one kept survive by position, all of them there. They search the scale on validation data.
    """

    density: float = 1e-3
    scale: float = 1.0
    exclude: tuple[str, ...] = ("*text_projection*",)

    elementwise = False
    title = "DC-Merge"
    grid: ClassVar = {"scale": (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)}

    def __post_init__(self) -> None:
        fraction("merge.density", self.density)
        object.__setattr__(self, "exclude", patterns("merge.exclude", self.exclude))

    def merge(self, group: Group) -> Tensor:
        """Return ``theta_0`` plus the scaled change of a matrix, or the scaled mean for what is none."""
        deltas = group.deltas
        thin = min(deltas.shape[-2:], default=0) < len(deltas)
        change = None if thin else by_matrix(group.name, deltas, self._change, self.exclude)
        return group.pretrained + self.scale * (total(deltas) / len(deltas) if change is None else change)

    def simpler(self, problem: Problem) -> list[str]:
        """Name the matrices with a side below the number of tasks."""
        shapes = {name: problem.pretrained.shape(name) for name in problem.pretrained.mergeable()}
        applies = [n for n, s in shapes.items() if is_matrix(n, s, self.exclude) or is_stack(n, s, self.exclude)]
        return [name for name in applies if min(shapes[name][-2:]) < len(problem.tasks)]

    def _change(self, deltas: Tensor) -> Tensor:
        side, rank = min(deltas.shape[1:]), min(deltas.shape[1:]) // len(deltas)
        moving = deltas[deltas.flatten(1).any(1)]
        if not len(moving):
            return torch.zeros_like(deltas[0], dtype=torch.float64)
        cut = [existing(*parts) for parts in truncated_each(moving, rank)]
        left = polar(torch.cat([each[0] for each in cut], 1))
        right = polar(torch.cat([each[2] for each in cut]))
        most = max(1, kept(self.density, side * side))
        coordinates = torch.stack([_largest((left.mT @ u) * s @ (v @ right.mT), most) for u, s, v in cut])
        merged = disjoint_mean(agreeing(coordinates, elect_sign(coordinates)))
        blocks = torch.block_diag(*(torch.ones(len(s), len(s)) for _, s, _ in cut)).to(merged)
        return left @ (merged * blocks) @ right


def _largest(coordinates: Tensor, number: int) -> Tensor:
    """Keep a number of the largest entries."""
    share = min(1.0, number / coordinates.numel())
    return coordinates * top_mask(coordinates, share)

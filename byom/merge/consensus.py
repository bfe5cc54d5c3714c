"""Consensus merging."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from byom.errors import at_least, fraction, one_of, whole
from byom.functional.deltas import tall_mask, total
from byom.merge.base import Group, PlannedMethod, Problem, blockwise
from byom.merge.ties import Ties, Trimming

Unified = Literal["sum", "ties"]


@dataclass(frozen=True)
class ConsensusMerging(PlannedMethod):
    """Keep of the summed task vectors only what enough tasks rely on.

    With the multi-task vector ``tau_MTL`` and the masks ``m_t = [|tau_t| > mask_scale * |tau_MTL - tau_t|]``:
    ``theta = theta_0 + scale * [sum_t m_t >= agreement] * tau_MTL``. An agreement of 2 removes what no task relies on
    (catastrophic weights) and what a single task does (selfish weights), hence everything if there is one task.

    Args:
        mask_scale: How much a task's change must outweigh the rest (lambda), at least 0. A larger one keeps less.
        agreement: Number of tasks that must rely on a weight (k), at least 0. 0 keeps all of ``tau_MTL``; more than
            there are tasks gives theta_0.
        scale: Scaling coefficient (alpha), any real number.
        unified: ``tau_MTL`` is the ``sum`` of the task vectors, or that of their trimmed, sign-agreeing entries
            (``ties``).
        density: Fraction that ``ties`` keeps per task (K), in [0, 1].

    Raises:
        OptionError: If a hyperparameter is out of range.

    References:
        Localizing Task Information for Improved Model Merging and Compression, consensus merging.
        https://arxiv.org/abs/2405.07813

    Differences:
        The authors choose one ``mask_scale`` per task, in 0.2, 0.3, ..., 0.6, by the validation accuracy of the task's
        own mask; here it is one for all. They search the scale in 0.1, 0.2, ..., 1.0; `grid` is coarser. Their code
        adds theta_0 before it compares, whose rounding drops the smallest entries.
    """

    mask_scale: float = 0.4
    agreement: int = 2
    scale: float = 0.3
    unified: Unified = "sum"
    density: float = 0.2

    title = "Consensus Merging"
    grid: ClassVar = {"mask_scale": (0.2, 0.4, 0.6), "scale": (0.2, 0.4, 0.6, 0.8, 1.0)}

    def __post_init__(self) -> None:
        at_least("merge.mask_scale", self.mask_scale, 0, "0.4")
        whole("merge.agreement", self.agreement, 0)
        one_of("merge.unified", self.unified, get_args(Unified))
        fraction("merge.density", self.density)

    @property
    def passes(self) -> int:
        """See `PlannedMethod.passes`."""
        return Ties(self.density).passes if self.unified == "ties" else 0

    def plan(self, problem: Problem) -> Trimming | None:
        """Trim as TIES does where it is asked for; the sum needs nothing."""
        return Ties(self.density).plan(problem) if self.unified == "ties" else None

    @property
    def scales_sum(self) -> bool:
        """See `MergeMethod.scales_sum`."""
        return True

    def merge(self, group: Group, plan: Trimming | None) -> Tensor:
        """Return ``theta_0`` plus what the tasks agree on of the scaled multi-task vector, block by block."""

        def merged(start: int, piece: Group) -> Tensor:
            deltas = piece.deltas
            unified = total(plan.agreeing(piece, start) if plan else deltas) + 0.0  # a sum of -0.0 alone moves nothing
            agreed = consensus(deltas, unified, self.mask_scale, self.agreement)
            return piece.pretrained + self.scale * unified * agreed

        return blockwise(group, merged)


def consensus(deltas: Tensor, unified: Tensor, mask_scale: float, agreement: int) -> Tensor:
    """Say which weights enough tasks rely on.

    Args:
        deltas: ``[T, *shape]`` task vectors.
        unified: ``[*shape]`` multi-task vector.
        mask_scale: How much a task's change must outweigh the rest.
        agreement: Number of tasks.

    Returns:
        Bool ``[*shape]``.
    """
    count = torch.zeros_like(unified, dtype=torch.int32)
    for delta in deltas:
        count += tall_mask(delta, unified, mask_scale)
    return count >= agreement

"""TIES-Merging: trim, elect sign, merge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from byom.errors import OptionError, fraction, one_of
from byom.functional.compiled import kernels
from byom.functional.deltas import agreeing, disjoint_mean, elect_sign, total, weighted
from byom.functional.election import MOST, Election
from byom.merge.base import Group, PlannedMethod, Problem, blockwise
from byom.merge.base.checks import fractions, signed_weights
from byom.weights.cuts import Cuts, Scope, cuts_of_each, require_scope


@dataclass(frozen=True)
class Trimming:
    """Knowledge of the whole model: one cut per task, the sign most coordinates elect, and the weights of the tasks."""

    cuts: Sequence[Cuts]
    majority: float
    weights: tuple[float, ...] = ()
    elements: int = 0  # of all models, which decides whether kernels are worth their while

    def election(self, group: Group) -> Election | None:
        """Return a parameter's election by compiled kernels; None where it takes torch's road, to the same bits."""
        located = [cut[group.name] for cut in self.cuts]
        return Election.of(kernels(self.elements), group.pretrained, group.experts, located, self.weights)

    def agreeing(self, piece: Group, start: int) -> Tensor:
        """Return what trimming and sign election leave of the task vectors.

        Args:
            piece: A flat piece of a parameter.
            start: Its flat offset in the parameter.

        Returns:
            ``[T, n]``.
        """
        deltas = self._trimmed(piece, start)
        return agreeing(deltas, elect_sign(deltas, self.majority))

    def votes(self, group: Group) -> int:
        """Return how many coordinates of a parameter elect a plus, less those that elect a minus."""
        if election := self.election(group):
            return election.votes()
        signs = (elect_sign(self._trimmed(piece, start)) for start, piece in group.blocks())
        return sum(int(sign.sum(dtype=torch.float64)) for sign in signs)

    def _trimmed(self, piece: Group, start: int) -> Tensor:
        deltas = piece.deltas
        for row, cut in zip(deltas, self.cuts, strict=True):
            threshold, offset = cut[piece.name]
            row.mul_(threshold.mask(row, offset + start))
        return weighted(deltas, self.weights)


@dataclass(frozen=True)
class Ties(PlannedMethod):
    """Keep each task's largest changes, elect a sign per parameter, and combine the changes that agree with it.

    ``tau_t`` is trimmed to its top `density` entries by magnitude; ``gamma = sgn(sum_t tau_t)``;
    ``theta = theta_0 + scale * mean of the non-zero tau_t whose sign is gamma``.

    With task weights every trimmed ``tau_t`` is multiplied by ``w_t`` before the election, and the mean of those that
    agree is ``sum_t w_t tau_t / sum_t |w_t|`` over them. A task of negative weight is one with the opposite task vector
    and weight ``|w_t|``: the mean has the elected sign and is no larger than the largest change. A task of weight 0 is
    left out.

    Args:
        density: Fraction of entries kept per task (K), in [0, 1]; exactly ``floor(density * n)`` survive, ties
            going to the lowest position.
        scale: Scaling coefficient (lambda).
        combine: ``mean`` over the agreeing tasks (the authors' ``dis-mean``) or ``sum`` (``dis-sum``, used with
            scale 0.3 in the CLIP tables since AdaMerging).
        scope: ``global`` ranks all parameters of a task together, ``tensor`` each tensor on its own, ``row`` each row
            along a tensor's last axis on its own.
        weights: Task weights (w) of either sign, in the order of the tasks; empty weighs them equally. For ``mean``
            only ratios matter.
        densities: Fraction of entries kept of each task, in the order of the tasks, where they differ; empty keeps
            `density` of all.

    Raises:
        OptionError: If a hyperparameter is out of range, or the weights are not one finite number per task, or the
            densities not one fraction per task.

    References:
        TIES-Merging: Resolving Interference When Merging Models, algorithm 1. https://arxiv.org/abs/2306.01708

    Differences:
        The authors keep entries >= the threshold, hence one more, and read density > 1 as a percentage; here
        exactly k survive and density is a fraction. A coordinate whose trimmed sum is exactly 0 takes the sign
        that most coordinates elected, as in the authors' code; if that is 0 as well nothing is merged there
        (their code then keeps the negatives). mergekit and PEFT trim per tensor and send zero sums to +. mergekit
        divides by ``sum_t w_t``, which is the same while all are positive; with negative ones its mean may turn its
        sign, or grow without bound. PEFT elects before it weighs, and divides by the number of tasks that agree.
    """

    density: float = 0.2
    scale: float = 1.0
    combine: Literal["mean", "sum"] = "mean"
    scope: Scope = "global"
    weights: tuple[float, ...] = ()
    densities: tuple[float, ...] = ()

    title = "TIES"
    exposing: ClassVar[bool] = True
    grid: ClassVar = {"scale": (0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2, 2.4)}

    def __post_init__(self) -> None:
        fraction("merge.density", self.density)
        one_of("merge.combine", self.combine, ("mean", "sum"))
        require_scope("merge.scope", self.scope)
        object.__setattr__(self, "weights", signed_weights(self.weights))
        object.__setattr__(self, "densities", fractions("merge.densities", self.densities))

    def check(self, problem: Problem) -> None:
        """Refuse densities of another number than the tasks, besides what every method refuses."""
        super().check(problem)
        if self.densities and len(self.densities) != len(problem.tasks):
            raise OptionError(
                f"merge.densities has {len(self.densities)} values for {len(problem.tasks)} tasks "
                f"({', '.join(problem.tasks)}); give one per task, in this order"
            )

    @property
    def passes(self) -> int:
        """See `PlannedMethod.passes`."""
        return 2

    @property
    def scales_sum(self) -> bool:
        """See `MergeMethod.scales_sum`."""
        return self.combine == "sum"

    def plan(self, problem: Problem) -> Trimming:
        """Find each task's cut, then the sign elected by most coordinates of the whole model."""
        elements = len(problem.tasks) * problem.pretrained.numel
        undecided = Trimming(self._cuts(problem), 0.0, self.weights, elements)
        names = problem.pretrained.mergeable()
        votes = sum(undecided.votes(problem.group(name, checked=False)) for name in names)  # finding cuts has looked
        return replace(undecided, majority=float((votes > 0) - (votes < 0)))

    def _cuts(self, problem: Problem) -> list[Cuts]:
        """Return each task's cut; those of several densities are found in one pass."""
        each = self.densities or (self.density,) * len(problem.tasks)
        experts, base = [*problem.finetuned.values()], problem.pretrained
        found = {density: cuts_of_each(experts, base, density, self.scope, each) for density in each}
        return [found[density][task] for task, density in enumerate(each)]

    def merge(self, group: Group, plan: Trimming) -> Tensor:
        """Return the merged parameter, block by block."""
        if abs(self.scale) <= MOST and (election := plan.election(group)):
            flat = election.merge(plan.majority, self.scale, self.combine == "mean", group.dtype)
            return flat.reshape(group.pretrained.shape)

        def merged(start: int, piece: Group) -> Tensor:
            agreed = plan.agreeing(piece, start)
            combined = disjoint_mean(agreed, self.weights) if self.combine == "mean" else total(agreed)
            return piece.pretrained + self.scale * combined

        return blockwise(group, merged, final=True)

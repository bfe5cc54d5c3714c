"""Fisher merging."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from byom.errors import one_of, positive
from byom.functional.means import precision_mean, weighted_mean
from byom.merge.base import Group, PlannedMethod, Problem, blockwise
from byom.merge.base.checks import require_shape, require_weights, task_weights
from byom.merge.base.needs import Needs


@dataclass(frozen=True)
class FisherMerging(PlannedMethod):
    """Average each parameter, weighted by how much each task's predictions depend on it (diagonal Fisher).

    ``theta = sum_t c_t F_t theta_t / sum_t c_t F_t`` element by element, with ``F_t`` at least `floor`: what no task
    depends on becomes the plain average. Parameters without a Fisher value (floating-point buffers) get the mean
    with the weights c_t.

    Args:
        floor: Least Fisher value, above 0.
        normalise: ``global`` divides each task's Fisher by its Euclidean norm over all parameters, before which the
            floor is applied; a task whose Fisher is 0 everywhere is divided by 1. ``none`` takes it as it is, so
            that a task with large gradients outweighs the others.
        weights: Weight of each task (c_t), none negative, in the problem's order of tasks; empty weighs all alike.

    Raises:
        OptionError: If a hyperparameter is out of range.

    References:
        Merging Models with Fisher-Weighted Averaging, section 3. https://arxiv.org/abs/2111.09832

    Differences:
        The authors raise only the first task's Fisher to 1e-6 and normalise by default; here every task is floored,
        which keeps the result free of task order. MergeLM and fusion-bench add 1e-6 instead, and normalise by the
        reciprocal of the norm plus 1e-6.
    """

    floor: float = 1e-6
    normalise: Literal["none", "global"] = "none"
    weights: tuple[float, ...] = ()

    title = "Fisher merging"
    previews = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", tuple(self.weights))
        positive("merge.floor", self.floor, "1e-6")
        one_of("merge.normalise", self.normalise, ("none", "global"))
        require_weights(self.weights)

    @property
    def needs(self) -> Needs:
        """The statistic ``fisher``, which looks at training inputs (at labels only if estimated empirically)."""
        return Needs(statistics=frozenset({"fisher"}), inputs=frozenset({"train"}))

    def simpler(self, problem: Problem) -> list[str]:
        """Name the parameters without a Fisher value."""
        return problem.uncovered("fisher")

    @property
    def passes(self) -> int:
        """See `PlannedMethod.passes`."""
        return 0

    def plan(self, problem: Problem) -> list[float]:
        """Find each task's coefficient: its weight, divided by the norm of its Fisher if that is asked for."""
        weights = task_weights(self.weights, problem)
        if self.normalise == "none":
            return weights
        norms = [problem.statistics["fisher"][task].norm() or 1.0 for task in problem.tasks]
        return [weight / norm for weight, norm in zip(weights, norms, strict=True)]

    def merge(self, group: Group, plan: list[float]) -> Tensor:
        """Return the Fisher-weighted average, block by block."""
        if "fisher" not in group.statistics:
            weights = self.weights or [1.0] * len(group.experts)
            return blockwise(group, lambda _, piece: piece.pretrained + weighted_mean(piece.deltas, weights))
        require_shape(group, "fisher")
        return blockwise(group, lambda _, piece: self._piece(piece, plan))

    def _piece(self, piece: Group, coefficients: list[float]) -> Tensor:
        fisher = piece.statistics["fisher"].clamp(min=self.floor)
        return piece.pretrained + precision_mean(piece.deltas, fisher, coefficients)

"""Hessian-weighted merging."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from byom.errors import at_least, one_of
from byom.functional.means import precision_mean, weighted_mean
from byom.merge.base import Group, PlannedMethod, Problem, blockwise
from byom.merge.base.checks import require_shape, require_weights, task_weights
from byom.merge.base.needs import Needs

POSTERIORS = ("fisher", "ivon")


@dataclass(frozen=True)
class HessianWeighted(PlannedMethod):
    """Preview a multi-task optimum for any weighting of the tasks from a Gaussian around each fine-tuned model.

    ``theta = theta_0 + (prior + sum_t a_t H_t)^-1 sum_t a_t H_t (theta_t - theta_0)`` element by element: the optimum
    of ``sum_t a_t l_t`` if each loss were quadratic with the diagonal Hessian H_t. Where no H_t and no prior says
    anything theta_0 stays; parameters without a Hessian (floating-point buffers) get the mean with the weights a_t.

    Args:
        posterior: Which statistic H_t is. ``fisher``: the diagonal Fisher, the Hessian of the task's mean loss near
            its optimum, so that a_t stands for the task's share of the examples. ``ivon``: the precision
            ``ess (h + weight decay)`` that the optimiser IVON estimates around theta_t.
        prior: Precision of theta_0 in the units of H_t (delta), at least 0; a large one gives theta_0.
        weights: Weight of each task (a_t), none negative, in the problem's order of tasks; empty gives 1 / T to each.

    Raises:
        OptionError: If a hyperparameter is out of range.

    References:
        How to Weight Multitask Finetuning? Fast Previews via Bayesian Model-Merging, section 3.
        https://arxiv.org/abs/2412.08147
        Model Merging by Uncertainty-Based Gradient Matching. https://arxiv.org/abs/2310.12808

    Differences:
        No code of the first paper is known; the second's scales each Hessian by the size of the data set (give
        `weights` for that) and adds 1e-12 to the denominator and to every numerator, so that without Hessians it is
        Task Arithmetic; here only the denominator has the prior, and without Hessians the result is theta_0.
    """

    posterior: Literal["fisher", "ivon"] = "fisher"
    prior: float = 1e-12
    weights: tuple[float, ...] = ()

    title = "Hessian-weighted"
    previews = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", tuple(self.weights))
        require_posterior(self.posterior, self.prior)
        require_weights(self.weights)

    @property
    def needs(self) -> Needs:
        """The posterior's statistic, which looks at training inputs, and IVON at their labels too."""
        return posterior_needs(self.posterior)

    def simpler(self, problem: Problem) -> list[str]:
        """Name the parameters without a Hessian."""
        return problem.uncovered(self.posterior)

    @property
    def passes(self) -> int:
        """See `PlannedMethod.passes`."""
        return 0

    def plan(self, problem: Problem) -> list[float]:
        """Return one weight per task; nothing is read."""
        return task_weights(self.weights, problem)

    def merge(self, group: Group, plan: list[float]) -> Tensor:
        """Return the preview, block by block."""
        return previewed(group, plan, self.posterior, self.prior)


def previewed(group: Group, weights: list[float], posterior: str, prior: float) -> Tensor:
    """Return theta_0 plus the precision-weighted mean of the task vectors; the mean without a precision."""
    if posterior not in group.statistics:
        return blockwise(group, lambda _, piece: piece.pretrained + weighted_mean(piece.deltas, weights))
    require_shape(group, posterior)
    return blockwise(
        group,
        lambda _, piece: piece.pretrained + precision_mean(piece.deltas, piece.statistics[posterior], weights, prior),
    )


def require_posterior(posterior: str, prior: float) -> None:
    """Refuse an unknown posterior or a prior out of range.

    Raises:
        OptionError: Naming the option.
    """
    one_of("merge.posterior", posterior, POSTERIORS)
    at_least("merge.prior", prior, 0, "1e-12")


def posterior_needs(posterior: str, members: int = 1) -> Needs:
    """Return what merging with a posterior needs."""
    return Needs(frozenset({posterior}), frozenset({"train"}), labels=posterior == "ivon", members=members)

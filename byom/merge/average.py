"""Weight averaging, uniform or weighted by task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from byom.errors import OptionError
from byom.merge.base import Group, Problem, TensorwiseMethod
from byom.merge.base.changes import require_adapted
from byom.merge.base.checks import signed_weights
from byom.weights.lowrank import Adapted, cat

CANCELLED = 1e-6  # share of the magnitudes below which a sum of weights is rounding


@dataclass(frozen=True)
class Average(TensorwiseMethod):
    """Average the fine-tuned models: ``theta = (1/T) sum_t theta_t``.

    With task weights it is ``theta = sum_t alpha_t theta_t``, ``sum_t alpha_t = 1``, which minimises
    ``sum_t alpha_t |theta - theta_t|^2``: the preview of joint fine-tuning that takes the loss of every task for the
    same isotropic bowl. A task of negative weight is moved away from, along the line from the weighted mean of the
    others.

    Args:
        weights: Task weights (alpha) of either sign, in the order of the tasks; they are divided by their sum, which
            must be positive and above a millionth of the sum of their magnitudes. Empty weighs the tasks equally.

    Raises:
        OptionError: If a weight is not finite, their sum is not positive, or their number is not that of the tasks.

    References:
        Model soups, uniform soup. https://arxiv.org/abs/2203.05482
        How to Weight Multitask Finetuning? Fast Previews via Bayesian Model-Merging, simple merging.
        https://arxiv.org/abs/2412.08147

    Differences:
        Buffers that are not floating point are carried from the pre-trained model; implementations that average
        the whole state dict turn them into floats or truncate them. mergekit's ``linear`` divides by any sum.
    """

    weights: tuple[float, ...] = ()

    exposing: ClassVar[bool] = True
    title = "Averaging"
    previews = True

    def __post_init__(self) -> None:
        weights = signed_weights(self.weights)
        if weights and sum(weights) <= CANCELLED * sum(map(abs, weights)):
            raise OptionError(
                f"merge.weights={list(self.weights)} have no positive, finite sum to be divided by; weigh the other "
                "tasks more, or use merge=task_arithmetic, which divides by nothing"
            )
        object.__setattr__(self, "weights", tuple(self.weights))

    def merge(self, group: Group) -> Tensor:
        """Return the mean over tasks, accumulated in fp32."""
        if not self.weights:
            return group.total().div_(len(group.experts))
        whole = sum(self.weights)
        return group.total([weight / whole for weight in self.weights])

    def low_rank(self, problem: Problem) -> Adapted:
        """Return the weighted mean of adapters as one product, without forming it; see `byom.weights.lowrank.cat`."""
        self.check(problem)
        weights = self.weights or (1.0,) * len(problem.tasks)
        shares = {task: weight / sum(weights) for task, weight in zip(problem.tasks, weights, strict=True)}
        return cat(require_adapted(problem), shares)

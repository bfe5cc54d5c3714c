"""Task Arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from byom.merge.base import Group, Problem, TensorwiseMethod
from byom.merge.base.changes import require_adapted
from byom.merge.base.checks import signed_weights
from byom.weights.lowrank import Adapted, cat


@dataclass(frozen=True)
class TaskArithmetic(TensorwiseMethod):
    """Add the scaled sum of the task vectors: ``theta = theta_0 + scale * sum_t (theta_t - theta_0)``.

    With task weights it is ``theta = theta_0 + scale * sum_t w_t tau_t``; a negative one takes from the model what the
    task has learned.

    Args:
        scale: Scaling coefficient (lambda), any real number; 1/T gives the average.
        weights: Task weights (w) of either sign, in the order of the tasks; they are not divided by their sum. Empty
            weighs every task 1, and 0 leaves a task out.

    Raises:
        OptionError: If a weight is not finite, or their number is not that of the tasks.

    References:
        Editing models with task arithmetic, section 2. https://arxiv.org/abs/2212.04089

    Differences:
        The authors' code warns and drops a parameter that only one model has; here that is an error.
        mergekit's ``task_arithmetic`` has a scale of 1 by default, and demands the weights.
    """

    scale: float = 0.3
    weights: tuple[float, ...] = ()

    exposing: ClassVar[bool] = True
    title = "Task Arithmetic"
    grid: ClassVar = {"scale": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)}

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", signed_weights(self.weights))

    @property
    def scales_sum(self) -> bool:
        """See `MergeMethod.scales_sum`."""
        return True

    def merge(self, group: Group) -> Tensor:
        """Return ``theta_0 + scale * sum_t w_t tau_t``."""
        return group.moved(self.scale, self.weights)

    def low_rank(self, problem: Problem) -> Adapted:
        """Return the weighted sum of adapters as one product, without forming it; see `byom.weights.lowrank.cat`."""
        self.check(problem)
        weights = self.weights or (1.0,) * len(problem.tasks)
        scaled = {task: self.scale * weight for task, weight in zip(problem.tasks, weights, strict=True)}
        return cat(require_adapted(problem), scaled)

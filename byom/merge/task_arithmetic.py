"""Task Arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from byom.functional.deltas import total
from byom.merge.base import Group, TensorwiseMethod


@dataclass(frozen=True)
class TaskArithmetic(TensorwiseMethod):
    """Add the scaled sum of the task vectors: ``theta = theta_0 + scale * sum_t (theta_t - theta_0)``.

    Args:
        scale: Scaling coefficient (lambda), any real number; 1/T gives the average.

    References:
        Editing models with task arithmetic, section 2. https://arxiv.org/abs/2212.04089

    Differences:
        The authors' code warns and drops a parameter that only one model has; here that is an error.
        mergekit's ``task_arithmetic`` uses one weight per model and defaults to 1.
    """

    scale: float = 0.3

    title = "Task Arithmetic"
    grid: ClassVar = {"scale": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)}

    def merge(self, group: Group) -> Tensor:
        """Return ``theta_0 + scale * sum_t tau_t``."""
        return group.pretrained + self.scale * total(group.deltas)

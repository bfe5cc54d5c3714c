"""Weight averaging, uniform or weighted by task."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from byom.errors import OptionError
from byom.functional.deltas import total
from byom.functional.means import weighted_mean
from byom.merge.base import Group, TensorwiseMethod
from byom.merge.base.checks import require_weights


@dataclass(frozen=True)
class Average(TensorwiseMethod):
    """Average the fine-tuned models: ``theta = (1/T) sum_t theta_t``.

    With task weights it is ``theta = sum_t alpha_t theta_t``, ``sum_t alpha_t = 1``, which minimises
    ``sum_t alpha_t |theta - theta_t|^2``: the preview of joint fine-tuning that takes the loss of every task for the
    same isotropic bowl.

    Args:
        weights: Task weights (alpha), 0 or more, in the order of the tasks; they are divided by their sum. Empty
            weighs the tasks equally.

    Raises:
        OptionError: If a weight is negative or not finite, none is positive, or their number is not that of the tasks.

    References:
        Model soups, uniform soup. https://arxiv.org/abs/2203.05482
        How to Weight Multitask Finetuning? Fast Previews via Bayesian Model-Merging, simple merging.
        https://arxiv.org/abs/2412.08147

    Differences:
        Buffers that are not floating point are carried from the pre-trained model; implementations that average
        the whole state dict turn them into floats or truncate them.
    """

    weights: tuple[float, ...] = ()

    title = "Averaging"

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", tuple(self.weights))
        require_weights(self.weights)

    def merge(self, group: Group) -> Tensor:
        """Return the mean over tasks, accumulated in fp32."""
        if not self.weights:
            return total(group.finetuned) / len(group.experts)
        if len(self.weights) != len(group.experts):
            raise OptionError(
                f"merge.weights has {len(self.weights)} values for {len(group.experts)} tasks; give one per task"
            )
        return weighted_mean(group.finetuned, self.weights)

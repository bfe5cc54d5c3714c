"""Running statistics of inputs, such as batch normalisation's: averages of data, which no direction leads away from."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from byom.functional.tensors import wide
from byom.weights import Weights

STATISTIC = re.compile(r"(^|[._])(running|moving)_(mean|var|variance|std)$")


def is_running(name: str) -> bool:
    """Say whether a tensor is a running statistic, by its name."""
    return STATISTIC.search(name) is not None


def running(weights: Weights) -> list[str]:
    """Name the floating-point running statistics among some tensors, sorted."""
    return [name for name in weights.mergeable() if is_running(name)]


def settled(pretrained: Weights, finetuned: Mapping[str, Weights]) -> tuple[Weights, dict[str, Weights]]:
    """Give every model the average of the experts' running statistics.

    A variance that task vectors extrapolate may be negative, and the network returns NaN; whatever a method makes of
    models that agree in a tensor is that tensor.

    Args:
        pretrained: theta_0.
        finetuned: Task name to theta_t.

    Returns:
        Both; the same objects if there are no such statistics.
    """
    names = frozenset(running(pretrained))
    if not names:
        return pretrained, dict(finetuned)
    experts = list(finetuned.values())

    def mean(name: str) -> Tensor:
        total = wide(experts[0].read_finite(name)).clone()
        for expert in experts[1:]:
            total += wide(expert.read_finite(name))
        return total / len(experts)

    def agreed(weights: Weights) -> Weights:
        return weights.derived(lambda name: mean(name) if name in names else weights[name], weights.origin)

    return agreed(pretrained), {task: agreed(expert) for task, expert in finetuned.items()}

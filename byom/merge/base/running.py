"""Running statistics of inputs, such as batch normalisation's: averages of data, which no direction leads away from."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

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


def averaged(experts: Sequence[Weights]) -> Callable[[Weights], Weights]:
    """Return what gives a model the average of the experts' running statistics.

    A variance that task vectors extrapolate may be negative, and the network returns NaN; whatever a method makes of
    models that agree in a tensor is that tensor.

    Args:
        experts: theta_t of every task.

    Returns:
        A function of weights, which gives back the same object if there are no such statistics.
    """
    names = frozenset(running(experts[0]))

    def mean(name: str) -> Tensor:
        total = wide(experts[0].read_finite(name)).clone()
        for expert in experts[1:]:
            total += wide(expert.read_finite(name))
        return total / len(experts)

    def agreed(weights: Weights) -> Weights:
        if not names:
            return weights
        return weights.derived(lambda name: mean(name) if name in names else weights[name], weights.origin)

    return agreed

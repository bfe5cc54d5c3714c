"""Checks that several merge methods share, of their options and of what they are given."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

from byom.errors import CheckpointError, OptionError, fraction
from byom.merge.base.group import Group
from byom.merge.base.method import MergeMethod
from byom.merge.base.problem import Problem


def require_weights(weights: Sequence[float]) -> None:
    """Refuse task weights that are negative, not finite or all 0.

    Raises:
        OptionError: Naming ``merge.weights``.
    """
    if weights and not (min(weights) >= 0 and 0 < sum(weights) < float("inf")):
        raise OptionError(f"merge.weights={list(weights)} must be at least 0, finite, and not all 0")


def signed_weights(weights: Sequence[float]) -> tuple[float, ...]:
    """Return task weights of either sign as floats.

    Raises:
        OptionError: If they are not a list of finite numbers, naming ``merge.weights``.
    """
    if isinstance(weights, str) or not isinstance(weights, Sequence) or not all(map(_finite, weights)):
        raise OptionError(
            f"merge.weights={weights} is not a list of finite numbers; write merge.weights=[1,0.5], one per task"
        )
    return tuple(map(float, weights))


def _finite(weight: object) -> bool:
    return isinstance(weight, int | float) and not isinstance(weight, bool) and isfinite(weight)


def fractions(option: str, values: Sequence[float]) -> tuple[float, ...]:
    """Return one fraction per task as floats.

    Raises:
        OptionError: If they are not a list of numbers in [0, 1].
    """
    if isinstance(values, str) or not isinstance(values, Sequence) or not all(map(_finite, values)):
        raise OptionError(f"{option}={values} is not a list of fractions; write {option}=[0.2,0.5], one per task")
    for value in values:
        fraction(option, value)
    return tuple(map(float, values))


def task_weights(weights: Sequence[float], problem: Problem) -> list[float]:
    """Return one weight per task, all alike with sum 1 if none are given."""
    return list(weights) or [1 / len(problem.tasks)] * len(problem.tasks)


def require_shape(group: Group, statistic: str) -> None:
    """Refuse a statistic that is not of its parameter's shape.

    Raises:
        CheckpointError: Naming the parameter.
    """
    shape = group.statistics[statistic].shape[1:]
    if shape != group.pretrained.shape:
        raise CheckpointError(
            f"the statistic '{statistic}' of '{group.name}' has shape {tuple(shape)}, the parameter "
            f"{tuple(group.pretrained.shape)}; compute it for this model"
        )


def require_experts(then: MergeMethod) -> None:
    """Refuse to wrap a method that does not look at the experts which the wrapper changes.

    Raises:
        OptionError: If it trains a joint model, or merges further models of each task.
    """
    if then.needs.joint or then.needs.members > 1:
        raise OptionError(
            f"merge.then={type(then).__name__} does not merge the experts alone, so changing them first would do "
            "nothing or half; choose another, for example merge@merge.then=ties"
        )

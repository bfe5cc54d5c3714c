"""LiNeS: layers scaled by their depth, after any merge method."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import isfinite
from typing import ClassVar

from torch import Tensor

from byom.errors import OptionError
from byom.merge.base import Group, MergeMethod, Problem
from byom.merge.base.method import lazily
from byom.merge.base.wrapper import Wrapper
from byom.merge.task_arithmetic import TaskArithmetic
from byom.weights import Weights

BLOCK = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class LayerIncreasingNetworkScaling(Wrapper):
    """Scale what a method changes by a factor that grows linearly with depth.

    Shallow layers hold what all tasks share, and changes there interfere; deep ones hold what is a task's own. Block l
    of L gets ``theta = theta_0 + (alpha + beta l / (L - 1)) (theta_merged - theta_0)``, and what is in no block the
    factor alpha. A block is the first whole number in a parameter's name, such as 3 in ``blocks.3.attn.qkv.weight``.

    Args:
        then: The method that merges.
        alpha: Factor of the first block and of what is in none. None takes
            ``||sum_t tau_t||_1 / (T ||theta_merged - theta_0||_1)``, so that a model of first blocks alone would have
            the norm of the average. That reads all models once more.
        beta: What the last block gets beyond the first one; 0 scales all alike. It multiplies what `then` made, so the
            authors' values are for ``merge.then.scale=1``.

    Raises:
        OptionError: If a hyperparameter is not a finite number.

    References:
        LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging.
        https://arxiv.org/abs/2410.17146

    Differences:
        The authors search beta on validation data. They count blocks of vision transformers by fixed numbers (12, or 24
        for ViT-L/14) and take the norms of open_clip's whole image encoder. A model of several stacks (an encoder and a
        decoder) has blocks of the same number in each, which get the same factor.
    """

    then: MergeMethod = field(default_factory=TaskArithmetic)
    alpha: float | None = None
    beta: float = 0.5

    title = "LiNeS"
    grid: ClassVar = {"beta": (0.25, 0.5, 1.0, 1.5, 2.0, 3.0)}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
            if not (number or (name == "alpha" and value is None)):
                raise OptionError(f"merge.{name}={value} is not a finite number; try 0.5")

    @property
    def passes(self) -> int:
        """See `PlannedMethod.passes`: what is merged is read beside theta_0, and for alpha beside the sum before."""
        return super().passes + (3 if self.alpha is None else 1)

    def __call__(self, problem: Problem) -> Weights:
        """Scale lazily; see `MergeMethod.__call__`."""
        self.check(problem)
        problem = problem.settled()
        merged = problem.here(self.then(problem))
        names = problem.pretrained.mergeable()
        alpha = balance(problem, merged) if self.alpha is None else self.alpha
        depth = depths(names)

        def scaled(group: Group) -> Tensor:
            factor = alpha + self.beta * depth.get(group.name, 0.0)
            return group.pretrained + factor * (merged.raw(group.name) - group.pretrained)

        return lazily(problem, scaled)


def balance(problem: Problem, merged: Weights) -> float:
    """Return ``||sum_t tau_t||_1 / (T ||theta_merged - theta_0||_1)`` over all parameters; 0 if nothing was merged."""
    summed, moved = 0.0, 0.0
    for name in problem.pretrained.mergeable():
        group = problem.group(name)
        summed += float(group.moved(1.0).sub_(group.pretrained).abs().double().sum())
        moved += float((merged.raw(name) - group.pretrained).abs().double().sum())
    return summed / moved / len(problem.tasks) if moved else 0.0


def depths(names: Iterable[str]) -> dict[str, float]:
    """Return how deep the block of a parameter is, from 0 to 1, for those that are in one.

    A single block has depth 0.
    """
    blocks = {name: int(found[1]) for name in names if (found := BLOCK.search(name))}
    last = max(blocks.values(), default=0)
    return {name: block / last if last else 0.0 for name, block in blocks.items()}

"""What every merge method is given, and the interfaces it may implement."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from byom.errors import CheckpointError, OptionError
from byom.tensors import wide
from byom.weights import Weights, require_match

BLOCK = 1 << 20  # elements of one parameter merged at a time: bounds temporaries, and stays near the caches


@dataclass(frozen=True)
class Group:
    """One parameter in every model.

    Args:
        name: The parameter's name.
        pretrained: ``[*shape]``.
        experts: One ``[*shape]`` tensor a task, in the problem's task order.
        statistics: Statistic name to ``[T, ...]``.
    """

    name: str
    pretrained: Tensor
    experts: tuple[Tensor, ...]
    statistics: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def finetuned(self) -> Tensor:
        """The fine-tuned values ``[T, *shape]`` in fp32 (fp64 for fp64 models)."""
        return torch.stack([wide(expert) for expert in self.experts])

    @property
    def deltas(self) -> Tensor:
        """The task vectors ``[T, *shape]``, both sides cast to fp32 (fp64 for fp64 models) before subtracting."""
        stacked = self.finetuned
        return stacked.sub_(wide(self.pretrained))

    def blocks(self) -> Iterator[tuple[int, Group]]:
        """Yield ``(offset, group)`` for flat pieces of at most `BLOCK` elements; a view, nothing is copied."""
        flat = [tensor.reshape(-1) for tensor in (self.pretrained, *self.experts)]
        for start in range(0, flat[0].numel(), BLOCK):
            piece = [tensor[start : start + BLOCK] for tensor in flat]
            yield start, Group(self.name, piece[0], tuple(piece[1:]))


@dataclass(frozen=True)
class Problem:
    """What is to be merged.

    Args:
        pretrained: theta_0.
        finetuned: Task name to theta_t, all with the names and shapes of theta_0.
        statistics: Statistic name to task name to weights-like values.

    Raises:
        CheckpointError: If there is no expert, or names or shapes differ.
    """

    pretrained: Weights
    finetuned: Mapping[str, Weights]
    statistics: Mapping[str, Mapping[str, Weights]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.finetuned:
            raise CheckpointError("there is no fine-tuned model to merge; give at least one task")
        for expert in self.finetuned.values():
            require_match(self.pretrained, expert)

    @property
    def tasks(self) -> list[str]:
        """Task names, in the order of every ``[T, ...]`` axis."""
        return list(self.finetuned)

    def group(self, name: str) -> Group:
        """Read one parameter of every model, refusing NaN and infinity."""
        experts = tuple(expert.read_finite(name) for expert in self.finetuned.values())
        return Group(name, self.pretrained.read_finite(name), experts, self._statistics(name))

    def _statistics(self, name: str) -> dict[str, Tensor]:
        return {
            kind: torch.stack([by_task[task][name] for task in self.tasks])
            for kind, by_task in self.statistics.items()
            if all(name in by_task[task] for task in self.tasks)
        }


@dataclass(frozen=True)
class MergeMethod(ABC):
    """A merge method: a frozen dataclass of hyperparameters, called on a `Problem`."""

    requires: ClassVar[frozenset[str]] = frozenset()
    """Statistics it cannot work without."""
    grid: ClassVar[Mapping[str, tuple[float, ...]]] = {}
    """Values that ``tune=validation`` tries, by hyperparameter: the grid that its authors searched."""
    title: ClassVar[str]
    """Name in tables."""

    @abstractmethod
    def __call__(self, problem: Problem) -> Weights:
        """Merge lazily: reading a tensor of the result merges that tensor."""

    def check(self, problem: Problem) -> None:
        """Refuse a problem that lacks a required statistic.

        Raises:
            OptionError: Naming the statistic.
        """
        missing = sorted(self.requires - set(problem.statistics))
        if missing:
            raise OptionError(
                f"{type(self).__name__} needs the statistics {missing}; compute them with statistic={missing[0]}"
            )


@dataclass(frozen=True)
class TensorwiseMethod(MergeMethod):
    """A method that merges each parameter on its own, in flat blocks when it acts on each element alone."""

    elementwise: ClassVar[bool] = True

    @abstractmethod
    def merge(self, group: Group) -> Tensor:
        """Merge one parameter (or, for elementwise methods, a flat piece of it).

        Args:
            group: The parameter in every model.

        Returns:
            ``[*shape]`` merged values, in fp32 or fp64.
        """

    def __call__(self, problem: Problem) -> Weights:
        """Merge lazily; see `MergeMethod.__call__`."""
        self.check(problem)
        return _lazily(problem, self._whole)

    def _whole(self, group: Group) -> Tensor:
        if not self.elementwise:
            return self.merge(group)
        return blockwise(group, lambda _, piece: self.merge(piece))


@dataclass(frozen=True)
class PlannedMethod(MergeMethod):
    """A method that streams over all parameters once or twice before it can merge any of them."""

    @abstractmethod
    def plan(self, problem: Problem) -> Any:
        """Find what has to be known about the whole model, such as a global threshold."""

    @abstractmethod
    def merge(self, group: Group, plan: Any) -> Tensor:
        """Merge one parameter.

        Args:
            group: The parameter in every model.
            plan: What `plan` returned.

        Returns:
            ``[*shape]`` merged values, in fp32 or fp64.
        """

    def __call__(self, problem: Problem) -> Weights:
        """Plan now, merge lazily; see `MergeMethod.__call__`."""
        self.check(problem)
        plan = self.plan(problem)
        return _lazily(problem, lambda group: self.merge(group, plan))


def blockwise(group: Group, merge: Any) -> Tensor:
    """Merge a parameter piece by piece.

    Args:
        group: The parameter in every model.
        merge: Function of (flat offset, flat piece) that returns the merged piece.

    Returns:
        ``[*shape]`` merged values.
    """
    dtype = torch.promote_types(group.pretrained.dtype, torch.float32)
    merged = torch.empty(group.pretrained.numel(), dtype=dtype)
    for start, piece in group.blocks():
        merged[start : start + piece.pretrained.numel()] = merge(start, piece)
    return merged.reshape(group.pretrained.shape)


def _lazily(problem: Problem, merge: Any) -> Weights:
    """Lift the merging of one group to weights; what is not floating point is the pre-trained model's."""
    base = problem.pretrained

    def read(name: str) -> Tensor:
        return merge(problem.group(name)) if base.dtype(name).is_floating_point else base[name]

    return base.derived(read, "merged")

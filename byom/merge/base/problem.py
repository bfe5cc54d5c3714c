"""The problem that is merged: the models, parameter by parameter, their statistics and inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from byom.errors import CheckpointError, OptionError, WeightsMismatch
from byom.functional.tensors import wide, widened
from byom.merge.base.probe import Probe
from byom.merge.base.running import averaged
from byom.weights import Weights
from byom.weights.align import aligned
from byom.weights.match import apart
from byom.weights.watched import watched

BLOCK = 1 << 18  # elements of one parameter merged at a time: bounds temporaries, and stays near the caches
FAR_BLOCK = 1 << 24  # the same on an accelerator, whose kernels take longer to start than to run on less


@dataclass(frozen=True)
class Group:
    """One parameter in every model.

    Args:
        name: The parameter's name.
        pretrained: ``[*shape]``.
        experts: One ``[*shape]`` tensor per task, in the problem's task order.
        statistics: Statistic name to ``[T, ...]``.
        dtype: What the merged values are going to be rounded to, which `blockwise` may do piece by piece; None keeps
            them as they are computed.
    """

    name: str
    pretrained: Tensor
    experts: tuple[Tensor, ...]
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    dtype: torch.dtype | None = None

    @property
    def precision(self) -> torch.dtype:
        """The type of the fine-tuned values in arithmetic: fp32, or fp64 if any of them is."""
        return reduce(torch.promote_types, [widened(expert.dtype) for expert in self.experts])

    @property
    def finetuned(self) -> Tensor:
        """The fine-tuned values ``[T, *shape]`` in fp32 (fp64 for fp64 models)."""
        shape, device = self.pretrained.shape, self.pretrained.device
        stacked = torch.empty(len(self.experts), *shape, dtype=self.precision, device=device)
        for row, expert in zip(stacked.unbind(0), self.experts, strict=True):
            row.copy_(expert)  # widened on the way, with no copy in between
        return stacked

    @property
    def deltas(self) -> Tensor:
        """The task vectors ``[T, *shape]``, both sides cast to fp32 (fp64 for fp64 models) before subtracting."""
        stacked = self.finetuned
        return stacked.sub_(wide(self.pretrained))

    def total(self, weights: Sequence[float] = ()) -> Tensor:
        """Sum the fine-tuned values over tasks, one after the other, holding one task's beside the sum.

        Args:
            weights: One per task; empty weighs each 1.

        Returns:
            ``[*shape]``, the bits of `byom.functional.deltas.total` of the stack.
        """
        return self._sum(None, weights)

    def moved(self, scale: float, weights: Sequence[float] = ()) -> Tensor:
        """Return ``theta_0 + scale * sum_t w_t tau_t``, holding the task vector of one task at a time.

        Args:
            scale: Any real number (lambda).
            weights: One per task (w); empty weighs each 1.

        Returns:
            ``[*shape]``, the bits that the stack of task vectors gives.
        """
        base = wide(self.pretrained)
        change = self._sum(base, weights).mul_(scale)
        return change.add_(base) if change.dtype == base.dtype else base + change

    def _sum(self, origin: Tensor | None, weights: Sequence[float]) -> Tensor:
        whole, spare = None, None
        for expert, weight in zip(self.experts, weights or [None] * len(self.experts), strict=True):
            row = torch.empty_like(self.pretrained, dtype=self.precision) if spare is None else spare
            if origin is not None and expert.dtype == row.dtype == origin.dtype:
                torch.sub(expert, origin, out=row)
            else:
                row.copy_(expert)
                row = row if origin is None else row.sub_(origin)
            row = row if weight is None else row.mul_(weight)
            if whole is None:
                whole = row
            else:
                whole, spare = whole.add_(row), row
        assert whole is not None, "a problem has at least one task"
        return whole

    def blocks(self, size: int | None = None) -> Iterator[tuple[int, Group]]:
        """Yield ``(offset, group)`` for flat pieces of at most `size` elements; views, nothing is copied.

        Statistics of the parameter's shape are cut with it, others are left out.

        Args:
            size: Elements of a piece; None takes `BLOCK`, or `FAR_BLOCK` on an accelerator.
        """
        size, shape = size or _block(self.pretrained), self.pretrained.shape
        flat = [tensor.reshape(-1) for tensor in (self.pretrained, *self.experts)]
        fitting = {kind: rows for kind, rows in self.statistics.items() if rows.shape[1:] == shape}
        rows = {kind: rows.reshape(len(rows), flat[0].numel()) for kind, rows in fitting.items()}
        for start in range(0, flat[0].numel(), size):
            piece = [tensor[start : start + size] for tensor in flat]
            cut = {kind: tensor[:, start : start + size] for kind, tensor in rows.items()}
            yield start, Group(self.name, piece[0], tuple(piece[1:]), cut)


@dataclass(frozen=True)
class Member:
    """One of several solutions of a task.

    Args:
        weights: The solution.
        statistics: Statistic name to weights-like values, computed for this solution.
    """

    weights: Weights
    statistics: Mapping[str, Weights] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """Models that are to be merged.

    Args:
        pretrained: theta_0.
        finetuned: Task name to theta_t, all with the names and shapes of theta_0.
        statistics: Statistic name to task name to weights-like values.
        members: Task name to further solutions of the task, the first being theta_t itself; for mixtures.
        probe: The tasks' inputs, for methods that look at them.

    Tensors that some models tie and others do not are two in all of them, and copies of one tensor that are equal in
    every model are one, so that they stay equal.

    Raises:
        CheckpointError: If `finetuned` is empty, or names, shapes or devices differ.
    """

    pretrained: Weights
    finetuned: Mapping[str, Weights]
    statistics: Mapping[str, Mapping[str, Weights]] = field(default_factory=dict)
    members: Mapping[str, Sequence[Member]] = field(default_factory=dict)
    probe: Probe | None = None

    def __post_init__(self) -> None:
        if not self.finetuned:
            raise CheckpointError("there is no fine-tuned model to merge; give at least one task")
        pretrained, finetuned = aligned(self.pretrained, self.finetuned)
        object.__setattr__(self, "pretrained", pretrained)
        object.__setattr__(self, "finetuned", finetuned)

    @property
    def tasks(self) -> list[str]:
        """Task names, in the order of every ``[T, ...]`` axis."""
        return list(self.finetuned)

    def settled(self) -> Problem:
        """Return the problem that is merged: all models have the average of the experts' running statistics."""
        agreed = averaged(list(self.finetuned.values()))
        if agreed(self.pretrained) is self.pretrained:
            return self
        finetuned = {task: agreed(expert) for task, expert in self.finetuned.items()}
        members = {t: [Member(agreed(m.weights), m.statistics) for m in each] for t, each in self.members.items()}
        return replace(self, pretrained=agreed(self.pretrained), finetuned=finetuned, members=members)

    def watched(self, callback: Callable[[int], None]) -> Problem:
        """Return the same problem, whose models call back with the bytes of each tensor that is read.

        Planning reads all models `PlannedMethod.passes` times, and reading the merged model once more.

        Args:
            callback: See `byom.weights.watched.watched`.
        """
        seen = copy(self)  # not replace, which would compare the models again
        object.__setattr__(seen, "pretrained", watched(self.pretrained, callback))
        object.__setattr__(seen, "finetuned", {t: watched(each, callback) for t, each in self.finetuned.items()})
        return seen

    def inputs(self) -> Probe:
        """Return the probe.

        Raises:
            OptionError: If the problem has none.
        """
        if self.probe is None:
            raise OptionError(
                "this method looks at inputs of the tasks, and the problem has none; run it through the pipeline "
                "(byom run merge=... suite=...), or give Problem(..., probe=...)"
            )
        return self.probe

    def group(self, name: str, *, checked: bool = True) -> Group:
        """Read one parameter of every model, refusing NaN and infinity.

        Args:
            name: The parameter's name.
            checked: Whether they are refused in experts; in the pre-trained model and in statistics they are anyway.
        """
        pretrained = self.pretrained.read_finite(name)
        experts = tuple(each.read_finite(name) if checked else each[name] for each in self.finetuned.values())
        for task, expert in zip(self.tasks, experts, strict=True):
            if expert.device != pretrained.device:
                here, there = (self.pretrained.origin, pretrained), (self.finetuned[task].origin, expert)
                raise WeightsMismatch(apart(name, *((origin, value.device) for origin, value in (here, there))))
        return Group(name, pretrained, experts, self._statistics(name, pretrained.device))

    def uncovered(self, statistic: str) -> list[str]:
        """Name the mergeable parameters for which some task lacks a statistic, such as floating-point buffers."""
        by_task = self.statistics[statistic]
        return [name for name in self.pretrained.mergeable() if any(name not in by_task[task] for task in self.tasks)]

    def _statistics(self, name: str, device: torch.device) -> dict[str, Tensor]:
        return {
            kind: torch.stack([by_task[task].read_finite(name) for task in self.tasks]).to(device)
            for kind, by_task in self.statistics.items()
            if all(name in by_task[task] for task in self.tasks)
        }


def _block(tensor: Tensor) -> int:
    return BLOCK if tensor.device.type == "cpu" else FAR_BLOCK


def blockwise(group: Group, merge: Any, *, final: bool = False) -> Tensor:
    """Merge a parameter piece by piece.

    Args:
        group: The parameter in every model.
        merge: Function of (flat offset, flat piece) that returns the merged piece.
        final: Whether these are the merged values with which no one computes further. Then each piece is rounded to
            ``group.dtype``, if there is one, while it is in the caches.

    Returns:
        ``[*shape]`` merged values.
    """
    dtype = (group.dtype if final else None) or widened(group.pretrained.dtype)
    merged = torch.empty(group.pretrained.numel(), dtype=dtype, device=group.pretrained.device)
    for start, piece in group.blocks():
        merged[start : start + piece.pretrained.numel()] = merge(start, piece)
    return merged.reshape(group.pretrained.shape)


def rowwise(group: Group, merge: Callable[[Group], Tensor]) -> Tensor:
    """Merge a parameter by pieces of whole rows along its last axis, about `BLOCK` elements each.

    Args:
        group: The parameter in every model, not 0-dim.
        merge: Function of a piece ``[rows, width]``, without statistics.

    Returns:
        ``[*shape]`` merged values.
    """
    shape = group.pretrained.shape
    merged = torch.empty(shape, dtype=widened(group.pretrained.dtype), device=group.pretrained.device)
    if not merged.numel():
        return merged
    models = [tensor.reshape(-1, shape[-1]) for tensor in (group.pretrained, *group.experts)]
    rows, step = merged.reshape(-1, shape[-1]), max(1, _block(group.pretrained) // shape[-1])
    for start in range(0, len(rows), step):
        pretrained, *experts = (model[start : start + step] for model in models)
        rows[start : start + step] = merge(Group(group.name, pretrained, tuple(experts)))
    return merged

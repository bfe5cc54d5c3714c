"""The problem that is merged: the models, parameter by parameter, their statistics and inputs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from byom.errors import CheckpointError, OptionError, WeightsMismatch, listed
from byom.merge.base.group import Group
from byom.merge.base.probe import Probe
from byom.merge.base.running import averaged
from byom.weights import Weights
from byom.weights.align import aligned
from byom.weights.match import apart
from byom.weights.placed import beside, brought, fitting, home, placed, room
from byom.weights.spec import CPU
from byom.weights.watched import watched


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

    def only(self, tasks: Sequence[str]) -> Problem:
        """Return the problem of some of its tasks, whose models keep the ties that all tasks' models agree on.

        Args:
            tasks: Their names, in the order of the new problem.
        """
        some = copy(self)  # not replace, which would compare the models again
        object.__setattr__(some, "finetuned", {task: self.finetuned[task] for task in tasks})
        return some

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

    def on(self, device: torch.device | str) -> Problem:
        """Return the same problem, which is merged on a device: ``method(problem.on("cuda")).save(folder)``.

        Tensors go there when they are read, the next one while this one is merged. What a method or a variant makes of
        them comes back to where the experts lie. A tensor of which all models do not fit there together is merged where
        it lies.

        Args:
            device: The device.

        Returns:
            The problem; itself if its models lie there.
        """
        device, models = torch.device(device), [self.pretrained, *self.finetuned.values()]
        if device == CPU and all(each.place(name) in (CPU, None) for each in models for name in each.canonical()):
            return self
        models += [member.weights for each in self.members.values() for member in each]
        place = fitting(models, device, room(device))
        if (beyond := [n for n in self.pretrained.mergeable() if place(n).type != device.type]) and device != CPU:
            warnings.warn(
                f"{len(beyond)} of {len(self.pretrained.mergeable())} tensors do not fit on {device} with those of all "
                f"models and are merged on the CPU: {listed(beyond)}; fewer models at a time need less",
                stacklevel=2,
            )
        there = copy(self)  # not replace, which would compare the models again
        object.__setattr__(there, "pretrained", placed(self.pretrained, place))
        object.__setattr__(there, "finetuned", {t: placed(each, place) for t, each in self.finetuned.items()})
        members = {t: [Member(placed(m.weights, place), m.statistics) for m in e] for t, e in self.members.items()}
        object.__setattr__(there, "members", members)
        return self if there.pretrained is self.pretrained else there

    def here(self, weights: Weights) -> Weights:
        """Return weights whose tensors come to where those of the problem's models are computed with; see `on`."""
        return weights if home(self.pretrained) is self.pretrained else beside(weights, self.pretrained)

    def back(self, weights: Weights) -> Weights:
        """Return weights whose tensors come back to where the models lay before `on`."""
        source = home(self.pretrained)
        return weights if source is self.pretrained else brought(weights, lambda name: source.place(name) or CPU)

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

"""The interfaces that a merge method may implement: one parameter at a time, or after a plan of the whole model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, ClassVar

import torch
from torch import Tensor

from byom.errors import OptionError
from byom.functional.tensors import finite
from byom.merge.base.group import Group, blockwise
from byom.merge.base.needs import Needs
from byom.merge.base.problem import Problem
from byom.merge.base.running import running
from byom.merge.base.together import Together
from byom.weights import Weights
from byom.weights.lowrank import Adapted
from byom.weights.placed import within_memory
from byom.weights.spec import Rounding

BY_TASK = ("weights", "densities")
"""Hyperparameters that hold one value per task, by the names that all methods give them."""


@dataclass(frozen=True)
class MergeMethod(ABC):
    """A merge method: a frozen dataclass of hyperparameters, called on a `Problem`."""

    grid: ClassVar[Mapping[str, tuple[float, ...]]] = {}
    """Values that ``tune=validation`` tries, by hyperparameter: the grid that its authors searched."""
    title: ClassVar[str]
    """Name in tables."""
    merges: ClassVar[bool] = True
    """True where it makes a model of its own; otherwise the result is theta_0 itself."""
    previews: ClassVar[bool] = False
    """True where its `weights` stand for those of the tasks' losses in joint fine-tuning, which it previews."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__call__" in cls.__dict__:
            cls.__call__ = _returning(cls.__call__)  # pyright: ignore[reportAttributeAccessIssue]

    @abstractmethod
    def __call__(self, problem: Problem) -> Weights:
        """Merge lazily: reading a tensor of the result merges that tensor.

        A method that does not leave this to a base class merges ``problem.settled()``, so that running statistics are
        averaged.
        """

    @property
    def needs(self) -> Needs:
        """The input that it cannot work without besides weights; a wrapper adds the needs of the wrapped method."""
        return Needs()

    @property
    def scales_sum(self) -> bool:
        """True where `scale` multiplies a sum over the tasks, which grows with their number, and not a mean."""
        return False

    def among(self, tasks: Sequence[str], every: Sequence[str]) -> MergeMethod:
        """Return the method for some of the tasks that it was chosen for.

        Args:
            tasks: The names of some tasks, in the order in which they are going to be merged.
            every: The names of all, in the order of hyperparameters that hold one value per task.

        Returns:
            The method with these tasks' own values, and the factor on the mean of the task vectors that it has for all.
        """
        places = [every.index(task) for task in tasks]
        held = {name: getattr(self, name, ()) for name in BY_TASK}
        fewer: dict[str, Any] = {name: tuple(each[place] for place in places) for name, each in held.items() if each}
        if self.scales_sum and len(tasks) != len(every):
            fewer["scale"] = getattr(self, "scale", 1.0) * len(every) / len(tasks)
        return replace(self, **fewer) if fewer else self

    def fallbacks(self, problem: Problem) -> list[str]:
        """Name what gets a simpler rule than the method's own, running statistics included; the record lists it."""
        simpler = self.simpler(problem)
        return [*simpler, *(name for name in running(problem.pretrained) if self.merges and name not in simpler)]

    def simpler(self, problem: Problem) -> list[str]:
        """Name the parameters that get a simpler rule than the method's own."""
        return []

    def low_rank(self, problem: Problem) -> Adapted:
        """Merge into low-rank differences to theta_0, which can be written as one adapter.

        The values are those of a call, up to rounding in fp32, which its parameters have whatever theta_0's dtype.

        Args:
            problem: Models of which every expert is a low-rank difference to theta_0 (`byom.weights.lowrank.Adapted`).

        Raises:
            OptionError: If the method's result has no low rank, or some expert is not known as one.
        """
        raise OptionError(
            f"the result of {self.title} is no low-rank difference, so it cannot be written as an adapter; choose "
            "merge=task_arithmetic, average, knots or core_space, or write the merged model whole"
        )

    def check(self, problem: Problem) -> None:
        """Refuse a problem that lacks what the method needs.

        Raises:
            OptionError: Naming what is missing and the command that makes it, or task weights of another number than
                the tasks.
        """
        name, needs = type(self).__name__, self.needs
        weights = getattr(self, "weights", ())  # of the methods that weigh tasks, all by this name
        if weights and len(weights) != len(problem.tasks):
            raise OptionError(
                f"merge.weights has {len(weights)} values for {len(problem.tasks)} tasks "
                f"({', '.join(problem.tasks)}); give one per task, in this order"
            )
        if missing := sorted(needs.statistics - set(problem.statistics)):
            raise OptionError(
                f"{name} needs the statistics {missing}, which the problem lacks; byom statistics {missing[0]} "
                "suite=... computes and keeps them, and byom run does so by itself"
            )
        if needs.joint or (needs.inputs and not needs.statistics):  # statistics are what inputs were needed for
            problem.inputs()
        short = [t for t in problem.tasks if needs.members > 1 and len(problem.members.get(t, ())) < needs.members]
        if short:
            raise OptionError(
                f"{name} merges {needs.members} models per task, and task '{short[0]}' has fewer; give "
                "Problem(..., members=...), or byom run trains them"
            )


def _returning(call: Callable[[Any, Problem], Weights]) -> Callable[[Any, Problem], Weights]:
    """Return a method's call whose result comes back to where the models lie, wherever they were merged."""

    @wraps(call)
    def called(self: MergeMethod, problem: Problem) -> Weights:
        with within_memory(f"merging by {type(self).__name__}"):
            merged = call(self, problem)
        return problem.back(merged)

    return called


@dataclass(frozen=True)
class TensorwiseMethod(MergeMethod):
    """A method that merges each parameter on its own, in flat blocks when it acts on each element alone."""

    elementwise: ClassVar[bool] = True
    exposing: ClassVar[bool] = False
    """True where a NaN or infinity of any expert makes the result NaN or infinite there, whatever the others hold; so
    one look at the result is enough to know that all experts are finite."""

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
        settled = problem.settled() if self.merges else problem
        return lazily(settled, self._whole, exposing=self.exposing, together=not self.elementwise)

    def _whole(self, group: Group) -> Tensor:
        if not self.elementwise:
            return self.merge(group)
        return blockwise(group, lambda _, piece: self.merge(piece), final=True)


@dataclass(frozen=True)
class PlannedMethod(MergeMethod):
    """A method that streams over all parameters once or twice before it can merge any of them."""

    exposing: ClassVar[bool] = False
    """See `TensorwiseMethod.exposing`."""

    @property
    def passes(self) -> int:
        """Number of times that `plan` reads all models; for showing how far it is."""
        return 1

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
        problem = problem.settled()
        plan = self.plan(problem)
        return lazily(problem, lambda group: self.merge(group, plan), exposing=self.exposing)


def lazily(
    problem: Problem, merge: Callable[[Group], Tensor], *, exposing: bool = False, together: bool = False
) -> Weights:
    """Lift the merging of one group to weights; what is not floating point is the pre-trained model's.

    Args:
        problem: The models.
        merge: Merges one parameter.
        exposing: See `TensorwiseMethod.exposing`.
        together: Whether several tensors may be merged at once; see `Together`. It is for methods whose work on one
            does not spread over threads.

    Returns:
        Weights that merge a tensor when it is read.
    """
    base = problem.pretrained

    def merged(name: str, dtype: torch.dtype | None = None) -> Tensor:
        value = merge(replace(problem.group(name, checked=not exposing), dtype=dtype))
        if exposing and value.numel() and not finite(value):
            problem.group(name)  # which says in which model a value is not finite, if it is not the sum that is
        return value

    whole = Together(problem, merged) if together else merged

    def read(name: str) -> Tensor:
        return whole(name) if base.merges(name) else base[name]

    def rounded(name: str) -> Tensor | None:
        dtype = base.dtype(name)
        if dtype.itemsize == 1 or not base.merges(name):  # 8 bits saturate, and hide what is beyond them
            return None
        value = (whole(name) if together else merged(name, dtype)).to(dtype)
        return value if not value.numel() or finite(value) else None  # read again to say which value is at fault

    return base.derived(Rounding(read, rounded), "merged")

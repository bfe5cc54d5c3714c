"""The interface of BYOM variants: pack one task's difference to a reference, and put it back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, TypeGuard

from torch import Tensor

from byom.errors import WeightsMismatch
from byom.functional.tensors import WIDER_BASE, finite, narrowed
from byom.merge.base import MergeMethod, Problem
from byom.merge.base.needs import Needs
from byom.merge.base.running import is_running
from byom.variants.base.delta import Delta, Parts, Served, Shared, Unpacker, own, require_base
from byom.weights import Weights, matched
from byom.weights.lowrank import Adapted
from byom.weights.match import require_one_place
from byom.weights.placed import beside, within_memory


@dataclass(frozen=True)
class Variant(Unpacker):
    """A frozen dataclass of hyperparameters that turns N models into shared ones and a little of each task."""

    stores: ClassVar[str]
    """Contents of what is stored for each task, in words, for the table of variants."""
    merges: ClassVar[bool] = False
    """True where it merges some of the tasks by the method that it is given; see `merged_by`."""
    low_rank: ClassVar[bool] = False
    """True where what is packed may be low-rank factors, which PEFT adapters hold (``byom export``)."""

    @property
    def needs(self) -> Needs:
        """Requirements besides weights."""
        return Needs()

    @property
    def before(self) -> Preparation | None:
        """Preparation of the fine-tuned models before they are merged; None leaves them alone."""
        return None

    def merged_by(self, method: MergeMethod) -> Variant:
        """Return the variant for a reference that a method merged.

        Args:
            method: The method, with the hyperparameters that were chosen.

        Returns:
            This variant, or one that merges some of the tasks by the same method.
        """
        return self

    @abstractmethod
    def serve(self, problem: Problem, reference: Weights) -> Served:
        """Make what serves every task.

        Args:
            problem: The models, as they were fine-tuned (not as `before` prepared them).
            reference: The merged model, or theta_0, as `on` says.

        Returns:
            Shared models and one packed difference per task.

        Raises:
            OptionError: If the problem lacks what the variant needs.
            CheckpointError: If a value is not finite.
        """

    def streamed(self, problem: Problem, reference: Weights) -> Served:
        """Return what `serve` returns, for a reader that takes every task once and keeps none.

        Args:
            problem: The models.
            reference: theta_merged or theta_0.

        Returns:
            Shared models and differences, which a `PackingVariant` packs when they are asked for.
        """
        return self.serve(problem, reference)


class Preparation(ABC):
    """A frozen dataclass that changes a problem before it is merged, such as by pruning its task vectors."""

    @abstractmethod
    def __call__(self, problem: Problem) -> Problem:
        """Return the changed problem; lazy."""


@dataclass(frozen=True)
class PackingVariant(Variant):
    """A variant that packs ``theta_t`` against a reference it does not choose, one task and parameter at a time."""

    def plan(self, target: Weights, reference: Weights, base: Weights | None = None) -> Any:
        """Find what has to be known about the whole difference before one parameter can be packed."""
        return None

    @property
    def refuses(self) -> bool:
        """True where `plan` has refused a target or reference with a value that is not finite: no second look then."""
        return False

    @property
    def passes(self) -> int:
        """How many times packing reads every fine-tuned model."""
        return 1 + (type(self).plan is not PackingVariant.plan)

    def foresee(self, targets: Sequence[Weights], reference: Weights) -> None:
        """Find together what `plan` finds of each task, where that takes less time; it is never needed.

        Args:
            targets: theta_t of every task, with the names and ties of the reference.
            reference: theta_merged or theta_0.
        """

    @abstractmethod
    def pack(self, name: str, target: Tensor, shared: Shared, plan: Any) -> Parts:
        """Pack one parameter.

        Args:
            name: The parameter's name.
            target: ``[*shape]`` fine-tuned values.
            shared: The parameter in the shared models.
            plan: What `plan` returned.

        Returns:
            Dense tensors to store, empty if nothing is put back. Floating-point parts count as parameters, others
            (positions, masks) as bytes only.
        """

    def shrink(self, parts: Parts, read: Callable[[], Tensor]) -> Parts:
        """Return what is stored of the parts that `pack` or `pack_factors` made; `Unpacker.expand` turns it back.

        Args:
            parts: What was packed of one parameter.
            read: Returns the parameter in the reference.

        Returns:
            Dense tensors; the parts themselves unless the variant stores them in fewer bytes.
        """
        return parts

    def suited(self, problem: Problem, reference: Weights) -> PackingVariant:
        """Return the variant that packs these tasks: this one, or one that depends on how many or what they are."""
        return self

    def serve(self, problem: Problem, reference: Weights) -> Served:
        """Pack every task; see `Variant.serve`."""
        lazy = self.streamed(problem, reference)
        return Served(lazy.reference, dict(lazy.deltas), lazy.base)

    def streamed(self, problem: Problem, reference: Weights) -> Served:
        """Pack a task each time its difference is asked for; see `Variant.streamed`.

        Saving that as a bundle holds one packed difference at a time, whatever the number of tasks.
        """
        base, there = problem.pretrained if self.shares_base else None, problem.here(reference)
        require_one_place(problem.pretrained, there)
        packing = Packing(self.suited(problem, reference), problem.finetuned, there, base)
        return Served(problem.back(reference), packing, base and problem.back(base))

    def delta(self, target: Weights, reference: Weights, base: Weights | None = None) -> Delta:
        """Pack one task's difference.

        Args:
            target: theta_t.
            reference: theta_merged or theta_0.
            base: theta_0, for variants that share it in addition to a merged reference.

        Returns:
            The packed difference.

        Raises:
            CheckpointError: If names or shapes differ or a value is not finite.
            OptionError: If the variant needs theta_0 and has none.
        """
        require_base(self, base)
        target, reference, *shared = matched(target, reference, *([] if base is None else [base]))
        base = shared[0] if shared else None
        if isinstance(self, PacksFactors) and adapts(target, reference):
            require_finite(target, reference)
            factors = self.pack_factors(target, reference)
            packed = {n: self.shrink(parts, lambda n=n: reference[n]) for n, parts in factors.items()}
        else:
            packed = self._pack_entries(target, reference, base)
        stored = {name: parts for name, parts in packed.items() if parts}
        return Delta(self, stored, {name: target.shape(name) for name in stored})

    def _pack_entries(self, target: Weights, reference: Weights, base: Weights | None) -> dict[str, Parts]:
        plan, packed = self.plan(target, reference, base), {}
        read = Weights.__getitem__ if self.refuses else Weights.read_finite
        for name in target.mergeable():
            shared = Shared(read(reference, name), base.read_finite(name) if base else None)
            values = read(target, name)
            narrowed(values, reference.dtype(name), f"{target.origin}: tensor '{name}'", WIDER_BASE)
            packed[name] = own(values, shared) if is_running(name) else self._packed(name, values, shared, plan)
        return packed

    def _packed(self, name: str, target: Tensor, shared: Shared, plan: Any) -> Parts:
        return self.shrink(self.pack(name, target, shared, plan), lambda: shared.reference)


class PacksFactors(ABC):
    """The part of a `PackingVariant` that packs adapters from their factors, without forming the products."""

    @abstractmethod
    def pack_factors(self, target: Adapted, reference: Weights) -> dict[str, Parts]:
        """Pack one task's adapter; `PackingVariant.pack` is for tasks whose differences are known entry by entry.

        Args:
            target: theta_t, known as low-rank differences to `reference`; all of its values are finite.
            reference: theta_0 or theta_merged, as `PackingVariant.on` says.

        Returns:
            Parameter name to dense tensors to store, in the order in which they are stored.
        """


@dataclass(frozen=True)
class Packing(Mapping[str, Delta]):
    """The packed differences of several tasks, each packed when it is asked for.

    Args:
        variant: How a difference is packed.
        finetuned: Task name to theta_t.
        reference: theta_merged or theta_0.
        base: theta_0, for variants that share it in addition to a merged reference.
    """

    variant: PackingVariant
    finetuned: Mapping[str, Weights]
    reference: Weights
    base: Weights | None = None

    def __getitem__(self, task: str) -> Delta:
        target = self.finetuned[task]
        reference = beside(self.reference, target)  # also what was written meanwhile, and is read from a file
        if reference is self.reference:
            _ = self._foreseen
        base = self.base and beside(self.base, target)
        with within_memory(f"packing '{task}'"):
            return self.variant.delta(target, reference, base)

    @cached_property
    def _foreseen(self) -> bool:
        """Look at all tasks together once, where `delta` is going to meet the same weights."""
        given = [self.reference, *self.finetuned.values()]
        try:
            same = all(one is other for one, other in zip(given, matched(*given), strict=True))
        except WeightsMismatch:  # `delta` says of which task
            return False
        if same:
            self.variant.foresee(given[1:], self.reference)
        return same

    def __contains__(self, task: object) -> bool:
        return task in self.finetuned  # the inherited one would pack the task

    def __iter__(self) -> Iterator[str]:
        return iter(self.finetuned)

    def __len__(self) -> int:
        return len(self.finetuned)


def adapts(target: Weights, reference: Weights) -> TypeGuard[Adapted]:
    """Say whether a task's difference to the reference is known as thin factors."""
    return isinstance(target, Adapted) and target.on(reference)


def require_finite(target: Adapted, reference: Weights) -> None:
    """Refuse NaN and infinity in an adapter and in the model below it, without forming the adapter's products.

    Raises:
        CheckpointError: If a value is not finite.
    """
    for name in reference.mergeable():
        reference.read_finite(name)
        factors = [factor for piece in target.pieces(name) for factor in (piece.left, piece.right) if factor.numel()]
        if name in target.replaced or not all(map(finite, factors)):
            target.read_finite(name)

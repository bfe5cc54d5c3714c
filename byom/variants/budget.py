"""BYOM-Budget: the best difference for a number of bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Literal

from torch import Tensor

from byom.errors import OptionError, one_of, positive
from byom.functional.hull import allocate
from byom.merge.base import Problem
from byom.merge.base.needs import Needs
from byom.merge.base.running import is_running
from byom.variants.base import PackingVariant, Parts, Shared, joined
from byom.variants.base.damage import Damage, FromInputs, FromTask
from byom.variants.base.delta import Delta, Served, own
from byom.variants.base.variant import Packing
from byom.variants.base.written import BYTE, TaskDifference, put_back
from byom.weights import Weights, matched


@dataclass(frozen=True)
class ByomBudget(PackingVariant):
    """Spend a number of bytes on each task's difference to a shared model where they do the most.

    Every tensor of ``D = theta_t - reference`` can be written at many levels: as singular vectors rounded to multiples
    of a step, as entries rounded so, as both, with finer and finer steps, or as the task's own values; a range coder
    takes little more than the entropy of the integers. A level costs bits and leaves an error E of the damage
    ``d = w ||E L||^2``. Each tensor keeps the lower convex hull of its levels, and bytes go where a bit saves the
    most damage (`byom.functional.hull.allocate`): no other choice leaves less damage for as many bytes.

    ``L Lᵀ`` stands for the second moment of what the layer multiplies, with a mean diagonal of 1. Without inputs it is
    ``tau_tᵀ tau_t`` and w is 1; on the pre-trained model, where that is the difference itself, L is the identity. With
    inputs it is their own, and w the Fisher information of the tensor where it changed, so that the damage stands for
    the divergence of the answers from those of ``theta_t``.

    Args:
        kilobytes: What a task may take, in 1000 bytes, names and shapes included.
        reference: ``merged`` or ``pretrained``: the shared model that differences are taken to.
        inputs: ``none``, or ``train``: a few unlabelled inputs weigh the damage (statistics ``fisher`` and ``gram``).
        metric: ``moments``, the damage as above, or ``identity``: plain squared errors (L is the identity, w is 1).
        seed: Seeds the search for singular vectors of large matrices.

    Raises:
        OptionError: If a hyperparameter is out of range, the bytes do not suffice for running statistics, or inputs
            are asked for that ``identity`` would ignore.

    References:
        Ours, to be read beside optimal bit allocation over convex hulls: Shoham and Gersho, Efficient Bit Allocation
        for an Arbitrary Set of Quantizers. https://doi.org/10.1109/29.90373
    """

    kilobytes: float = 300.0
    reference: Literal["merged", "pretrained"] = field(default="merged", kw_only=True)
    inputs: Literal["none", "train"] = field(default="none", kw_only=True)
    metric: Literal["moments", "identity"] = field(default="moments", kw_only=True)
    seed: int = field(default=0, kw_only=True)

    title = "BYOM-Budget"
    stores = "quantised singular vectors and entries, as many as the bytes allow"
    joined = True

    @property
    def on(self) -> Literal["merged", "pretrained"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The model that differences are taken to, an option here."""
        return self.reference

    def __post_init__(self) -> None:
        positive("byom.kilobytes", self.kilobytes, "300")
        one_of("byom.reference", self.reference, ("merged", "pretrained"))
        one_of("byom.inputs", self.inputs, ("none", "train"))
        one_of("byom.metric", self.metric, ("moments", "identity"))
        if self.metric == "identity" and self.inputs != "none":
            raise OptionError(
                f"byom.metric=identity weighs errors by nothing, so byom.inputs={self.inputs} would be ignored; use "
                "byom.inputs=none, or byom.metric=moments"
            )

    @property
    def needs(self) -> Needs:
        """Training inputs without their labels, where they weigh the damage."""
        if self.inputs == "none":
            return Needs()
        return Needs(statistics=frozenset({"fisher", "gram"}), inputs=frozenset({self.inputs}))

    def streamed(self, problem: Problem, reference: Weights) -> Served:
        """Pack a task each time its difference is asked for; see `Variant.streamed`."""
        served = super().streamed(problem, reference)
        if self.metric == "identity" or (self.inputs == "none" and self.reference == "pretrained"):
            return served  # of the pre-trained model the task vector is all there is
        if self.inputs == "none":
            return self._weighed(served, self._from_tasks(problem))
        if missing := sorted(self.needs.statistics - set(problem.statistics)):
            raise self._lacks(missing)
        fisher, gram = problem.statistics["fisher"], problem.statistics["gram"]
        return self._weighed(served, {task: FromInputs(fisher[task], gram[task]) for task in problem.tasks})

    def _weighed(self, served: Served, damages: Mapping[str, Damage]) -> Served:
        packing = served.deltas
        assert isinstance(packing, Packing)  # see PackingVariant.streamed
        weighed = _Weighed(packing.variant, packing.finetuned, packing.reference, packing.base, damages=damages)
        return Served(served.reference, weighed, served.base)

    def _from_tasks(self, problem: Problem) -> dict[str, Damage]:
        """Return damages by the task vectors, of the tasks that have the names and shapes of theta_0."""
        matches = {task: matched(each, problem.pretrained) for task, each in problem.finetuned.items()}
        return {task: FromTask(target, base) for task, (target, base) in matches.items()}

    def plan(self, target: Weights, reference: Weights, base: Weights | None = None) -> dict[str, Parts]:
        """Find the level of every tensor and write it; what is held is what will be stored."""
        room = self.kilobytes * 1000 * BYTE
        difference = TaskDifference(target, reference, self._damage, self.seed)
        shapes = {name: target.shape(name) for name in target.mergeable()}
        written: dict[tuple[str, int], Parts] = {}
        running = _running(target, reference)  # stored whole whatever the budget
        allowed = room - BYTE * _bytes(running)
        hulls = difference.hulls(allowed)
        while True:  # once for the levels alone, once more less what their names take, seldom again
            chosen = dict(zip(hulls, allocate([hull.levels for hull in hulls.values()], allowed), strict=True))
            for name, at in chosen.items():
                if (name, at) not in written:
                    written[name, at] = difference.stored(name, hulls[name].ways[at], hulls[name].products[at])
            parts = {name: written[name, at] for name, at in chosen.items()}
            over = BYTE * _stored(parts | running, shapes) - room
            if over <= 0:
                return parts
            if allowed <= 0:
                raise OptionError(
                    f"byom.kilobytes={self.kilobytes:g} is less than running statistics and an empty list of names "
                    "take; give more"
                )
            allowed = max(0, allowed - over)

    def pack(self, name: str, target: Tensor, shared: Shared, plan: dict[str, Parts]) -> Parts:
        """Store what was written of one parameter."""
        return plan[name]

    def unpack(self, parts: Parts, shared: Shared) -> Tensor:
        """Add the difference to the reference, or put all values back."""
        return put_back(parts, shared.reference)

    @property
    def _damage(self) -> Damage | None:
        if self.inputs != "none":  # `delta` alone, of models without a problem
            raise self._lacks(sorted(self.needs.statistics))
        return None

    def _lacks(self, missing: list[str]) -> OptionError:
        return OptionError(
            f"byom.inputs={self.inputs} needs the statistics {missing}, which the problem lacks; byom statistics "
            f"{missing[0]} suite=... computes and keeps them, and byom run does so by itself"
        )


@dataclass(frozen=True)
class _Informed(ByomBudget):
    """The variant while it packs a task whose metric is known."""

    damage: Damage | None = field(default=None, kw_only=True)

    @property
    def _damage(self) -> Damage | None:
        return self.damage


@dataclass(frozen=True)
class _Weighed(Packing):
    """Packed differences, each in the metric of its task.

    Args:
        damages: Task to the metric of its errors.
    """

    damages: Mapping[str, Damage] = field(kw_only=True)

    def __getitem__(self, task: str) -> Delta:
        options = {each.name: getattr(self.variant, each.name) for each in fields(self.variant)}
        informed = _Informed(**options, damage=self.damages[task])
        return replace(Packing(informed, self.finetuned, self.reference, self.base)[task], variant=self.variant)


def _running(target: Weights, reference: Weights) -> dict[str, Parts]:
    """Return what is stored of running statistics."""
    names = [name for name in target.mergeable() if is_running(name)]
    return {name: own(target[name], Shared(reference[name])) for name in names}


def _bytes(parts: Mapping[str, Parts]) -> int:
    return sum(tensor.nbytes for each in parts.values() for tensor in each.values())


def _stored(parts: Mapping[str, Parts], shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the bytes of a packed difference, names and shapes included."""
    some = {name: parts[name] for name in shapes if parts[name]}  # in the order of the file, which compresses them
    return len(joined.index(some, {name: shapes[name] for name in some})) + _bytes(some)

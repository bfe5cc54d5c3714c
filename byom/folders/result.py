"""The merged weights of a request: a method on the part that is merged, everything else as it was asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from byom.errors import OptionError
from byom.folders.models import Models
from byom.folders.patterns import chosen, require_whole, valued
from byom.folders.request import Request
from byom.functional.tensors import wide
from byom.merge.base import Problem
from byom.storage.tensor_files import size
from byom.weights import Weights
from byom.weights.lowrank import Adapted
from byom.weights.placed import chosen as chosen_device
from byom.weights.spec import Rounding

Watch = Callable[[int], None]


@dataclass(frozen=True)
class Result:
    """What a request makes of its models.

    Args:
        request: The request.
        models: Its models.
    """

    request: Request
    models: Models

    @cached_property
    def kept(self) -> dict[str, str]:
        """Tensors that are not merged, to the expert whose they are; an empty name is the base."""
        request, base = self.request, self.models.base
        names = list(base)
        given = valued("keep", request.keep, names)
        require_whole("keep", given, base.ties)
        left = set(chosen("exclude", request.exclude, names))
        if request.only:
            left |= set(names) - set(chosen("only", request.only, names))
        require_whole("exclude" if request.exclude else "only", left, base.ties)
        for name, task in given.items():
            if task and name not in self.models.experts[task].weights:
                raise OptionError(f"keep: the expert '{task}' has no tensor {name}")
        return dict.fromkeys(left - given.keys(), "") | given

    @cached_property
    def problem(self) -> Problem:
        """The part of the models that is merged.

        Raises:
            OptionError: If nothing is left of them.
        """
        shared, kept = self.models.shared, self.kept
        if not any(name not in kept for name in shared.mergeable()):
            raise OptionError("keep, only and exclude leave nothing to merge")

        def stays(name: str) -> bool:
            return name not in kept

        if not any(name in kept for name in shared):
            return Problem(shared, self.models.finetuned)
        experts = {task: expert.select(stays) for task, expert in self.models.finetuned.items()}
        return Problem(shared.select(stays), experts)

    @property
    def reads(self) -> int:
        """Bytes that merging reads: all models once, and as often again as the method plans."""
        models = (self.problem.pretrained, *self.problem.finetuned.values())
        return (1 + getattr(self.request.merge, "passes", 0)) * sum(nbytes(each) for each in models)

    def merged(self, watch: Watch | None = None) -> Weights:
        """Merge lazily: all tensors of the base, those merged that are to be.

        Args:
            watch: Called with the bytes of every tensor that is read.
        """
        before = None if self.request.variant is None else self.request.variant.before
        problem = self.problem.on(chosen_device(self.request.device))
        problem = problem if before is None else before(problem)
        merged = self.request.merge(problem if watch is None else problem.watched(watch))
        return assembled(self.models, self.scaled(merged), self.kept)

    def low_rank(self) -> Adapted:
        """Merge into low-rank differences to the base.

        Raises:
            OptionError: If the method's result, or what else was asked for, has none.
        """
        if self.kept or self.request.scale or self.request.dtype or self.models.heads:
            raise OptionError(
                "to=peft writes what adapters hold, the merged difference in fp32; keep, only, exclude, scale, dtype "
                "and heads of experts' own need to=folder"
            )
        return self.request.merge.low_rank(self.problem)

    def scaled(self, merged: Weights) -> Weights:
        """Return the merged part with its difference to the base scaled as ``scale`` says."""
        factors = valued("scale", self.request.scale, list(self.models.base))
        require_one_factor(factors, self.models.base.ties)
        if not factors:
            return merged
        base = self.models.base

        def read(name: str) -> Tensor:
            value = merged.raw(name)
            if name not in factors or not merged.merges(name):
                return value
            return torch.lerp(wide(base[name]), wide(value), factors[name])

        return merged.derived(read, merged.origin)

    @property
    def fallbacks(self) -> list[str]:
        """What gets a simpler rule than the method's own."""
        return self.request.merge.fallbacks(self.problem)


def nbytes(weights: Weights, dtype: torch.dtype | None = None) -> int:
    """Return the bytes of distinct tensors.

    Args:
        weights: The weights.
        dtype: What floating-point tensors are written in; None keeps theirs.
    """
    types = {name: weights.dtype(name) for name in weights.canonical()}
    if dtype is not None:
        types = {name: dtype if own.is_floating_point else own for name, own in types.items()}
    return sum(size(weights.shape(name), own) for name, own in types.items())


def require_one_factor(factors: Mapping[str, float], ties: Mapping[str, str]) -> None:
    """Refuse different factors on the names of one tensor."""
    for alias, name in ties.items():
        if factors.get(alias) != factors.get(name):
            raise OptionError(f"scale: {alias} and {name} are one tensor of the base (tied) and need one factor")


def assembled(models: Models, merged: Weights, kept: Mapping[str, str]) -> Weights:
    """Return all tensors of the base: the merged ones, those of an expert that are kept, and the base's others."""
    base = models.base
    ties = {a: n for a, n in base.ties.items() if _is_one(a, n, models, merged, kept)}

    def read(name: str) -> Tensor:
        if name in merged:
            return merged.raw(name)
        return models.experts[kept[name]].weights[name] if kept.get(name) else base[name]

    def rounded(name: str) -> Tensor | None:
        return merged[name] if name in merged and merged.dtype(name) == base.dtype(name) else None

    return base.tied(ties).derived(Rounding(read, rounded), "merged")


def _is_one(alias: str, name: str, models: Models, merged: Weights, kept: Mapping[str, str]) -> bool:
    """Say whether two names that the base ties have one value: where both are merged, or kept of one model."""
    if (alias in merged) != (name in merged) or kept.get(alias, "") != kept.get(name, ""):
        return False
    owner = merged if alias in merged else models.experts[kept[alias]].weights if kept.get(alias) else models.base
    return owner.ties.get(alias, alias) == owner.ties.get(name, name)

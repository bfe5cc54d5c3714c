"""FlexMerge: models merged block by block, as far as a size asks for it."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from math import isfinite
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from byom.errors import OptionError, WeightsMismatch, one_of
from byom.functional.deltas import inner_products
from byom.functional.grouping import LINKAGES, Linkage, cosines, grouped
from byom.functional.tensors import narrowed
from byom.merge.base import MergeMethod, Problem
from byom.merge.base.running import is_running
from byom.variants.base import Delta, Parts, Served, Shared, Variant
from byom.weights import Weights, matched

Blocks = Literal["module", "layer", "tensor", "model"]
LAYER = re.compile(r"(?:^|.*?\.)\d+(?=\.|$)")  # a name as far as its first whole number
INNER = re.compile(r"\.[^.]+(?:\.\d+(?=\.|$))*")  # the module that follows, with its own number if it has one
Tasks = tuple[str, ...]  # the members of a group, sorted


class Block(NamedTuple):
    """A part of the model, and the tasks that share its values."""

    names: tuple[str, ...]
    groups: tuple[Tasks, ...]  # the largest first: it is in the shared model


@dataclass(frozen=True)
class FlexMerge(Variant):
    """Start with every task's own blocks, and merge those that are most alike until all take `size` models.

    A block is a part of the network, and its groups of tasks start with one task each. Of all blocks' groups, always
    the two of highest similarity become one, until ``sum_b g_b d_b <= size * d``, where block b has d_b parameters and
    g_b groups. Two groups are as alike as the members that are least so: of the task vectors in that block,
    ``similarity(S, R) = min_{i in S, j in R} cos(tau_i, tau_j)``. A group of one task has theta_t, a group of several
    what the merge method makes of these tasks' models, and a group of all the merged model. So size 1 is the merged
    model, and size T every task's own.

    The shared model holds the largest group of each block. A task stores the other groups that it is in, and what
    several tasks have in common is stored once.

    Methods that see whole models (TIES trims over all parameters) are given the members' whole models, and look at them
    once for every different group. A `scale` that multiplies a sum over tasks, as that of Task Arithmetic, keeps the
    factor that it has on the mean of all: for g of T tasks it is multiplied by ``T / g``. A factor far above the
    authors' 1.5, such as validation data may choose for the mean of all, takes groups of few tasks too far. Methods
    that look at inputs or train are refused.

    Args:
        size: Models' worth of parameters that serve all tasks, at least 1; from the number of tasks on, every task
            keeps its own model.
        blocks: ``module`` divides each layer into the modules in it, such as attention, MLP and norms; ``layer`` does
            not; ``tensor`` takes every tensor as a block, ``model`` the whole model. A layer is what a parameter's name
            begins with as far as its first whole number. Outside of layers, a module without others in it, such as the
            last norm, is a block, and so is a parameter of any other module, such as a class embedding.
        similarity: Cosine that stands for two groups: the ``min``, ``mean`` or ``max`` over their members.
        method: The merge method of the groups; None takes the one of the run (``merge=``).

    Raises:
        OptionError: If a hyperparameter is out of range, or the merge method cannot merge some of the tasks.

    References:
        Navigating the Accuracy-Size Trade-Off with Flexible Model Merging. https://arxiv.org/abs/2505.23209

    Differences:
        In the authors' code ``single`` linkage is the least cosine, which clustering calls complete linkage; their
        script for vision has it, and the code's default compares the merged task vectors of groups. For TIES they
        compare trimmed task vectors, and where a trimmed sum is 0 take the sign that most coordinates of the block
        elect, not of the model. They merge a number of times, not down to a size. Parameters in none of their lists of
        blocks are never merged; here every one is in a block. Two task vectors of zeros have cosine 0 there and 1 here:
        they are the same model. They take 1.5 on the mean for Task Arithmetic whatever the group, and with validation
        data search a factor for each group as it is merged; here it is one for all. Ties go to the block, then the
        tasks, that come first by name.
    """

    size: float = 2.0
    blocks: Blocks = "module"
    similarity: Linkage = "min"
    method: MergeMethod | None = None

    title = "FlexMerge"
    stores = "the blocks that it shares with fewer tasks than most do"
    on = "merged"
    merges = True

    def __post_init__(self) -> None:
        number = isinstance(self.size, int | float) and not isinstance(self.size, bool) and isfinite(self.size)
        if not number or self.size < 1:
            raise OptionError(f"byom.size={self.size} is not a number of models from 1 on; use for example 2.0")
        one_of("byom.blocks", self.blocks, get_args(Blocks))
        one_of("byom.similarity", self.similarity, LINKAGES)

    def merged_by(self, method: MergeMethod) -> FlexMerge:
        """Merge groups by the method that merged all tasks, unless another was chosen; see `Variant.merged_by`."""
        return self if self.method is not None else replace(self, method=method)

    def serve(self, problem: Problem, reference: Weights) -> Served:
        """Group the tasks of every block and merge each group; see `Variant.serve`."""
        tied, reference = matched(problem.pretrained, problem.here(reference))
        if tied is not problem.pretrained:
            raise WeightsMismatch(
                f"{problem.pretrained.origin} and {reference.origin} tie different tensors; give the merged model of "
                "these experts as it is"
            )
        method = self._require_method(problem)
        blocks = self.grouping(problem)
        merging = {group for block in blocks for group in block.groups if 1 < len(group) < len(problem.tasks)}
        merged: dict[tuple[Tasks, str], Tensor] = {}
        for group in sorted(merging):
            members = [task for task in problem.tasks if task in group]
            model = method.among(members, problem.tasks)(problem.only(members))
            names = [name for block in blocks if group in block.groups for name in block.names]
            merged |= {(group, name): model[name] for name in names}

        def value(group: Tasks, name: str) -> Tensor:
            if len(group) == 1:
                found = problem.finetuned[group[0]].read_finite(name)
            else:
                found = merged[group, name] if (group, name) in merged else reference.read_finite(name)
            return narrowed(found, reference.dtype(name), f"{reference.origin}: tensor '{name}' of {'+'.join(group)}")

        largest = {name: block.groups[0] for block in blocks for name in block.names}
        shared = reference.derived(
            lambda name: value(largest[name], name) if name in largest else reference[name], "the largest groups"
        )
        return Served(problem.back(shared), self._deltas(problem, blocks, value, reference))

    def grouping(self, problem: Problem) -> list[Block]:
        """Group the tasks of every block, reading all models once.

        Args:
            problem: The models.

        Returns:
            The blocks in the order of their first names.
        """
        names = problem.pretrained.mergeable()
        parts = divided(names, self.blocks)
        tasks = sorted(problem.tasks)  # so that ties do not depend on the order in which they are given
        order = [problem.tasks.index(task) for task in tasks]
        products = [_products(problem, each)[order][:, order] for each in parts]
        sizes = [sum(torch.Size(problem.pretrained.shape(name)).numel() for name in each) for each in parts]
        found = grouped([cosines(each) for each in products], sizes, self.size * sum(sizes), self.similarity)
        return [
            Block(tuple(each), tuple(tuple(tasks[place] for place in members) for members in groups))
            for each, groups in zip(parts, found, strict=True)
        ]

    def unpack(self, parts: Parts, shared: Shared) -> Tensor:
        """Return the values of the task's group."""
        return parts["values"].reshape(shared.reference.shape)

    def _deltas(
        self,
        problem: Problem,
        blocks: Iterable[Block],
        value: Callable[[Tasks, str], Tensor],
        reference: Weights,
    ) -> dict[str, Delta]:
        parts: dict[str, dict[str, Parts]] = {task: {} for task in problem.tasks}
        marks: dict[str, dict[str, str]] = {task: {} for task in problem.tasks}
        apart = [(group, name) for block in blocks for group in block.groups[1:] for name in block.names]
        for group, name in sorted(apart, key=lambda each: each[1]):
            values = {"values": value(group, name).cpu()}
            for task in group:
                parts[task][name] = values
                marks[task] |= {name: "+".join(group)} if len(group) > 1 else {}
        plain = replace(self, method=None)  # what is stored needs no method to be put back
        return {
            task: Delta(plain, own, {name: reference.shape(name) for name in own}, marks[task])
            for task, own in parts.items()
        }

    def _require_method(self, problem: Problem) -> MergeMethod:
        """Return the method that merges groups, refusing those that cannot merge some of the tasks."""
        method = self.method
        if method is None:
            raise OptionError("FlexMerge(method=...) is not given; name the merge method of groups, such as Ties()")
        needs = method.needs
        if needs.joint or needs.members > 1 or (needs.inputs and not needs.statistics):
            raise OptionError(
                f"byom=flex merges many groups of tasks, each by weights alone, and merge={method.title} looks at "
                "inputs or other models; choose a method without, such as merge=ties or merge=task_arithmetic"
            )
        if not method.merges:
            raise OptionError("byom=flex merges groups of tasks, and merge=pretrained merges nothing; use merge=ties")
        method.check(problem)
        return method


def divided(names: Iterable[str], blocks: Blocks) -> list[list[str]]:
    """Divide parameters into blocks.

    Args:
        names: Their names.
        blocks: See `FlexMerge`.

    Returns:
        The names of each block, in the order in which they are given.
    """
    every = list(names)
    outer = {module[:dot] for module in map(_module, every) for dot, letter in enumerate(module) if letter == "."}
    parts: dict[str, list[str]] = {}
    for name in every:
        parts.setdefault(_block(name, blocks, outer), []).append(name)
    return list(parts.values())


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _block(name: str, blocks: Blocks, outer: Collection[str]) -> str:
    if blocks == "tensor":
        return name
    if blocks == "model":
        return ""
    module = _module(name)
    if (layer := LAYER.match(module)) is None:
        return name if not module or module in outer else module
    inner = INNER.match(module, layer.end()) if blocks == "module" else None
    return module[: inner.end()] if inner else layer[0]


def _products(problem: Problem, names: Iterable[str]) -> Tensor:
    """Return the inner products of the task vectors of a block ``[T, T]`` in fp64, without running statistics."""
    total = torch.zeros(len(problem.tasks), len(problem.tasks), dtype=torch.float64)
    for name in names:
        group = problem.group(name)  # which refuses what is not finite, also in statistics
        for _, piece in group.blocks() if not is_running(name) else ():  # near the caches
            total += inner_products(piece.deltas)
    return total

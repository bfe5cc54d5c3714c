"""Core Space: merge low-rank changes in the coordinates that all factors share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from byom.errors import CheckpointError, OptionError, one_of
from byom.functional.linalg import thin_svd
from byom.functional.tensors import finite, wide, widened
from byom.merge.base import Group, MergeMethod, PlannedMethod, Problem
from byom.merge.base.changes import (
    Chain,
    Changes,
    changes,
    coordinates,
    in_coordinates,
    low_rank_result,
    matrices,
    merged_changes,
    require_adapted,
    require_coordinates,
)
from byom.merge.base.matrices import patterns
from byom.merge.ties import Ties
from byom.weights import Spec, Weights
from byom.weights.lowrank import Adapted


class Frame(NamedTuple):
    """The bases of one matrix: orthonormal columns and rows."""

    left: Tensor  # [m, p], of what the B_t span
    right: Tensor  # [q, n], of what the A_t span


@dataclass(frozen=True)
class Cores:
    """The bases of every matrix, the merged coordinates in them, and the merged changes of other tensors."""

    frames: Mapping[str, Frame]
    merged: Weights
    rest: Weights | None


@dataclass(frozen=True)
class CoreSpace(PlannedMethod):
    """Write the factors of all adapters in one pair of bases per matrix, and merge the small cores by another method.

    For every matrix with changes ``tau_t = B_t A_t``, U are the left singular vectors of ``[B_1 | ... | B_T]`` and V
    the right ones of ``[A_1; ...; A_T]``. The core of task t is ``M_t = (Uᵀ B_t) (A_t V)``, at most ``T r x T r``, and
    nothing is lost: ``U M_t Vᵀ = tau_t``. `then` merges the cores of all matrices together, from an origin of zeros,
    into M, and ``theta = theta_0 + scale * U M Vᵀ``, of rank ``T r`` or less whatever `then` does.

    Linear methods are not changed by that, and neither are those that commute with rotations, which are only faster:
    Iso-C, and TSV-M on adapters of one rank. Methods that look at single entries (TIES, DARE) see the few of the cores.

    Changes are never formed where all experts are low-rank differences to this pre-trained model
    (`byom.weights.lowrank.Adapted`). What is not known as factors counts as it is, ``B_t = A_t = tau_t``: the bases of
    fully fine-tuned models are as large as their matrices, and cost the cube of a side.

    Args:
        then: The method that merges the cores. It needs weights alone; for it, the number of entries is that of the
            cores.
        scale: Scaling coefficient (lambda) of what `then` makes of the cores, any real number.
        rest: What tensors get that are not matrices: ``pretrained``, or ``merged`` by `then` among themselves.
        exclude: Shell-style patterns of parameter names that are not matrices here.

    Raises:
        OptionError: If a hyperparameter is out of range, or `then` needs more than weights.

    References:
        Accurate and Efficient Low-Rank Model Merging in Core Space. https://arxiv.org/abs/2509.17786

    Differences:
        The authors keep ``T r`` directions even where the factors span fewer; the others have no coordinates, and here
        they are left out. They merge matrix by matrix; whether `then` ranks each core or all of them together is its
        own option here (`scope`), and so is the scale, which they search on validation data (`grid` is chosen here).
        Adapters' own scales belong to B. A number that all tasks' B are multiplied with and their A divided by, or a
        rotation of one task's factors, changes nothing; other ways of writing the same product change the bases, and
        with them what `then` does to each entry. Equal singular values leave them open.
    """

    then: MergeMethod = field(default_factory=lambda: Ties(density=0.2))
    scale: float = 1.0
    rest: Literal["pretrained", "merged"] = "pretrained"
    exclude: tuple[str, ...] = ()

    title = "Core Space"
    grid: ClassVar = {"scale": (0.2, 0.4, 0.6, 0.8, 1.0, 1.5, 2.0)}

    def __post_init__(self) -> None:
        if (
            isinstance(self.scale, bool)
            or not isinstance(self.scale, int | float)
            or not abs(self.scale) < float("inf")
        ):
            raise OptionError(f"merge.scale={self.scale} is not a finite number; 1 takes what merge.then makes")
        one_of("merge.rest", self.rest, ("pretrained", "merged"))
        object.__setattr__(self, "exclude", patterns("merge.exclude", self.exclude))
        require_coordinates(self.then)

    def simpler(self, problem: Problem) -> list[str]:
        """Name what is not merged in shared bases."""
        return [name for name in problem.pretrained.mergeable() if not self._applies(problem.pretrained, name)]

    def __call__(self, problem: Problem) -> Weights:
        """Find the bases now, merge lazily; see `MergeMethod.__call__`. No expert's matrix is formed to merge it."""
        self.check(problem)
        problem = problem.settled()
        base, plan = problem.pretrained, self.plan(problem)

        def read(name: str) -> Tensor:
            if not base.merges(name):
                return base[name]
            alone = self._applies(base, name)
            group = Group(name, base.read_finite(name), ()) if alone else problem.group(name)
            return self.merge(group, plan)

        return base.derived(read, "merged")

    def plan(self, problem: Problem) -> Cores:
        """Find the bases, and let the wrapped method plan for the cores."""
        base, of = problem.pretrained, changes(problem)
        frames = {
            key: _frame(problem, of, name, key)
            for name in base.mergeable()
            if self._applies(base, name)
            for key in matrices(name, base.shape(name))
        }
        others = None if self.rest == "pretrained" else merged_changes(self.then, problem, self.simpler(problem))
        return Cores(frames, self.then(_cores(problem, of, frames)), others)

    def merge(self, group: Group, plan: Cores) -> Tensor:
        """Return ``theta_0 + scale * U M Vᵀ`` for a matrix, and what `rest` says for other tensors."""
        keys = matrices(group.name, group.pretrained.shape)
        if keys[0] in plan.frames:
            if not any(plan.merged[key].numel() for key in keys):  # a zero as large as an embedding, of no task
                return wide(group.pretrained)
            change = torch.stack([reduce(torch.matmul, self._factors(key, plan)) for key in keys])
            return group.pretrained + change.reshape(group.pretrained.shape)
        return group.pretrained + plan.rest[group.name] * self.scale if plan.rest else wide(group.pretrained)

    def low_rank(self, problem: Problem) -> Adapted:
        """Return the merged model as ``theta_0`` and two factors per matrix; see `MergeMethod.low_rank`."""
        self.check(problem)
        require_adapted(problem)
        plan = self.plan(problem)
        rest = (lambda name: self.merge(problem.group(name), plan)) if plan.rest else None
        return low_rank_result(problem, {key: self._factors(key, plan) for key in plan.frames}, rest)

    def _factors(self, key: str, plan: Cores) -> tuple[Tensor, Tensor]:
        """Return the two factors of a merged change, M in the one that makes them thin."""
        (left, right), core = plan.frames[key], self.scale * plan.merged[key]
        return (left, core @ right) if left.shape[1] <= len(right) else (left @ core, right)

    def _applies(self, base: Weights, name: str) -> bool:
        return in_coordinates(base, name, self.exclude)


def frame(chains: Sequence[Chain]) -> Frame:
    """Find orthonormal bases of the columns and rows of several matrices, from their factors.

    Args:
        chains: One product ``[m, n]`` per task, of one or two factors.

    Returns:
        The left singular vectors of the first factors side by side, and the right ones of the last factors one above
        the other, by descending value, in fp64.
    """
    left = directions(torch.cat([chain[0].double() for chain in chains], 1))
    return Frame(left, directions(torch.cat([chain[-1].double() for chain in chains]).T).T)


def directions(columns: Tensor) -> Tensor:
    """Return the left singular vectors of a matrix in fp64, without those that its rounding makes.

    Args:
        columns: ``[m, q]``.

    Returns:
        ``[m, k]``, k being the numerical rank.
    """
    left, values, _ = thin_svd(columns)
    return left[:, values > max(columns.shape) * torch.finfo(values.dtype).eps * values[:1]]


def core(chain: Chain, bases: Frame) -> Tensor:
    """Return the coordinates of one change: ``(Uᵀ B) (A V)``, or ``Uᵀ tau V``.

    Args:
        chain: The change, as one matrix or two.
        bases: U and V.

    Returns:
        ``[p, q]`` in fp64.
    """
    left, right = (each.double() for each in bases)
    if len(chain) == 1:
        return left.T @ chain[0].double() @ right.T
    return (left.T @ chain[0].double()) @ (chain[-1].double() @ right.T)


def _frame(problem: Problem, of: Changes, name: str, key: str) -> Frame:
    """Find the bases of one matrix, refusing what is not finite."""
    chains = [of(task, key) for task in problem.tasks]
    for chain, expert in zip(chains, problem.finetuned.values(), strict=True):
        if not all(finite(factor) for factor in chain if factor.numel()):
            expert.read_finite(name)  # whose message counts the values, where the product is not finite either
            raise CheckpointError(f"{expert.origin}: the factors of '{name}' hold NaN or infinity; fetch it again")
    models = (problem.pretrained, *problem.finetuned.values())
    dtype = widened(reduce(torch.promote_types, [model.dtype(name) for model in models]))
    return Frame(*(each.to(dtype) for each in frame(chains)))


def _cores(problem: Problem, of: Changes, frames: Mapping[str, Frame]) -> Problem:
    """Return the problem of merging the M_t."""
    specs = {key: Spec((left.shape[1], len(right)), left.dtype) for key, (left, right) in frames.items()}
    return coordinates(problem, specs, lambda task, key: core(of(task, key), frames[key]))

"""KnOTS: merge in a basis that all tasks share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from math import isfinite
from typing import ClassVar, Literal

import torch
from torch import Tensor

from byom.errors import OptionError, one_of
from byom.functional.iterative import square
from byom.functional.linalg import VANISHING, thin_svd
from byom.functional.tensors import wide
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


@dataclass(frozen=True)
class SharedBases:
    """One basis per matrix, the merged coordinates in them, and the merged changes of other tensors (None: none)."""

    bases: Mapping[str, Tensor]
    merged: Weights
    rest: Weights | None


@dataclass(frozen=True)
class KnowledgeOrientationThroughSvd(PlannedMethod):
    """Write the changes of all tasks in one basis per matrix, and merge the coordinates by another method.

    ``[tau_1 | ... | tau_T] = U S [V_1ᵀ | ... | V_Tᵀ]`` for every matrix, the coordinates of task t being
    ``R_t = S V_tᵀ = Uᵀ tau_t``. `then` merges the R_t of all matrices together, from an origin of zeros, and
    ``theta = theta_0 + scale * U R``. Linear methods are not changed by that; others see tasks that are aligned.

    Only U is computed, from the eigenvectors of ``sum_t tau_t tau_tᵀ`` in fp64, so that ``U Uᵀ tau_t = tau_t``
    holds to rounding. Where all experts are low-rank differences to this pre-trained model
    (`byom.weights.lowrank.Adapted`), everything follows from their factors. The bases of all matrices stay in memory,
    at most ``m min(m, T n)`` values each and ``m (r_1 + ... + r_T)`` for factors; coordinates are computed when they
    are read. Fully fine-tuned models with sides of many thousands take the cube of it in time.

    Args:
        then: The method that merges the coordinates. It needs weights alone; for it, the number of entries is that
            of the coordinates.
        scale: Scaling coefficient (lambda) of what `then` makes of the coordinates, any real number.
        concat: Which space is shared: ``output`` puts the changes side by side, ``input`` one above the other
            (shared V, ``theta = theta_0 + scale * R Vᵀ``).
        rtol: Directions with a singular value of at most this share of the largest are dropped, in [0, 1). From
            1e-6 on they come from the eigenvectors; below, from a singular value decomposition in fp64.
        rest: What tensors get that are not matrices: ``pretrained``, or ``merged`` by `then` among themselves.
        exclude: Shell-style patterns of parameter names that are not matrices here.

    Raises:
        OptionError: If a hyperparameter is out of range, or `then` needs more than weights.

    References:
        Model merging with SVD to tie the Knots, section 4. https://arxiv.org/abs/2410.19735

    Differences:
        The authors drop singular values up to 1e-5, whatever the scale; here the threshold is relative. A low-rank
        change that was added to fp32 weights and subtracted again has full rank by rounding, at about 1e-6 of the
        largest value where it is a 200th of the weights: give the adapters themselves, or raise `rtol`. Their
        checkpoints have a scale ``alpha / r`` of 1 and their code leaves it out; here it counts. They search the
        scale on validation data (`grid` is chosen here); it multiplies their coordinates before the mean of TIES, which
        is the same. fusion-bench has the decomposition
        alone, with a threshold of 1e-4. Results depend on how attention is stored: the authors decompose query, key
        and value apart, a fused matrix is one here. Equal singular values leave the basis open, and what `then` does
        to each entry with it.
    """

    then: MergeMethod = field(default_factory=lambda: Ties(density=0.2))
    scale: float = 0.6
    concat: Literal["output", "input"] = "output"
    rtol: float = VANISHING
    rest: Literal["pretrained", "merged"] = "pretrained"
    exclude: tuple[str, ...] = ()

    title = "KnOTS"
    grid: ClassVar = {"scale": (0.2, 0.4, 0.6, 0.8, 1.0, 1.5, 2.0)}

    def __post_init__(self) -> None:
        if not isinstance(self.scale, int | float) or not isfinite(self.scale):
            raise OptionError(f"merge.scale={self.scale} is not a finite number; the authors take 0.5 to 0.7")
        one_of("merge.concat", self.concat, ("output", "input"))
        if not isinstance(self.rtol, int | float) or not 0 <= self.rtol < 1:
            raise OptionError(f"merge.rtol={self.rtol} is not in [0, 1); it is relative, try 1e-6")
        one_of("merge.rest", self.rest, ("pretrained", "merged"))
        object.__setattr__(self, "exclude", patterns("merge.exclude", self.exclude))
        require_coordinates(self.then)

    def simpler(self, problem: Problem) -> list[str]:
        """Name what is not merged in a shared basis."""
        return [name for name in problem.pretrained.mergeable() if not self._applies(problem.pretrained, name)]

    def plan(self, problem: Problem) -> SharedBases:
        """Find the bases, and let the wrapped method plan for the coordinates."""
        base, of = problem.pretrained, changes(problem)
        of = of if self.concat == "output" else _transposed(of)
        bases, widths = {}, {}
        for name in (name for name in base.mergeable() if self._applies(base, name)):
            dtype = problem.group(name).deltas.dtype  # reading the group refuses what is not finite
            for key in matrices(name, base.shape(name)):
                chains = [of(task, key) for task in problem.tasks]
                bases[key], widths[key] = basis(chains, self.rtol).to(dtype), chains[0][-1].shape[1]
        return SharedBases(bases, self.then(_coordinates(problem, of, bases, widths)), self._rest(problem))

    def merge(self, group: Group, plan: SharedBases) -> Tensor:
        """Return ``theta_0 + scale * U R`` for a matrix, and what `rest` says for other tensors."""
        keys = matrices(group.name, group.pretrained.shape)
        if keys[0] in plan.bases:
            every = [plan.bases[key] @ plan.merged[key] for key in keys]
            change = torch.stack([each.T if self.concat == "input" else each for each in every])
            return group.pretrained + self.scale * change.reshape(group.pretrained.shape)
        return group.pretrained + self.scale * plan.rest[group.name] if plan.rest else wide(group.pretrained)

    def low_rank(self, problem: Problem) -> Adapted:
        """Return the merged model as ``theta_0`` and the factors ``scale * U`` and R; see `MergeMethod.low_rank`."""
        self.check(problem)
        require_adapted(problem)
        plan = self.plan(problem)
        pairs = {key: (self.scale * basis, plan.merged[key]) for key, basis in plan.bases.items()}
        if self.concat == "input":
            pairs = {key: (right.T, left.T) for key, (left, right) in pairs.items()}
        rest = (lambda name: self.merge(problem.group(name), plan)) if plan.rest else None
        return low_rank_result(problem, pairs, rest)

    def _rest(self, problem: Problem) -> Weights | None:
        """Merge the changes of what is not a matrix."""
        return None if self.rest == "pretrained" else merged_changes(self.then, problem, self.simpler(problem))

    def _applies(self, base: Weights, name: str) -> bool:
        return in_coordinates(base, name, self.exclude)


def _transposed(of: Changes) -> Changes:
    return lambda task, name: [factor.T for factor in reversed(of(task, name))]


def _coordinates(problem: Problem, of: Changes, bases: Mapping[str, Tensor], widths: Mapping[str, int]) -> Problem:
    """Return the problem of merging the ``R_t``.

    Args:
        problem: The models.
        of: The changes.
        bases: Parameter name to the shared basis ``[m, k]``.
        widths: Parameter name to the number of columns of its changes.
    """
    specs = {name: Spec((u.shape[1], widths[name]), u.dtype) for name, u in bases.items()}

    def read(task: str, name: str) -> Tensor:
        chain = [factor.to(specs[name].dtype) for factor in of(task, name)]
        return reduce(torch.matmul, chain, bases[name].T)

    return coordinates(problem, specs, read)


def basis(chains: Sequence[Chain], rtol: float) -> Tensor:
    """Find orthonormal columns that span what the columns of several matrices span.

    Args:
        chains: One product ``[m, n_t]`` per task; it is not formed where the first factors of all tasks have fewer
            columns than rows.
        rtol: Directions whose singular value is at most this share of the largest are left out.

    Returns:
        ``[m, k]`` in fp64: the left singular vectors of all matrices side by side, by descending value.
    """
    sizes = [chain[0].shape[1] for chain in chains]
    if len(chains[0][0]) <= sum(sizes):
        return left_singular(map(_product, chains), rtol)
    outside, firsts = torch.linalg.qr(torch.cat([chain[0].double() for chain in chains], 1))
    inside = [_product([first, *chain[1:]]) for first, chain in zip(firsts.split(sizes, 1), chains, strict=True)]
    return outside @ left_singular(inside, rtol)


def left_singular(matrices: Iterable[Tensor], rtol: float) -> Tensor:
    """Return the left singular vectors of matrices side by side whose value exceeds a share of the largest.

    Squaring blurs values below 1e-8 of the largest, not the orthonormality of the vectors; so it does for
    thresholds down to 1e-6.

    Args:
        matrices: ``[m, n_t]`` each, in fp64; read once, so a generator holds one at a time.
        rtol: The share.

    Returns:
        ``[m, k]``, by descending value.
    """
    if rtol < VANISHING:
        left, values, _ = thin_svd(torch.cat([*matrices], 1))
    else:
        squares, left = torch.linalg.eigh(reduce(Tensor.add_, (square(each.T) for each in matrices)))
        values, left = squares.flip(0).clamp(min=0).sqrt(), left.flip(1)
    return left[:, values > rtol * values[:1]]


def _product(chain: Chain) -> Tensor:
    return reduce(torch.matmul, [factor.double() for factor in chain])

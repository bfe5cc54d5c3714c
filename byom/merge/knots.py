"""KnOTS: merge in a basis that all tasks share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from math import isfinite
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from byom.errors import OptionError, one_of
from byom.functional.linalg import VANISHING, thin_svd
from byom.functional.tensors import wide
from byom.merge.base import Group, MergeMethod, PlannedMethod, Problem
from byom.merge.base.matrices import is_matrix, is_stack, patterns
from byom.merge.base.needs import Needs
from byom.merge.ties import Ties
from byom.weights import Spec, Weights
from byom.weights.lowrank import Adapted, Piece

Chain = Sequence[Tensor]  # matrices whose product is meant: a change itself, or the two factors of a low-rank one
Changes = Callable[[str, str], Chain]  # (task, parameter) -> the change
EXPERT = "#"  # between the name of a tensor that packs experts and the number of one


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
        if self.then.needs != Needs():
            raise OptionError(
                f"merge.then={type(self.then).__name__} needs {self.then.needs.words}, which have no coordinates in "
                "the shared basis; choose a method that needs weights alone, for example merge@merge.then=ties"
            )

    def simpler(self, problem: Problem) -> list[str]:
        """Name what is not merged in a shared basis."""
        return [name for name in problem.pretrained.mergeable() if not self._applies(problem.pretrained, name)]

    def plan(self, problem: Problem) -> SharedBases:
        """Find the bases, and let the wrapped method plan for the coordinates."""
        base, experts = problem.pretrained, problem.finetuned
        low_rank = {t: e for t, e in experts.items() if isinstance(e, Adapted) and e.on(base)}
        changes = LowRank(base, low_rank) if len(low_rank) == len(experts) else Dense(base, experts)
        of = changes.of if self.concat == "output" else _transposed(changes.of)
        bases, widths = {}, {}
        for name in (name for name in base.mergeable() if self._applies(base, name)):
            dtype = problem.group(name).deltas.dtype  # reading the group refuses what is not finite
            for key in matrices(name, base.shape(name)):
                chains = [of(task, key) for task in problem.tasks]
                bases[key], widths[key] = basis(chains, self.rtol).to(dtype), chains[0][-1].shape[1]
        return SharedBases(bases, self.then(coordinates(problem, of, bases, widths)), self._rest(problem))

    def merge(self, group: Group, plan: SharedBases) -> Tensor:
        """Return ``theta_0 + scale * U R`` for a matrix, and what `rest` says for other tensors."""
        keys = matrices(group.name, group.pretrained.shape)
        if keys[0] in plan.bases:
            changes = [plan.bases[key] @ plan.merged[key] for key in keys]
            change = torch.stack([each.T if self.concat == "input" else each for each in changes])
            return group.pretrained + self.scale * change.reshape(group.pretrained.shape)
        return group.pretrained + self.scale * plan.rest[group.name] if plan.rest else wide(group.pretrained)

    def _rest(self, problem: Problem) -> Weights | None:
        """Merge the changes of what is not a matrix."""
        if self.rest == "pretrained":
            return None
        base = problem.pretrained.select(set(self.simpler(problem)).__contains__)
        zero = base - base

        def change(expert: Weights) -> Weights:
            return zero.derived(lambda n: wide(expert.read_finite(n)) - wide(base.read_finite(n)), expert.origin)

        return self.then(Problem(zero, {task: change(expert) for task, expert in problem.finetuned.items()}))

    def _applies(self, base: Weights, name: str) -> bool:
        shape = base.shape(name)
        return is_matrix(name, shape, self.exclude) or is_stack(name, shape, self.exclude)


@dataclass(frozen=True)
class Dense:
    """Changes as matrices.

    Args:
        base: theta_0.
        experts: Task name to theta_t.
    """

    base: Weights
    experts: Mapping[str, Weights]

    def of(self, task: str, name: str) -> Chain:
        """Return one change, as one matrix; of a tensor that packs experts, that of one of them."""
        name, _, expert = name.partition(EXPERT)
        models = (wide(weights[name]) for weights in (self.experts[task], self.base))
        after, before = (value[int(expert)] if expert else value for value in models)
        return (after - before,)


@dataclass(frozen=True)
class LowRank:
    """Changes as products of two factors, and as one matrix where an expert was trained whole.

    Args:
        base: theta_0.
        experts: Task name to theta_t, low-rank differences to this theta_0.
    """

    base: Weights
    experts: Mapping[str, Adapted]

    def of(self, task: str, name: str) -> Chain:
        """Return one change, as one matrix or two."""
        expert = self.experts[task]
        if EXPERT in name or name in expert.replaced:
            return Dense(self.base, self.experts).of(task, name)
        return stacked(expert.pieces(name), self.base.shape(name))


def matrices(name: str, shape: Sequence[int]) -> list[str]:
    """Return what the matrices of a parameter are called: its name, or one name for each expert that it packs."""
    return [f"{name}{EXPERT}{expert}" for expert in range(shape[0])] if is_stack(name, shape) else [name]


def _transposed(of: Changes) -> Changes:
    return lambda task, name: [factor.T for factor in reversed(of(task, name))]


def coordinates(problem: Problem, of: Changes, bases: Mapping[str, Tensor], widths: Mapping[str, int]) -> Problem:
    """Return the problem of merging the ``R_t``, read when asked for.

    Args:
        problem: The models.
        of: The changes.
        bases: Parameter name to the shared basis ``[m, k]``.
        widths: Parameter name to the number of columns of its changes.
    """
    specs = {name: Spec((u.shape[1], widths[name]), u.dtype) for name, u in bases.items()}
    zero = Weights(specs, lambda name: torch.zeros(specs[name].shape, dtype=specs[name].dtype), origin="zero")

    def expert(task: str) -> Weights:
        def read(name: str) -> Tensor:
            chain = [factor.to(specs[name].dtype) for factor in of(task, name)]
            return reduce(torch.matmul, chain, bases[name].T)

        return zero.derived(read, problem.finetuned[task].origin)

    return Problem(zero, {task: expert(task) for task in problem.tasks})


def stacked(pieces: Sequence[Piece], shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Write the differences of a matrix as one product.

    Args:
        pieces: Low-rank differences of some rows each, or none.
        shape: ``(m, n)``.

    Returns:
        ``[m, q]`` and ``[q, n]``, q being the sum of the ranks.
    """
    height, width = shape
    below = [height - piece.start - len(piece.left) for piece in pieces]
    left = [pad(piece.left, (0, 0, piece.start, rows)) for piece, rows in zip(pieces, below, strict=True)]
    right = [piece.right for piece in pieces]
    return torch.cat([torch.zeros(height, 0), *left], 1), torch.cat([torch.zeros(0, width), *right])


def basis(chains: Sequence[Chain], rtol: float) -> Tensor:
    """Find orthonormal columns that span what the columns of several matrices span.

    Args:
        chains: One product ``[m, n_t]`` per task; it is not formed where the first factors of all tasks have fewer
            columns than rows.
        rtol: Directions whose singular value is at most this share of the largest are left out.

    Returns:
        ``[m, k]`` in fp64: the left singular vectors of all matrices side by side, by descending value.
    """
    firsts = torch.cat([chain[0].double() for chain in chains], 1)
    sizes = [chain[0].shape[1] for chain in chains]
    outside = None
    if firsts.shape[0] > firsts.shape[1]:
        outside, firsts = torch.linalg.qr(firsts)
    products = [
        reduce(torch.matmul, [first, *(factor.double() for factor in chain[1:])])
        for first, chain in zip(firsts.split(sizes, 1), chains, strict=True)
    ]
    left = left_singular(torch.cat(products, 1), rtol)
    return left if outside is None else outside @ left


def left_singular(matrix: Tensor, rtol: float) -> Tensor:
    """Return the left singular vectors of a matrix whose value exceeds a share of the largest.

    Squaring blurs values below 1e-8 of the largest, not the orthonormality of the vectors; so it does for
    thresholds down to 1e-6.

    Args:
        matrix: ``[m, n]`` in fp64.
        rtol: The share.

    Returns:
        ``[m, k]``, by descending value.
    """
    if rtol < VANISHING:
        left, values, _ = thin_svd(matrix)
    else:
        squares, left = torch.linalg.eigh(matrix @ matrix.T)
        values, left = squares.flip(0).clamp(min=0).sqrt(), left.flip(1)
    return left[:, values > rtol * values[:1]]

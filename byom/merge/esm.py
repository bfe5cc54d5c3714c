"""ESM: essential subspaces of what the layers of all tasks put out, made orthogonal and put together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from byom.errors import CheckpointError, at_least
from byom.functional.deltas import total
from byom.functional.linalg import polar_and_values, truncated_svd
from byom.merge.base import Group, PlannedMethod, Problem
from byom.merge.base.matrices import by_matrix, is_matrix, is_stack, patterns
from byom.merge.base.needs import Needs
from byom.merge.base.together import Together
from byom.merge.tsv import add_orthogonalised

TWICE = 2.0  # factor of every layer in the authors' code, beside the one that is searched


@dataclass(frozen=True)
class EssentialSubspaceMerging(PlannedMethod):
    """Keep the directions in which each task's inputs move a layer's output most, orthogonal across tasks.

    On inputs with the mean outer product ``G_t``, the change of a layer's output has the second moment
    ``tau_t G_t tau_tᵀ``. Its ``k = floor(m / T)`` leading eigenvectors are ``P_t [m, k]``, with eigenvalues ``e_t``,
    and ``A_t = P_tᵀ tau_t``. Every direction is weighted by ``w_t = e_t^energy`` over its mean, and every task by its
    size ``||tau_t||`` over the mean. So ``U = [P_t diag(w_t)]``, and ``A`` has the rows of all
    ``(||tau_t|| / mean)^power diag(w_t) A_t``, then its columns times ``(||a_j|| / mean_j ||a_j||)^power``.

    Then ``D = 2 mean(s_U) mean(s_A) polar(U) polar(A)``, with their singular values ``s``, and
    ``theta = theta_0 + scale * (||D|| / mean ||D||)^power D``, the mean over the layers whose names differ in numbers
    alone. Matrices without ``G_t`` are merged as in TSV-M, with the same factor. What is not a matrix, or has fewer
    rows than there are tasks, moves by `scale` times the mean of the task vectors; `fallbacks` names these.

    Directions in which no output moves, up to the rounding of the stored ``G_t``, are left out of products and means,
    and so is what several tasks have in common but once. With ``power=0`` nothing depends on the basis of the inputs;
    then one task with ``G = I`` and ``energy=0`` moves by twice what Iso-C makes of it.

    It needs few inputs, the authors take 32 of a task (``statistics.gram.examples=32``), and no label. The changes of
    all tensors are in memory while the merged model is in use, d fp32 numbers. The square U is what costs:
    its eigenvectors take ``9 m^3`` operations for every layer of m outputs.

    Args:
        scale: Scaling coefficient (alpha), any real number.
        power: How strongly large tasks, input columns and layers are preferred to small ones, at least 0.
        energy: Exponent of the eigenvalues in the weights of directions, at least 0; 0 weighs them alike.
        exclude: Shell-style patterns of parameter names that are not matrices here.

    Raises:
        OptionError: If a hyperparameter is out of range, or `exclude` is not a list of patterns.

    References:
        Model Merging in the Essential Subspace. https://arxiv.org/abs/2602.20208
        Essential Subspace Merging for Multi-Task Learning, and its code. https://arxiv.org/abs/2606.19164

    Differences:
        This is the authors' code for images (github.com/kiddo127/ESM), read in November 2026, whose weights of
        directions are younger than the first paper; that for texts leaves out the weights of tasks and columns, and the
        factor of 2. There the output projection of attention and the last projection are merged as in TSV-M for want
        of captured inputs; here they have their ``G_t``. They take validation inputs at random, we the first training
        inputs of the statistic ``gram``. With fewer rows of inputs than outputs they complete the eigenvectors with
        unit vectors that are not orthogonal to them, which changes ``||tau_t||`` and fills U; here these are absent.
        They search the scale in 0.0, 0.1, ..., 3.0; `grid` is coarser.
    """

    scale: float = 1.0
    power: float = 2.0
    energy: float = 0.15
    exclude: tuple[str, ...] = ("*text_projection*",)

    title = "ESM"
    grid: ClassVar = {"scale": (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)}

    def __post_init__(self) -> None:
        at_least("merge.power", self.power, 0, "2")
        at_least("merge.energy", self.energy, 0, "0.15")
        object.__setattr__(self, "exclude", patterns("merge.exclude", self.exclude))

    @property
    def needs(self) -> Needs:
        """The statistic ``gram``, which looks at training inputs and at no label."""
        return Needs(statistics=frozenset({"gram"}), inputs=frozenset({"train"}))

    def simpler(self, problem: Problem) -> list[str]:
        """Name what has no Gram, and the matrices with fewer rows than there are tasks."""
        base, tasks, bare = problem.pretrained, len(problem.tasks), set(problem.uncovered("gram"))
        return [
            name
            for name in base.mergeable()
            if name in bare or (is_matrix(name, base.shape(name), self.exclude) and min(base.shape(name)) < tasks)
        ]

    def plan(self, problem: Problem) -> dict[str, Tensor]:
        """Find the change of every parameter, on the CPU: the sizes of all layers of a kind set the factor of each."""
        change = Together(problem, lambda name: self._change(problem.group(name)).cpu())
        changes = {name: change(name) for name in problem.pretrained.canonical() if problem.pretrained.merges(name)}
        layers = {name: changes[name] for name in changes if self._is_layer(name, problem)}
        for name, factor in preferred(layers, self.power).items():
            changes[name] *= factor
        return changes

    def merge(self, group: Group, plan: Mapping[str, Tensor]) -> Tensor:
        """Return ``theta_0`` plus the scaled change."""
        return group.pretrained + self.scale * plan[group.name].to(group.pretrained.device)

    def _is_layer(self, name: str, problem: Problem) -> bool:
        shape = problem.pretrained.shape(name)
        return is_matrix(name, shape, self.exclude) or is_stack(name, shape, self.exclude)

    def _change(self, group: Group) -> Tensor:
        deltas = group.deltas
        if "gram" in group.statistics and is_matrix(group.name, deltas.shape[1:], self.exclude):
            merged = self._essential(group.name, deltas, group.statistics["gram"])
        elif min(deltas.shape[-2:]) < len(deltas):
            merged = None
        else:
            merged = by_matrix(group.name, deltas, add_orthogonalised, self.exclude)
        return (total(deltas) / len(deltas) if merged is None else merged).to(group.precision)

    def _essential(self, name: str, deltas: Tensor, grams: Tensor) -> Tensor | None:
        if grams.ndim == 4:  # of a parameter stored in x out
            merged = self._essential(name, deltas.mT, grams[:, 0])
            return None if merged is None else merged.T
        if grams.shape != (len(deltas), deltas.shape[2], deltas.shape[2]):
            raise CheckpointError(
                f"the Gram of '{name}' has shape {tuple(grams.shape[1:])}, the parameter {tuple(deltas.shape[1:])}; "
                "compute it for this model"
            )
        return None if min(deltas.shape[1:]) < len(deltas) else joined(deltas, grams, self.power, self.energy)


def joined(deltas: Tensor, grams: Tensor, power: float, energy: float) -> Tensor:
    """Put the essential parts of all tasks together.

    Args:
        deltas: ``[T, m, n]`` task vectors of one matrix, ``T <= m``.
        grams: ``[T, n, n]``, of their inputs.
        power: See `EssentialSubspaceMerging`.
        energy: See `EssentialSubspaceMerging`.

    Returns:
        ``[m, n]`` in fp64.
    """
    sizes = torch.linalg.vector_norm(deltas.flatten(1).double(), dim=1)
    left, right = [], []
    for delta, gram, share in zip(deltas, grams, shares(sizes, power), strict=True):
        wide = delta.double()
        directions, energies = essential(wide, gram, deltas.shape[1] // len(deltas))
        weights = shares(energies, energy)
        weights = weights / weights.mean() if len(weights) else weights
        left.append(directions * weights)
        right.append((directions.T @ wide) * (share * weights)[:, None])
    rows = torch.cat(right)
    if not rows.any():
        return torch.zeros_like(deltas[0], dtype=torch.float64)
    outputs, spread = polar_and_values(torch.cat(left, 1))
    inputs, strength = polar_and_values(rows * shares(torch.linalg.vector_norm(rows, dim=0), power))
    return outputs @ inputs * (TWICE * spread.mean() * strength.mean())


def essential(delta: Tensor, gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Find the directions in which outputs move most.

    Args:
        delta: ``[m, n]`` task vector of one matrix, fp64.
        gram: ``[n, n]`` second moment of its inputs, in the precision in which it was stored.
        rank: How many to find (k), at most m.

    Returns:
        ``[m, r]`` orthonormal columns, and ``[r]`` mean squares of the outputs' movement along them, descending, in
        fp64; r is below k where fewer exist: what is below the rounding of the Gram's entries is none.
    """
    rounding = torch.finfo(gram.dtype).eps * float((delta.square() @ gram.diagonal().double()).sum())
    gram = gram.to(delta)
    if delta.shape[0] <= delta.shape[1]:
        values, vectors = torch.linalg.eigh(delta @ gram @ delta.T)
        values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
    else:
        inner, basis = torch.linalg.eigh(gram)
        root = basis * inner.clamp(min=0).sqrt()
        vectors, roots, _ = truncated_svd(delta @ root, min(rank, delta.shape[1]))
        values = roots.square()
    exists = values > rounding
    return vectors[:, exists], values[exists]


def shares(sizes: Tensor, power: float) -> Tensor:
    """Return ``(size / mean)^power`` of sizes ``[n]``, at least 0; what is 0 stays 0 at any power but 0."""
    mean = sizes.mean() if len(sizes) else sizes.new_ones(())
    return (sizes / mean) ** power if mean > 0 else torch.zeros_like(sizes)


def preferred(changes: Mapping[str, Tensor], power: float) -> dict[str, float]:
    """Return a factor for every layer: its size over the mean of its kind, to a power.

    Args:
        changes: Parameter name to its change.
        power: See `EssentialSubspaceMerging`.
    """
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in changes:
        kinds[".".join("#" if part.isdigit() else part for part in name.split("."))].append(name)
    factors: dict[str, float] = {}
    for names in kinds.values():
        sizes = torch.stack([torch.linalg.vector_norm(changes[name].double()) for name in names])
        factors.update(zip(names, shares(sizes, power).tolist(), strict=True))
    return factors

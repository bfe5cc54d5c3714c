"""Merging by the Grams of the task vectors themselves: ASWUDI, SWUDI, WUDI's exact minimum, ACTMat, TACT, ACE."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from byom.errors import OptionError, fraction, one_of, positive
from byom.functional.deltas import total
from byom.functional.iterative import square
from byom.functional.selection import kept
from byom.functional.tensors import wide
from byom.merge.base import Group, TensorwiseMethod
from byom.merge.base.matrices import by_matrix, patterns
from byom.merge.cart import share_of

Normalise = Literal["norm", "trace", "none"]
Cut = float | Literal["automatic"]
PUBLISHED = {
    ("none", False, "zero", False): "ACTMat",
    ("none", False, "zero", True): "TACT",
    ("trace", True, "zero", False): "ACE, step 1",
}
"""Normalisation, centring, start and whether Grams are thinned, to the name of the exact solution."""


@dataclass(frozen=True)
class TaskGrams(TensorwiseMethod):
    """Merge each linear layer to what every task's own does on the inputs that its task vector stands for.

    With the Gram ``C_t`` of the rows of ``tau_t``, weighted by `normalise`, and ``C = sum_t C_t = V diag(lambda) Vᵀ``,
    every M with ``M C = sum_t tau_t C_t`` minimises ``sum_t tr((M - tau_t) C_t (M - tau_t)ᵀ)``. The small eigenvalues
    of C fit what no task's inputs need, and cost accuracy. So only directions with a filter ``h_k`` above 0 go to the
    minimum, and the others stay what they are in ``M_0``:
    ``M = M_0 - M_0 V diag(h) Vᵀ + (sum_t tau_t C_t) V diag(h / lambda) Vᵀ``, and ``theta = theta_0 + scale * M``.

    The defaults are ASWUDI, which takes the ``K = ceil((sum_k sqrt(lambda_k))^2 / sum_k lambda_k)`` largest.
    ``cut=0.65 time=1300`` is SWUDI on ViT-B/32 (``time=1800`` on ViT-B/16), and ``cut=1`` the exact minimum of WUDI's
    loss that is nearest to ``M_0``. ``normalise=none start=zero cut=1`` is ACTMat, with ``density=0.5`` TACT, and
    ``normalise=trace centred=true start=zero cut=1`` the first step of ACE-Merging.

    Args:
        normalise: What a task's Gram is divided by: ``norm``, the squared Frobenius norm of its task vector; ``trace``,
            its own trace, which differs where `density` or `centred` change the Gram; ``none``. A task whose Gram is
            zero weighs nothing.
        density: Share of the entries of each task vector, by magnitude, that make its Gram, in (0, 1].
        centred: Whether the mean of its rows is taken from a task vector before its Gram is made.
        cut: How many directions are solved for, those with the largest eigenvalues: a share in (0, 1], rounded up, or
            ``automatic``, the participation ratio of their square roots.
        time: Soft filter of these, ``h = 1 - exp(-lambda time)``, above 0: gradient descent that stops after a time.
            None solves for them exactly.
        start: What the other directions keep (``M_0``): the ``sum`` of the task vectors, or ``zero``.
        scale: Scaling coefficient (alpha) of M, any real number.
        rest: What other tensors get: the ``mean`` of the experts as in the authors' code, or ``pretrained``.
        exclude: Shell-style patterns of names of matrices that are not linear layers.

    Raises:
        OptionError: If a hyperparameter is unknown or out of range.

    References:
        SWUDI and ASWUDI, whose formula this is. https://arxiv.org/abs/2606.07289
        ACTMat, and TACT in its code. https://arxiv.org/abs/2604.01329
        ACE-Merging. https://arxiv.org/abs/2603.02945
        WUDI-Merging. https://arxiv.org/abs/2503.08099

    Differences:
        Everything is in fp64, theirs in fp32, with eigenvalues raised to at least 1e-8; here directions that C does not
        have up to rounding keep ``M_0``. ACTMat's code inverts the sum of the Grams with the tolerance of
        ``torch.linalg.pinv``. ACE adds a regulariser to the sum and a second step; its published notes and its peers'
        code name these differently, and only the estimate of the Grams is here, as ACTMat's repository compares it.
        They call every matrix a linear layer, embeddings too (``exclude=[]``).
    """

    normalise: Normalise = "norm"
    density: float = 1.0
    centred: bool = False
    cut: Cut = "automatic"
    time: float | None = None
    start: Literal["sum", "zero"] = "sum"
    scale: float = 1.0
    rest: Literal["mean", "pretrained"] = "mean"
    exclude: tuple[str, ...] = ("*embed*", "*text_projection*", "*visual.proj")

    elementwise = False
    title = "Task Grams"
    grid: ClassVar = {"scale": (0.5, 0.75, 1.0, 1.25, 1.5)}

    def __post_init__(self) -> None:
        one_of("merge.normalise", self.normalise, ("norm", "trace", "none"))
        one_of("merge.start", self.start, ("sum", "zero"))
        one_of("merge.rest", self.rest, ("mean", "pretrained"))
        share("merge.density", self.density)
        if self.cut != "automatic":
            if isinstance(self.cut, str):
                raise OptionError(f"merge.cut={self.cut} is neither a share in (0, 1] nor automatic")
            share("merge.cut", self.cut)
        if self.time is not None:
            positive("merge.time", self.time, "1300")
        object.__setattr__(self, "exclude", patterns("merge.exclude", self.exclude))
        object.__setattr__(self, "title", self._known_as())

    def _known_as(self) -> str:
        """Return the name under which these options were published; the class's title where they were not."""
        estimate = self.normalise, self.centred, self.start, self.density < 1
        exact = self.cut == 1 and self.time is None
        if estimate == ("norm", False, "sum", False):
            return "ASWUDI" if self.cut == "automatic" and self.time is None else "WUDI, exact" if exact else "SWUDI"
        return PUBLISHED.get(estimate, self.title) if exact else self.title

    def merge(self, group: Group) -> Tensor:
        """Return ``theta_0 + scale * M`` for a linear layer's matrix, and what `rest` says for other tensors."""
        change = by_matrix(group.name, group.deltas, self._solve, self.exclude)
        if change is not None:
            return group.pretrained + self.scale * change
        if self.rest == "pretrained":
            return wide(group.pretrained)
        return group.pretrained + self.scale * (total(group.deltas) / len(group.experts))

    def _solve(self, deltas: Tensor) -> Tensor:
        gram = deltas.new_zeros(deltas.shape[-1], deltas.shape[-1], dtype=torch.float64)
        right = torch.zeros_like(deltas[0], dtype=torch.float64)
        for delta in deltas.double():
            of_task = self._gram(delta)
            gram += of_task
            right += delta @ of_task
        start = total(deltas).double() if self.start == "sum" else torch.zeros_like(right)
        return filtered(gram, right - start @ gram, self._directions, self.time) + start

    def _gram(self, delta: Tensor) -> Tensor:
        rows = delta if self.density == 1.0 else largest(delta, self.density)
        rows = rows - rows.mean(0) if self.centred else rows
        gram = square(rows)
        size = {"norm": delta.square().sum(), "trace": gram.trace(), "none": gram.new_ones(())}[self.normalise]
        return gram / size if size > 0 else torch.zeros_like(gram)

    def _directions(self, values: Tensor) -> int:
        if self.cut == "automatic":
            return participation(values)
        return share_of(float(self.cut), len(values))


def share(option: str, value: float) -> None:
    """Refuse what is not in (0, 1].

    Raises:
        OptionError: Naming the option.
    """
    if fraction(option, value) == 0:
        raise OptionError(f"{option}=0 leaves nothing; give a share in (0, 1]")


def largest(matrix: Tensor, density: float) -> Tensor:
    """Return a matrix whose entries but a share, the largest by magnitude, are 0; of equal ones the first are kept."""
    order = matrix.abs().flatten().argsort(descending=True, stable=True)[: kept(density, matrix.numel())]
    thinned = torch.zeros_like(matrix)
    thinned.view(-1)[order] = matrix.reshape(-1)[order]
    return thinned


def participation(values: Tensor) -> int:
    """Return how many directions take part: ``ceil((sum sqrt(lambda))^2 / sum lambda)``.

    Args:
        values: ``[n]`` eigenvalues, not negative.

    Returns:
        At least 1 and at most n; 0 if all are 0.
    """
    whole = values.sum()
    if not whole:
        return 0
    return min(len(values), math.ceil(round(float(values.sqrt().sum() ** 2 / whole), 6)))


def filtered(gram: Tensor, right: Tensor, directions: Callable[[Tensor], int], time: float | None) -> Tensor:
    """Solve ``X G = R`` in the leading directions of G.

    Args:
        gram: ``[n, n]`` symmetric, positive semi-definite, fp64 (G).
        right: ``[m, n]`` fp64, its rows in the range of G (R).
        directions: From the eigenvalues, descending, to the number of directions.
        time: See `TaskGrams`.

    Returns:
        ``[m, n]``, 0 in all other directions, and in those that G does not have up to rounding.
    """
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    exists = int((values > len(values) * torch.finfo(values.dtype).eps * values[:1]).sum())
    count = min(exists, directions(values))
    values, vectors = values[:count], vectors[:, :count]
    shares = (1 if time is None else -torch.expm1(-values * time)) / values
    return right @ vectors * shares @ vectors.T

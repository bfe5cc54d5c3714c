"""Adaptive weight disentanglement (AWD), before any merge method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from byom.errors import OptionError, at_least, one_of, positive, whole
from byom.functional.deltas import inner_products, total
from byom.functional.linalg import VANISHING
from byom.functional.tensors import wide
from byom.merge.base import MergeMethod, Problem
from byom.merge.base.checks import require_experts
from byom.merge.base.wrapper import Wrapper
from byom.merge.task_arithmetic import TaskArithmetic
from byom.weights import Weights

ROUNDING = 1e-12  # a loss is lower by more than this, or not at all


@dataclass(frozen=True)
class AdaptiveWeightDisentanglement(Wrapper):
    """Subtract from all task vectors what makes them alike, and merge what is left by another method.

    The redundant vector ``delta`` minimises ``L = mean_{i != j} |cos(tau_i - delta, tau_j - delta)| + penalty *
    ||delta|| / s`` with ``s`` the root mean square of the norms ``||tau_t||``; the experts ``theta_t - delta`` are then
    merged by `then` in fp32. Gradients lie in the span of the task vectors, so ``delta = sum_t c_t tau_t``, and the T
    coefficients need nothing but the ``T x T`` inner products: one pass over the models, then small algebra.

    Plain gradient descent starts at ``delta = 0``, and the best of all its points is taken, so L never rises. Task
    vectors that are orthogonal, or all equal, or all zero give ``delta = 0``, hence `then` on the experts as they
    are. A vector of norm 0 has cosine 0 with every other. Statistics stay those of the experts as fine-tuned.

    Args:
        then: The method that merges what is left.
        penalty: Weight of the norm of ``delta`` (alpha), at least 0; a large one gives ``delta = 0``.
        rate: Step size in units of ``s^2``, above 0.
        steps: Number of steps, at least 0; 0 is `then` itself.
        scope: ``global`` finds one set of coefficients for the whole model, ``tensor`` one for each parameter.

    Raises:
        OptionError: If a hyperparameter is out of range, `then` does not merge the experts alone, or there is only
            one task, which has nothing in common with another.

    References:
        Multi-Task Model Merging via Adaptive Weight Disentanglement. https://arxiv.org/abs/2411.18729

    Differences:
        The authors released no code. Optimiser, step size, penalty and whether cosines are of the whole model are
        not settled: their norm is not divided by ``s``, so that penalty and rate depend on the size of the task
        vectors; here nothing does. Adam, which others use, leaves the span of the task vectors.
    """

    then: MergeMethod = field(default_factory=TaskArithmetic)
    penalty: float = 0.1
    rate: float = 0.01
    steps: int = 300
    scope: Literal["global", "tensor"] = "global"

    title = "AWD"
    grid: ClassVar = {}

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("merge.penalty", self.penalty, 0, "0.1")
        positive("merge.rate", self.rate, "0.01")
        whole("merge.steps", self.steps, 0)
        one_of("merge.scope", self.scope, ("global", "tensor"))
        require_experts(self.then)

    def __call__(self, problem: Problem) -> Weights:
        """Find the coefficients, then merge lazily; see `MergeMethod.__call__`."""
        self.check(problem)
        problem = problem.settled()
        if len(problem.tasks) < 2:
            raise OptionError("AWD compares task vectors, and there is one task; give two or more, or merge without it")
        shared = self._shared(problem)
        left = {task: _without(expert, problem.pretrained, shared) for task, expert in problem.finetuned.items()}
        return self.then(replace(problem, finetuned=left))

    def _shared(self, problem: Problem) -> Callable[[str], Tensor]:
        """Return what reads delta, holding that of one parameter."""
        names = problem.pretrained.mergeable()
        whole = None
        if self.scope == "global":
            nothing = torch.zeros(len(problem.tasks), len(problem.tasks), dtype=torch.float64)
            whole = self._coefficients(sum((inner_products(problem.group(name).deltas) for name in names), nothing))

        def read(name: str) -> Tensor:
            deltas = problem.group(name).deltas
            coefficients = self._coefficients(inner_products(deltas)) if whole is None else whole
            return total(deltas * coefficients.to(deltas).reshape(-1, *[1] * (deltas.dim() - 1)))

        return lru_cache(maxsize=1)(read)  # every expert asks for the same parameter in turn

    def _coefficients(self, gram: Tensor) -> Tensor:
        return redundant(gram, self.penalty, self.rate, self.steps)


def _without(expert: Weights, base: Weights, shared: Callable[[str], Tensor]) -> Weights:
    def read(name: str) -> Tensor:
        if not expert.merges(name):
            return expert[name]
        return wide(expert.read_finite(name)) - shared(name)

    return (expert - base).derived(read, expert.origin)


def redundant(gram: Tensor, penalty: float, rate: float, steps: int) -> Tensor:
    """Find the redundant vector of task vectors that are known by their inner products.

    Args:
        gram: ``[T, T]`` inner products between task vectors.
        penalty: Weight of its norm (alpha).
        rate: Step size.
        steps: Number of steps.

    Returns:
        ``[T]`` its coefficients.
    """
    values, basis = torch.linalg.eigh(gram)
    spanned = values > VANISHING**2 * values.max()
    roots, basis = values[spanned].sqrt(), basis[:, spanned]
    size = gram.diagonal().mean().sqrt()
    return basis @ (disentangle(basis * (roots / size), penalty, rate, steps) * size / roots)


def disentangle(vectors: Tensor, penalty: float, rate: float, steps: int) -> Tensor:
    """Find the redundant vector by gradient descent from 0.

    Args:
        vectors: ``[T, r]`` task vectors in any orthonormal basis of what they span, of mean square norm 1.
        penalty: Weight of its norm (alpha).
        rate: Step size.
        steps: Number of steps.

    Returns:
        ``[r]``, the point of lowest loss met.
    """
    best = point = vectors.new_zeros(vectors.shape[1])
    lowest = loss(vectors, point, penalty)
    for _ in range(steps):
        point = point - rate * gradient(vectors, point, penalty)
        reached = loss(vectors, point, penalty)
        if reached < lowest - ROUNDING:
            best, lowest = point, reached
    return best


def loss(vectors: Tensor, point: Tensor, penalty: float) -> float:
    """Return the mean absolute cosine of what is left, plus the penalised norm of what is subtracted (L).

    Args:
        vectors: ``[T, r]`` task vectors.
        point: ``[r]`` what is subtracted (delta).
        penalty: Weight of its norm.

    Returns:
        A number in [0, 1 + penalty * norm].
    """
    cosines, _, _ = _left(vectors, point)
    return float(cosines.abs().sum() / _pairs(vectors) + penalty * point.norm())


def gradient(vectors: Tensor, point: Tensor, penalty: float) -> Tensor:
    """Return the gradient of `loss` with respect to the point; what has no derivative contributes 0.

    Args:
        vectors: ``[T, r]`` task vectors.
        point: ``[r]`` what is subtracted (delta).
        penalty: Weight of its norm.

    Returns:
        ``[r]``.
    """
    cosines, units, inverse = _left(vectors, point)
    pull = cosines.sign() @ units - cosines.abs().sum(1, keepdim=True) * units
    return penalty * _unit(point)[0] - 2 / _pairs(vectors) * (inverse * pull).sum(0)


def _left(vectors: Tensor, point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the cosines of what is left, 0 on the diagonal, its directions and its inverse norms."""
    units, inverse = _unit(vectors - point)
    return (units @ units.T).fill_diagonal_(0), units, inverse


def _unit(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return directions and inverse norms along the last axis, 0 for a vector of norm 0."""
    norms = vectors.norm(dim=-1, keepdim=True)
    inverse = torch.where(norms > 0, 1 / norms, 0.0)
    return vectors * inverse, inverse


def _pairs(vectors: Tensor) -> int:
    return len(vectors) * (len(vectors) - 1)

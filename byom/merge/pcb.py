"""Parameter competition balancing (PCB-Merging)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from byom.errors import fraction
from byom.functional.deltas import total
from byom.functional.selection import Part, kept, locate
from byom.merge.base import Group, PlannedMethod, Problem, blockwise
from byom.weights.cuts import differences

LEAST = 1e-12  # a sum of shares below this is not a competition; the value of the authors


class Range(NamedTuple):
    """A lower and an upper bound."""

    low: float
    high: float


class Ranges(NamedTuple):
    """Knowledge of the whole model, for each task: the range of its sizes, and that of its scores."""

    sizes: Sequence[Range]
    scores: Sequence[Range]


@dataclass(frozen=True)
class ParameterCompetitionBalancing(PlannedMethod):
    """Weigh each change by how large it is within its task and how well it agrees with all tasks together.

    With ``b_t = minmax(|tau_t|)^2`` over the whole model: ``score_t = exp(T b_t) tanh(tau_t * sum_s tau_s)``; the share
    ``s_t = minmax(max(score_t, q_t))`` with q_t the ``floor(density * d)``-th largest score of the task;
    ``theta = theta_0 + scale * sum_t s_t tau_t / sum_t s_t``. What scores q_t or less has share 0. A task whose
    scores are all equal has no share anywhere, and so has every task if ``density * d < 1``.

    It is not linear in the size of the task vectors, because of the tanh. Planning reads all experts four times per
    task, and holds one parameter of every model.

    Args:
        density: Fraction of each task's parameters that take part (r), in [0, 1].
        scale: Scaling coefficient (lambda), any real number.
        clip: Fraction of smallest and of largest magnitudes that are raised and lowered to the next ones, in
            [0, 0.5).

    Raises:
        OptionError: If a hyperparameter is out of range.

    References:
        Parameter Competition Balancing for Model Merging. https://arxiv.org/abs/2410.02396

    Differences:
        The authors' code has three variants; this is the one of the file at its root. Their vision script clips 1 %,
        takes normalised sums and 5 %; their evolutionary one searches a scale per task. They count positions with
        ``int(d * (1 - clip) - 1)``, which lowers the largest magnitude even where ``clip * d < 1``, divide 0 by 0 where
        all sizes or scores are equal, and overflow fp32 from 89 tasks on: here the exponent is ``T (b_t - 1)``, a
        factor that minmax takes out.
    """

    density: float = 0.1
    scale: float = 1.2
    clip: float = 1e-4

    title = "PCB-Merging"
    grid: ClassVar = {"scale": (0.8, 0.9, 1.0, 1.1, 1.2, 1.3)}

    def __post_init__(self) -> None:
        fraction("merge.density", self.density)
        fraction("merge.clip", self.clip, below=0.5)

    def plan(self, problem: Problem) -> Ranges:
        """Find the bounds of each task's sizes, then of its scores."""
        sizes = [self._sizes(problem, task) for task in problem.tasks]
        read = _reader(problem)
        return Ranges(sizes, [self._scores(problem, read, index, bounds) for index, bounds in enumerate(sizes)])

    def merge(self, group: Group, plan: Ranges) -> Tensor:
        """Return ``theta_0`` plus the scaled mean change, weighted by the tasks' shares, block by block."""
        return blockwise(group, lambda _, piece: piece.pretrained + self.scale * balanced(piece.deltas, plan))

    def _sizes(self, problem: Problem, task: str) -> Range:
        base, expert = problem.pretrained, problem.finetuned[task]
        clipped, d = kept(self.clip, base.numel), base.numel
        if d == 0:
            return Range(0.0, 0.0)
        high, low = _ranked(differences(expert, base), [clipped + 1, d - clipped])
        return Range(low, high)

    def _scores(self, problem: Problem, read: Reader, index: int, sizes: Range) -> Range:
        d = problem.pretrained.numel
        count = kept(self.density, d)
        if count == 0:
            return Range(0.0, 0.0)

        def parts(sign: int) -> list[Part]:
            def scored(name: str, at: slice | Tensor) -> Tensor:
                deltas = read(name, at)
                return (sign * score(deltas[index], total(deltas), sizes, len(deltas))).clamp(min=0)

            return [Part(_numel(problem, name), partial(scored, name)) for name in problem.pretrained.mergeable()]

        high, low = _ranked(parts(1), [1, count])
        if low <= 0:  # fewer are positive than take part: the rest is ranked from below
            least, below = _ranked(parts(-1), [d, d - count + 1])
            low, high = -below, high or -least
        return Range(low, high)


def score(delta: Tensor, together: Tensor, sizes: Range, tasks: int) -> Tensor:
    """Return how a task's changes fare in the competition, up to a factor that is the same for all.

    Args:
        delta: ``[*shape]`` the task vector.
        together: ``[*shape]`` the sum of all task vectors.
        sizes: Bounds of the task's magnitudes.
        tasks: Number of tasks (T).

    Returns:
        ``[*shape]`` in (-1, 1).
    """
    within = minmax(delta.abs(), sizes).square_()
    return (tasks * (within - 1)).exp_() * (delta * together).tanh_()


def balanced(deltas: Tensor, plan: Ranges) -> Tensor:
    """Average the task vectors by their shares.

    Args:
        deltas: ``[T, *shape]`` task vectors.
        plan: The bounds of sizes and scores.

    Returns:
        ``[*shape]``; 0 where no task has a share.
    """
    together = total(deltas)
    shares, changes = torch.empty_like(deltas), torch.empty_like(deltas)
    for t, (delta, sizes, scores) in enumerate(zip(deltas, plan.sizes, plan.scores, strict=True)):
        shares[t] = minmax(score(delta, together, sizes, len(deltas)), scores)
        changes[t] = delta.sign() * delta.abs().clamp(*sizes)
    return total(changes * shares) / total(shares).clamp_(min=LEAST)


def minmax(values: Tensor, bounds: Range) -> Tensor:
    """Clamp to the bounds and map them to 0 and 1; all 0 where the bounds are equal."""
    span = bounds.high - bounds.low
    return (values.clamp(*bounds) - bounds.low) / span if span > 0 else torch.zeros_like(values)


Reader = Callable[[str, "slice | Tensor"], Tensor]


def _reader(problem: Problem) -> Reader:
    """Return what reads the task vectors ``[T, n]`` of a flat piece of a parameter."""
    group = lru_cache(maxsize=1)(problem.group)  # a stream asks for piece after piece of one parameter

    def read(name: str, at: slice | Tensor) -> Tensor:
        whole = group(name)
        return Group(name, whole.pretrained.reshape(-1)[at], tuple(e.reshape(-1)[at] for e in whole.experts)).deltas

    return read


def _ranked(parts: Sequence[Part], ranks: Sequence[int]) -> list[float]:
    """Return the magnitudes of given ranks, 1 being the largest."""
    padded = [*parts, Part.of(torch.zeros(1))]  # the cut that keeps everything does not tell the smallest magnitude
    return [cut.threshold for cut in locate(padded, ranks)]


def _numel(problem: Problem, name: str) -> int:
    return torch.Size(problem.pretrained.shape(name)).numel()

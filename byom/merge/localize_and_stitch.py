"""Localize-and-Stitch: each task's few entries that matter, found by magnitude or learned, in one model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import softplus
from tqdm import tqdm

from byom.errors import at_least, fraction, one_of
from byom.functional.deltas import total
from byom.functional.heads import loss
from byom.functional.selection import Part, kept, locate
from byom.functional.tensors import wide
from byom.merge.base import Group, PlannedMethod, Problem, blockwise
from byom.merge.base.descent import require, shuffled, where
from byom.merge.base.matrices import patterns
from byom.merge.base.needs import Needs
from byom.merge.base.probe import Batch
from byom.weights import Weights
from byom.weights.cuts import Cuts, cuts

START = 5.0  # magnitude of every score before learning: sigmoid(5) = 0.993


@dataclass(frozen=True)
class LocalizeAndStitch(PlannedMethod):
    """Move only each task's few entries that matter into one model, averaging where tasks overlap.

    With a mask ``m_t`` of `density` of the entries per task:
    ``theta = theta_0 + sum_t m_t tau_t / max(sum_t m_t, 1)``, element by element. Nothing has to be scaled.

    Masks are the top entries of ``|tau_t|`` (``dataless``), or learned from a few labelled training examples: scores
    S start at +5 on those entries and at -5 elsewhere, Adam minimises ``k * loss(theta_0 + sigmoid(S) tau_t) +
    penalty * sum(sigmoid(S))``, and the k entries of highest score stay. Learning holds about 9 d fp32 numbers, one
    task at a time, and a byte for each entry of every task's mask.

    Args:
        density: Fraction of entries kept per task, in [0, 1]; exactly ``k = floor(density * n)`` survive, ties going to
            the lowest position, with n the number of entries that take part. The paper learns masks of 0.01.
        exclude: Shell-style patterns of parameter names that stay pre-trained and are not counted.
        masks: ``dataless`` or ``learned``; only the latter looks at inputs and labels, and at the options below.
        shots: Training examples of each class, at least 1.
        penalty: What a mask of k entries costs, in nats of the loss (mu); 0 or more.
        learning_rate: Adam's, in scores.
        steps: Adam steps per task; 0 leaves the masks as without data.
        batch_size: Examples in a batch.
        seed: Draws and orders the examples.

    Raises:
        OptionError: If a hyperparameter is out of range, or `exclude` is not a list of patterns.

    References:
        Localize-and-Stitch: Efficient Model Merging via Sparse Task Arithmetic, sections 3 and 4.
        https://arxiv.org/abs/2408.13656

    Differences:
        The authors' code keeps magnitudes strictly above the threshold, hence one less, and the script without data
        sets an attribute that the class does not read. They learn by plain gradient steps at a rate of 1e7, one per
        epoch of 10, from the top 0.001 %, with a penalty that as coded pushes scores away from 0; here Adam takes
        the steps, the penalty is the paper's, masks start from the top `density` and end with as many entries.
        `exclude` is theirs, for open_clip; no name of other backbones may match it.
    """

    density: float = 0.05
    exclude: tuple[str, ...] = (
        "*positional_embedding*",
        "*text_projection*",
        "*logit_scale*",
        "*token_embedding*",
        "*ln_final*",
    )
    masks: Literal["dataless", "learned"] = "dataless"
    shots: int = 64
    penalty: float = 1.0
    learning_rate: float = 0.1
    steps: int = 100
    batch_size: int = 64
    seed: int = 0

    title = "Localize-and-Stitch"
    grid: ClassVar = {"density": (0.01, 0.05, 0.1, 0.2)}

    def __post_init__(self) -> None:
        fraction("merge.density", self.density)
        object.__setattr__(self, "exclude", patterns("merge.exclude", self.exclude))
        one_of("merge.masks", self.masks, ("dataless", "learned"))
        at_least("merge.penalty", self.penalty, 0, "1")
        require("merge", self.steps, self.learning_rate, shots=self.shots, batch_size=self.batch_size)

    @property
    def needs(self) -> Needs:
        """Labelled training inputs where masks are learned."""
        return Needs(inputs=frozenset({"train"}), labels=True) if self.masks == "learned" else Needs()

    def plan(self, problem: Problem) -> Sequence[Mask]:
        """Find each task's mask over what is not excluded."""
        base = self._included(problem.pretrained)
        largest = {t: cuts(self._included(expert), base, self.density) for t, expert in problem.finetuned.items()}
        if self.masks == "dataless":
            return [Largest(cuts) for cuts in largest.values()]
        learning = Learning(
            self.density, self.shots, self.penalty, self.learning_rate, self.steps, self.batch_size, self.seed
        )
        return [learning.mask(problem, task, start) for task, start in largest.items()]

    def merge(self, group: Group, plan: Sequence[Mask]) -> Tensor:
        """Return the stitched parameter, block by block; an excluded one as it was pre-trained."""
        if self._excluded(group.name):
            return wide(group.pretrained)

        def stitched(start: int, piece: Group) -> Tensor:
            deltas = piece.deltas
            masks = [mask.of(group.name, delta, start) for mask, delta in zip(plan, deltas, strict=True)]
            return piece.pretrained + stitch(deltas, torch.stack(masks))

        return blockwise(group, stitched)

    def _excluded(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.exclude)

    def _included(self, weights: Weights) -> Weights:
        """Leave the excluded out; without any, the weights themselves, with the checksums of their file."""
        touched = any(self._excluded(name) for name in weights)
        return weights.select(lambda name: not self._excluded(name)) if touched else weights


class Mask(Protocol):
    """The entries of one task that matter."""

    def of(self, name: str, delta: Tensor, start: int) -> Tensor:
        """Return the mask of a piece of a parameter.

        Args:
            name: The parameter.
            delta: ``[n]``, a piece of its task vector.
            start: Flat offset of the piece.

        Returns:
            Bool ``[n]``.
        """
        ...


@dataclass(frozen=True)
class Largest:
    """The entries above a cut in magnitude."""

    cuts: Cuts

    def of(self, name: str, delta: Tensor, start: int) -> Tensor:
        """Return the mask of a piece; see `Mask`."""
        cut, offset = self.cuts[name]
        return cut.mask(delta, offset + start)


@dataclass(frozen=True)
class LearntMask:
    """Masks by parameter, in memory."""

    masks: Mapping[str, Tensor]

    def of(self, name: str, delta: Tensor, start: int) -> Tensor:
        """Return the mask of a piece; see `Mask`."""
        return self.masks[name].reshape(-1)[start : start + delta.numel()].reshape(delta.shape)


@dataclass(frozen=True)
class Learning:
    """Learns a task's mask from labelled training examples; `LocalizeAndStitch` explains the options."""

    density: float
    shots: int
    penalty: float
    learning_rate: float
    steps: int
    batch_size: int
    seed: int

    def mask(self, problem: Problem, task: str, start: Cuts) -> LearntMask:
        """Return a task's mask.

        Args:
            problem: The models, and the probe.
            task: The task.
            start: Which entries start at a score of +5; the others start at -5.
        """
        if not start:
            return LearntMask({})
        scored = Scored(problem, task, start)
        count = kept(self.density, sum(score.numel() for score in scored.scores.values()))
        optimizer = torch.optim.Adam(scored.scores.values(), lr=self.learning_rate)
        for batch in self._batches(problem, task):
            scored.backward(problem, task, batch, count, self.penalty)
            optimizer.step()
        return LearntMask(top({name: score.detach() for name, score in scored.scores.items()}, count))

    def _batches(self, problem: Problem, task: str) -> Iterator[Batch]:
        probe = problem.inputs()
        places = probe.shots(task, "train", self.shots, self.seed)
        order = shuffled(len(places), self.batch_size, self.seed, task, "localize")
        for _ in tqdm(range(self.steps), desc=f"localize {task}", unit="step", leave=False, mininterval=1):
            yield probe.take(task, "train", places[next(order)])


class Scored:
    """``theta_0 + sigmoid(S) tau_t`` for one task, differentiable in the scores S without a graph over them.

    Args:
        problem: The models, and the probe.
        task: The task.
        start: Which entries start at a score of +5; the others start at -5.
    """

    def __init__(self, problem: Problem, task: str, start: Cuts) -> None:
        device = where(problem, "train")
        base, expert = problem.pretrained, problem.finetuned[task]
        self.base = {name: base[name].float().to(device) for name in start}
        deltas = {name: wide(expert[name]) - wide(base[name]) for name in start}
        masks = {name: cut.mask(deltas[name], offset) for name, (cut, offset) in start.items()}
        self.delta = {name: delta.float().to(device) for name, delta in deltas.items()}
        self.scores = {name: (mask.float() * 2 - 1).mul_(START).to(device) for name, mask in masks.items()}

    def backward(self, problem: Problem, task: str, batch: Batch, count: int, penalty: float) -> None:
        """Give the scores the gradient of ``count * loss + penalty * sum(sigmoid(S))``."""
        probe = problem.inputs()
        shares = {name: score.sigmoid() for name, score in self.scores.items()}
        state = {name: torch.addcmul(self.base[name], shares[name], self.delta[name]) for name in shares}
        state = {name: theta.requires_grad_() for name, theta in state.items()}
        head = probe.readout(task)
        logits = head(probe.encode(state, batch.inputs))
        loss(head, logits, batch.labels.to(logits.device)).backward()
        for name, share in shares.items():
            gradient = state[name].grad
            slope = penalty if gradient is None else (count * gradient).mul_(self.delta[name]).add_(penalty)
            self.scores[name].grad = (1 - share).mul_(share).mul_(slope)


def top(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Return masks of the `count` highest scores of all tensors together, ties going to the lowest position.

    Args:
        scores: Parameter name to scores of any sign.
        count: Entries kept.

    Returns:
        Parameter name to a bool tensor, on the CPU.
    """
    names = sorted(scores)
    sizes = [softplus(scores[name].cpu()) for name in names]  # positive and in the same order: cuts rank magnitudes
    (cut,) = locate([Part.of(size) for size in sizes], [count])
    offsets = accumulate((size.numel() for size in sizes), initial=0)
    return {name: cut.mask(size, offset) for name, size, offset in zip(names, sizes, offsets, strict=False)}


def stitch(deltas: Tensor, masks: Tensor) -> Tensor:
    """Add masked task vectors, averaging where several masks are set.

    Args:
        deltas: ``[T, *shape]`` task vectors.
        masks: Bool ``[T, *shape]``.

    Returns:
        ``[*shape]``; 0 where no mask is set.
    """
    masks = masks.to(deltas.device)
    return total(deltas * masks) / masks.sum(0).clamp_(min=1)

"""AdaRank: which singular components of the task vectors to add, learned on unlabelled inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from byom.errors import OptionError, fraction, one_of, positive
from byom.functional.deltas import total
from byom.functional.tensors import wide
from byom.merge.adamerging import entropies
from byom.merge.base import Group, PlannedMethod, Problem
from byom.merge.base.components import Components
from byom.merge.base.descent import (
    Blend,
    Origin,
    Vectors,
    blended,
    pretrained,
    require,
    require_unlabelled,
    unchanged,
)
from byom.merge.base.matrices import is_matrix, is_stack, patterns
from byom.merge.base.needs import Needs
from byom.merge.cart import share_of

Start = Literal["task_arithmetic", "cart"]
RANKS: dict[Start, float] = {"task_arithmetic": 1.0, "cart": 0.16}
SCALES: dict[Start, float] = {"task_arithmetic": 0.3, "cart": 2.3}
DISTANCE = 0.1  # of every score from 0 before learning
TEMPERATURE = 10.0  # scores are divided by it before the sigmoid whose slope stands for that of a step


@dataclass(frozen=True)
class Pruned:
    """The outcome of learning.

    Args:
        coefficients: Parameter name to ``[T]`` (lambda).
        changes: Name of a matrix of which components are off to ``sum_t lambda_t tau_t`` without them, on the CPU.
        masks: Matrix to bool ``[T, r]``, on where a component is kept, on the CPU.
    """

    coefficients: dict[str, Tensor]
    changes: dict[str, Tensor]
    masks: dict[str, Tensor]


@dataclass(frozen=True)
class AdaptiveRankPruning(PlannedMethod):
    """Learn which singular components of each task vector to add, by making predictions on unlabelled inputs certain.

    With ``tau_t = sum_i s_ti u_ti v_tiᵀ``, ``theta = theta_0 + sum_t lambda_t sum_i [z_ti > 0] s_ti u_ti v_tiᵀ`` for
    every matrix, and ``theta_0 + sum_t lambda_t tau_t`` for other tensors, where scores z and coefficients lambda of
    every task and tensor minimise ``sum_t mean_x H(softmax(f_t(x; theta)))``, H the entropy. Backward, the step
    ``[z > 0]`` has the slope of ``sigmoid(z / 10)``. Scores start 0.1 above or below 0.

    ``start=task_arithmetic`` has all components on. ``start=cart`` takes the average for theta_0, hence
    ``theta_t - theta_avg`` for tau_t, and has the leading 16 % on: without steps it is CART.

    A step costs AdaMerging's and the product of every gradient with all singular vectors, ``2 T r m n`` operations for
    r components of a matrix ``[m, n]``. Forward and backward passes over N tokens cost ``6 N m n``, so that is a share
    ``T r / (3 N)``: 0.3 for eight tasks on ViT-B/32 with 128 images. Components are added to theta, or taken out, where
    their score has changed its sign, not all of them in every step. Learning holds AdaMerging's ``(T + 3) d`` fp32
    numbers and the singular vectors, ``T r (m + n)`` for every matrix: twice ``T d`` for square ones. `candidates` cuts
    both. The merged model keeps one change, d numbers.

    Adam moves every score by about `learning_rate` whatever its slope, so that few inputs turn components on and off by
    chance: fewer steps at a higher rate are not the same method sooner.

    Args:
        start: What is pruned: ``task_arithmetic`` or ``cart``, which the authors call TA+ and CART+.
        rank: Share of a matrix's components that are on before learning, the largest first, in [0, 1]; None takes 1 for
            ``task_arithmetic`` and 0.16 for ``cart``.
        scale: Initial coefficient (lambda), above 0; None takes 0.3 and 2.3.
        coefficients: Whether lambda is ``learned``, too, as in the authors' code, or ``fixed``.
        candidates: Share of a matrix's components that may be on, the largest first, in (0, 1].
        inputs: Whose inputs are looked at, ``test`` or ``validation``; labels never are.
        learning_rate: Adam's, of scores and coefficients.
        steps: Adam steps; 0 leaves everything where it starts. A score changes its sign after 0.1 / `learning_rate`
            steps at the earliest.
        batch_size: Inputs of every task in a step.
        seed: Orders the inputs.
        exclude: Shell-style patterns of names of matrices whose task vectors are added whole.

    Raises:
        OptionError: If a hyperparameter is out of range, or the problem has no inputs.

    References:
        AdaRank: Adaptive Rank Pruning for Enhanced Model Merging, and its code. https://arxiv.org/abs/2503.22178

    Differences:
        The authors adapt on the inputs that they report accuracy on, and so do we by default; tables flag it. Their
        code (github.com/david3684/AdaRank, read in November 2026) also evaluates on labelled test data every 500 steps
        and remembers the best; here the last step's model counts. They round ranks down, we up as CART does, and add
        all components again in every step, where rounding differs. Their masks are on attention's and MLPs' weights by
        name; here on every matrix but `exclude`. Matrices of several experts in one tensor are added whole.
    """

    start: Start = "task_arithmetic"
    rank: float | None = None
    scale: float | None = None
    coefficients: Literal["learned", "fixed"] = "learned"
    candidates: float = 1.0
    inputs: Literal["test", "validation"] = "test"
    learning_rate: float = 1e-3
    steps: int = 10_000
    batch_size: int = 16
    seed: int = 0
    exclude: tuple[str, ...] = ("*embed*", "*text_projection*", "*visual.proj")

    title = "AdaRank"

    def __post_init__(self) -> None:
        one_of("merge.start", self.start, ("task_arithmetic", "cart"))
        one_of("merge.coefficients", self.coefficients, ("learned", "fixed"))
        if self.rank is not None:
            fraction("merge.rank", self.rank)
        if self.scale is not None:
            positive("merge.scale", self.scale, "0.3")
        if fraction("merge.candidates", self.candidates) == 0:
            raise OptionError("merge.candidates=0 leaves no component to add; give a share in (0, 1]")
        require_unlabelled("merge", self.inputs)
        require("merge", self.steps, self.learning_rate, batch_size=self.batch_size)
        object.__setattr__(self, "exclude", patterns("merge.exclude", self.exclude))

    @property
    def needs(self) -> Needs:
        """Unlabelled inputs of one split."""
        return Needs(inputs=frozenset({self.inputs}))

    def simpler(self, problem: Problem) -> list[str]:
        """Name the tensors that pack matrices of several experts, whose task vectors are added whole."""
        base = problem.pretrained
        return [name for name in base.mergeable() if is_stack(name, base.shape(name), self.exclude)]

    def plan(self, problem: Problem) -> Pruned:
        """Learn the masks and coefficients."""
        blend = Blend(problem, self.inputs, self._vectors, self._origin)
        coefficients = blend.start(SCALES[self.start] if self.scale is None else self.scale)
        masks = Masks(blend, self._parts(blend), RANKS[self.start] if self.rank is None else self.rank)
        self._descend(problem, blend, masks, coefficients)
        rows = dict(zip(blend.names, coefficients.detach(), strict=True))
        changes = {name: self._change(problem.group(name), masks, rows[name]) for name in masks.pruned()}
        return Pruned(rows, changes, {name: masks.on[name].cpu() for name in masks.parts})

    def merge(self, group: Group, plan: Pruned) -> Tensor:
        """Return one parameter without the components that are off."""
        if group.name in plan.changes:
            return self._origin(group) + plan.changes[group.name].to(group.pretrained.device)
        return blended(group, plan.coefficients[group.name], self._vectors, self._origin)

    @property
    def _vectors(self) -> Vectors:
        return centred if self.start == "cart" else unchanged

    @property
    def _origin(self) -> Origin:
        return average if self.start == "cart" else pretrained

    def _parts(self, blend: Blend) -> dict[str, Components]:
        parts = {}
        for name in tqdm(blend.names, desc="decompose", unit="tensor", leave=False, mininterval=1):
            deltas = blend.vectors[name]
            if is_matrix(name, deltas.shape[1:], self.exclude) and deltas.any():
                parts[name] = Components.of(deltas, share_of(self.candidates, min(deltas.shape[1:])))
        return parts

    def _descend(self, problem: Problem, blend: Blend, masks: Masks, coefficients: Tensor) -> None:
        probe = problem.inputs()
        learnt = [masks.scores, coefficients] if self.coefficients == "learned" else [masks.scores]
        optimizer = torch.optim.Adam(learnt, lr=self.learning_rate)
        streams = [(t, probe.batches(t, self.inputs, self.batch_size, self.seed)) for t in problem.tasks]
        for _ in tqdm(range(self.steps), desc=self.title, unit="step", leave=False, mininterval=1):
            thetas = blend.at(coefficients)
            for loss in entropies(probe, thetas, [(task, next(stream)) for task, stream in streams]):
                loss.backward()
            optimizer.zero_grad()
            masks.backward(thetas, coefficients)
            if self.coefficients == "learned":
                blend.backward(coefficients, thetas)
            optimizer.step()
            masks.follow()

    def _change(self, group: Group, masks: Masks, row: Tensor) -> Tensor:
        """Add the components that are on, in fp64: what was followed step by step has rounded at every one."""
        deltas, parts, on = self._vectors(group, 0), masks.parts[group.name], masks.on[group.name]
        kept = (parts.masked(t, on[t], delta.to(on.device)).to(deltas.device) for t, delta in enumerate(deltas))
        return total(torch.stack([weight * each for weight, each in zip(row.tolist(), kept, strict=True)])).cpu()


class Masks:
    """A score for every singular component, and the task vectors of a `Blend` without those whose score is negative.

    Args:
        blend: Its task vectors lose here what is off.
        parts: Matrix to its components.
        rank: Share of a matrix's components that are on, the largest first.
    """

    def __init__(self, blend: Blend, parts: Mapping[str, Components], rank: float) -> None:
        self.blend, self.parts = blend, parts
        self.sizes = [part.values.numel() for part in parts.values()]
        self.scores = torch.full((sum(self.sizes),), DISTANCE, device=blend.device)
        for part, scores in zip(parts.values(), self.scores.split(self.sizes), strict=True):
            first = share_of(rank, min(part.left.shape[2], part.right.shape[2]))
            scores.view_as(part.values)[:, first:] = -DISTANCE
        self.on = self._signs()
        for name, part in parts.items():
            for task, delta in enumerate(blend.vectors[name]):
                delta.copy_(part.masked(task, self.on[name][task], delta))

    def backward(self, thetas: Mapping[str, Tensor], coefficients: Tensor) -> None:
        """Give the scores the gradient that theta has collected, through the sigmoid.

        Args:
            thetas: Parameter name to theta.
            coefficients: ``[L, T]`` (lambda).
        """
        rows = dict(zip(self.blend.names, coefficients.detach().to(self.blend.device), strict=True))
        slopes = [self._slopes(name, thetas[name].grad) * rows[name][:, None] for name in self.parts]
        shares = (self.scores / TEMPERATURE).sigmoid()
        flat = torch.cat([slope.flatten() for slope in slopes]) if slopes else torch.zeros_like(shares)
        self.scores.grad = flat.mul_(shares * (1 - shares) / TEMPERATURE)

    def follow(self) -> None:
        """Add the components whose score has become positive to the task vectors, and take out the others."""
        before, self.on = self.on, self._signs()
        for name, part in self.parts.items():
            turned = self.on[name].to(part.values.dtype) - before[name].to(part.values.dtype)
            for task in turned.any(1).nonzero()[:, 0].tolist():
                self.blend.vectors[name][task] += part.part(task, turned[task])

    def pruned(self) -> list[str]:
        """Name the matrices whose change is not the sum of whole task vectors."""
        return [name for name, part in self.parts.items() if not (part.complete and self.on[name].all())]

    def _slopes(self, name: str, gradient: Tensor | None) -> Tensor:
        part = self.parts[name]
        return torch.zeros_like(part.values) if gradient is None else part.slopes(gradient)

    def _signs(self) -> dict[str, Tensor]:
        every = (self.scores > 0).split(self.sizes)
        return {name: on.view_as(part.values) for (name, part), on in zip(self.parts.items(), every, strict=True)}


def centred(group: Group, start: int = 0) -> Tensor:
    """Return the differences to the average of the fine-tuned models, ``[T, *shape]``."""
    deltas = group.deltas
    return deltas.sub_(total(deltas) / len(deltas))


def average(group: Group) -> Tensor:
    """Return the average of the fine-tuned models."""
    deltas = group.deltas
    return wide(group.pretrained) + total(deltas) / len(deltas)

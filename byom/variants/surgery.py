"""Representation Surgery: a small correction of the merged model's features for every task."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import l1_loss
from torch.nn.init import kaiming_uniform_
from tqdm import tqdm

from byom.functional.seeding import keyed
from byom.merge.base import Problem
from byom.merge.base.descent import require, require_finite, require_unlabelled, shuffled
from byom.merge.base.needs import Needs
from byom.variants.base import Variant
from byom.variants.base.delta import READOUT, Delta, Parts, Readout, Served, Shared
from byom.weights import Weights, require_match


@dataclass(frozen=True)
class RepresentationSurgery(Variant):
    """Correct the merged model's features for each task, so that they resemble those of the task's own model.

    ``z - up relu(down z)`` takes the place of the feature z (not normalised) in front of the task's head, where
    ``down [rank, D]`` and ``up [D, rank]`` minimise ``mean_x |z - up relu(down z) - f_t(x)|`` over unlabelled inputs.
    The weights are the merged model's.

    Both encoders are frozen, so that features are computed once and training sees nothing else.

    Args:
        rank: Rows of `down`, at least 1.
        inputs: Whose inputs are looked at, ``test`` or ``validation``; labels never are.
        learning_rate: Adam's.
        steps: Iterations, 0 or more; 0 corrects nothing, because `up` starts at 0.
        batch_size: Features in a batch.
        batches: Adam steps in an iteration.
        seed: Draws `down` and orders the features.

    Raises:
        OptionError: If a hyperparameter is out of range.

    References:
        Representation Surgery for Multi-Task Model Merging, section 4. https://arxiv.org/abs/2402.02705

    Differences:
        The authors encode with both models in every iteration, fitting the inputs they report accuracy on; tables
        flag the latter. One Adam holds all their tasks; here each task has its own, which is the same as long as an
        optimizer leaves alone what has no gradient, and makes the result independent of the other tasks.
        fusion-bench trains for 1000 iterations.
    """

    rank: int = 16
    inputs: Literal["test", "validation"] = "test"
    learning_rate: float = 1e-3
    steps: int = 500
    batch_size: int = 16
    batches: int = 2
    seed: int = 0

    title = "Representation Surgery"
    stores = "two matrices between features and `rank` numbers"
    on = "merged"

    def __post_init__(self) -> None:
        require_unlabelled("byom", self.inputs)
        sizes = {"rank": self.rank, "batch_size": self.batch_size, "batches": self.batches}
        require("byom", self.steps, self.learning_rate, **sizes)

    @property
    def needs(self) -> Needs:
        """Unlabelled inputs of one split."""
        return Needs(inputs=frozenset({self.inputs}))

    def serve(self, problem: Problem, reference: Weights) -> Served:
        """Fit every task's correction; see `Variant.serve`."""
        problem.inputs()
        require_match(problem.pretrained, reference)
        require_finite(problem, reference)
        bar = tqdm(problem.tasks, desc=self.title, unit="task", leave=False, mininterval=1)
        parts = {task: self._fit(problem, reference, task) for task in bar}
        return Served(reference, {task: Delta(self, {READOUT: each}) for task, each in parts.items()})

    def unpack(self, parts: Parts, shared: Shared) -> Tensor:
        """Return the reference."""
        return shared.reference

    def readout(self, parts: Parts, head: Readout) -> Readout:
        """Return the task's head behind its correction."""
        return lambda features: head(corrected(features.float(), parts["down"], parts["up"]))

    def _fit(self, problem: Problem, reference: Weights, task: str) -> Parts:
        probe = problem.inputs()
        features = probe.features(reference, task, self.inputs).values
        targets = probe.features(problem.finetuned[task], task, self.inputs).values
        down, up = initial(self.rank, features.shape[1], keyed(self.seed, task, "surgery"))
        optimizer = torch.optim.Adam([down, up], lr=self.learning_rate)
        for index in self._order(task, len(features)):
            optimizer.zero_grad()
            l1_loss(corrected(features[index], down, up), targets[index]).backward()
            optimizer.step()
        return {"down": down.detach(), "up": up.detach()}

    def _order(self, task: str, examples: int) -> Iterator[Tensor]:
        order = shuffled(examples, self.batch_size, self.seed, task, self.inputs)
        return (next(order) for _ in range(self.steps * self.batches))


def initial(rank: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return ``down [rank, width]``, uniform in +-1/sqrt(width), and ``up [width, rank]``, zero, ready for descent.

    Args:
        rank: Rows of `down`.
        width: Size of a feature (D).
        seed: Draws `down`.
    """
    down = kaiming_uniform_(torch.empty(rank, width), a=5**0.5, generator=torch.Generator().manual_seed(seed))
    return down.requires_grad_(), torch.zeros(width, rank, requires_grad=True)


def corrected(features: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Return ``z - up relu(down z)`` for features ``[B, D]``.

    Args:
        features: ``[B, D]``, not normalised (z).
        down: ``[rank, D]``.
        up: ``[D, rank]``.
    """
    down, up = down.to(features.device), up.to(features.device)
    return features - (features @ down.T).relu() @ up.T

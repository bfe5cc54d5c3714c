"""AdaMerging: coefficients of task vectors that make predictions on unlabelled inputs certain."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import log_softmax
from tqdm import tqdm

from byom.errors import fraction, one_of
from byom.functional.heads import require_classes
from byom.merge.base import Group, PlannedMethod, Problem
from byom.merge.base.descent import Blend, Vectors, blended, encoded, require, require_unlabelled, unchanged
from byom.merge.base.needs import Needs
from byom.merge.base.probe import Batch, Probe
from byom.merge.ties import Ties


@dataclass(frozen=True)
class Learnt:
    """The outcome of learning: ``[T]`` coefficients for every parameter, and which task vectors they weigh."""

    coefficients: dict[str, Tensor]
    vectors: Vectors


@dataclass(frozen=True)
class AdaMerging(PlannedMethod):
    """Learn how much of each task vector to add, tensor by tensor, by making predictions on unlabelled inputs certain.

    ``theta^l = theta_0^l + sum_t clamp(lambda_t^l, 0, 1) tau_t^l`` for every tensor l, where lambda minimises
    ``sum_t mean_x H(softmax(f_t(x; theta)))``, H the entropy. A coefficient that leaves [0, 1] has no gradient.

    Learning holds theta_0, all task vectors, theta and its gradient in memory, (T + 3) * d fp32 numbers, besides the
    activations of 64 examples. What is returned is lazy again: it reads the models once more, tensor by tensor.

    Args:
        granularity: ``layer`` has a coefficient for each task and tensor, ``task`` one for each task.
        plus_plus: Weigh task vectors trimmed and sign-elected as in TIES-Merging (AdaMerging++); only entries that
            agree with the elected sign stay, and are not averaged.
        density: Fraction of entries that `plus_plus` keeps of a task vector (K), in [0, 1].
        inputs: Whose inputs are looked at, ``test`` or ``validation``; labels never are.
        scale: Initial coefficient (lambda), in [0, 1].
        learning_rate: Adam's.
        steps: Adam steps; 0 leaves every coefficient at `scale`.
        batch_size: Inputs in a batch.
        batches: Batches of every task in a step.
        seed: Orders the inputs.

    Raises:
        OptionError: If a hyperparameter is out of range, or the problem has no inputs.

    References:
        AdaMerging: Adaptive Model Merging for Multi-Task Learning, section 3.2. https://arxiv.org/abs/2310.02575

    Differences:
        The authors adapt on the inputs that they report accuracy on, and so do we by default; tables flag it. A
        "layer" of theirs is one tensor of the state dict, 0-dim ones included; here tied tensors share one. Their
        loop reads two batches of 16 per task and step, which `batches` follows. The last step's coefficients are
        used, although nothing says that they are the best. fusion-bench clamps only if asked.
    """

    granularity: Literal["layer", "task"] = "layer"
    plus_plus: bool = False
    density: float = 0.2
    inputs: Literal["test", "validation"] = "test"
    scale: float = 0.3
    learning_rate: float = 1e-3
    steps: int = 500
    batch_size: int = 16
    batches: int = 2
    seed: int = 0

    title = "AdaMerging"

    def __post_init__(self) -> None:
        one_of("merge.granularity", self.granularity, ("layer", "task"))
        fraction("merge.density", self.density)
        fraction("merge.scale", self.scale)
        require_unlabelled("merge", self.inputs)
        require("merge", self.steps, self.learning_rate, batch_size=self.batch_size, batches=self.batches)

    @property
    def needs(self) -> Needs:
        """Unlabelled inputs of one split."""
        return Needs(inputs=frozenset({self.inputs}))

    def plan(self, problem: Problem) -> Learnt:
        """Learn the coefficients."""
        vectors = Ties(density=self.density).plan(problem).agreeing if self.plus_plus else unchanged
        blend = Blend(problem, self.inputs, vectors)
        learnt = blend.start(self.scale, None if self.granularity == "layer" else 1)
        self._descend(problem, blend, learnt)
        rows = learnt.detach().clamp(0, 1).expand(len(blend.names), -1)
        return Learnt(dict(zip(blend.names, rows, strict=True)), vectors)

    def merge(self, group: Group, plan: Learnt) -> Tensor:
        """Return ``theta_0 + sum_t lambda_t tau_t`` for one parameter."""
        return blended(group, plan.coefficients[group.name], plan.vectors)

    def _descend(self, problem: Problem, blend: Blend, learnt: Tensor) -> None:
        probe, optimizer = problem.inputs(), torch.optim.Adam([learnt], lr=self.learning_rate)
        streams = [(t, probe.batches(t, self.inputs, self.batch_size, self.seed)) for t in problem.tasks]
        for _ in tqdm(range(self.steps), desc=self.title, unit="step", leave=False, mininterval=1):
            coefficients = learnt.clamp(0, 1).expand(len(blend.names), -1)
            thetas = blend.at(coefficients)
            for loss in entropies(probe, thetas, [(t, next(s)) for t, s in streams for _ in range(self.batches)]):
                loss.backward()
            optimizer.zero_grad()
            blend.backward(coefficients, thetas)
            optimizer.step()


def entropy(logits: Tensor) -> Tensor:
    """Return the mean entropy in nats of softmax predictions; certain ones count 0.

    Args:
        logits: ``[B, C]``.

    Raises:
        OptionError: If C is 1.
    """
    logs = log_softmax(require_classes(logits, "minimising entropy").float(), dim=-1)
    return -(logs.exp() * logs).sum(-1).mean()


def entropies(probe: Probe, thetas: dict[str, Tensor], batches: list[tuple[str, Batch]]) -> Iterable[Tensor]:
    """Yield the summed entropy of the batches of each forward pass."""
    for outputs in encoded(probe, thetas, [batch for _, batch in batches]):
        losses = [entropy(probe.readout(batches[place][0])(features)) for place, features in outputs]
        yield torch.stack(losses).sum()

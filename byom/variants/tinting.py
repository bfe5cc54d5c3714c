"""Model Tinting: coefficients of task vectors, learnt together with one layer that every task keeps for itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from tqdm import tqdm

from byom.errors import OptionError, fraction, listed
from byom.functional.heads import require_classes
from byom.functional.seeding import keyed
from byom.merge.base import Problem
from byom.merge.base.descent import Blend, merged, require, require_finite, require_unlabelled
from byom.merge.base.needs import Needs
from byom.merge.base.probe import Batch
from byom.variants.base import Variant
from byom.variants.base.delta import READOUT, Delta, Parts, Readout, Served, Shared
from byom.weights import Weights

HEAD = "head"
Own = dict[str, Tensor]  # what a task keeps: its head's weight and bias, or parameters by name


class Predictions(NamedTuple):
    """What a task's own model says about every example of a split."""

    labels: Tensor  # int64 [N]
    confidence: Tensor  # fp32 [N], the largest probability


class Cosine(Protocol):
    """What is known of a task's head."""

    weight: Tensor  # [C, D]
    temperature: float


@dataclass(frozen=True)
class ModelTinting(Variant):
    """Learn a merged model and one layer a task together, so that predictions are those of the tasks' own models.

    ``theta^l = theta_0^l + sum_t clamp(lambda_t^l, 0, 1) tau_t^l`` is shared; a task's head (or the parameters that
    `layer` names) is its own, and starts as the frozen head (or as the merged values). Both minimise the cross-entropy
    to the class that the task's own model finds likeliest, on unlabelled inputs, one task a step.

    The merge method is ignored: the variant brings its own. Learning holds (T + 3) * d fp32 numbers, and the layer and
    Adam's two moments of it for every task.

    Args:
        layer: ``head``, or how the names of the parameters begin that each task keeps, e.g. ``visual.norm.``.
        plus_plus: Learn only from examples on which both models agree, or the task's own is at least as confident.
        inputs: Whose inputs are looked at, ``test`` or ``validation``; labels never are.
        scale: Initial coefficient (lambda), in [0, 1].
        learning_rate: Adam's, for coefficients and layers alike.
        steps: Rounds; each takes one Adam step for every task, in an order of its own. 0 learns nothing.
        batch_size: Inputs in a batch.
        seed: Orders inputs and tasks.

    Raises:
        OptionError: If a hyperparameter is out of range, or no parameter's name begins with `layer`.

    References:
        Why Train Everything? Tint a Single Layer for Multi-task Model Merging, section 4.
        https://arxiv.org/abs/2412.19098

    Differences:
        The paper lets any single layer be the task's own, the authors' code trains heads; the latter is the default.
        Their heads start from zero-shot text classifiers, ours from the suite's frozen heads. Nothing in a step
        changes the layers of other tasks. Inputs are those that accuracy is reported on; tables flag it.
    """

    layer: str = HEAD
    plus_plus: bool = False
    inputs: Literal["test", "validation"] = "test"
    scale: float = 0.3
    learning_rate: float = 1e-2
    steps: int = 500
    batch_size: int = 32
    seed: int = 0

    title = "Model Tinting"
    stores = "its head, or one layer"
    on = "pretrained"

    def __post_init__(self) -> None:
        if not self.layer:
            raise OptionError("byom.layer is empty; use head, or how the names of the layer's parameters begin")
        fraction("byom.scale", self.scale)
        require_unlabelled("byom", self.inputs)
        require("byom", self.steps, self.learning_rate, batch_size=self.batch_size)

    @property
    def needs(self) -> Needs:
        """Unlabelled inputs of one split."""
        return Needs(inputs=frozenset({self.inputs}))

    def serve(self, problem: Problem, reference: Weights) -> Served:
        """Learn the shared model and every task's layer; see `Variant.serve`."""
        problem.inputs()
        require_finite(problem)
        names = [] if self.layer == HEAD else self._names(problem)
        blend = Blend(problem, self.inputs)
        learnt = blend.start(self.scale)
        start = blend.at(learnt)
        own = {task: _initial(problem, task, start, names) for task in problem.tasks}
        self._descend(problem, blend, learnt, own)
        rows = dict(zip(blend.names, learnt.detach().clamp(0, 1), strict=True))
        return Served(merged(problem, rows), {task: self._packed(problem, own[task], names) for task in own})

    def unpack(self, parts: Parts, shared: Shared) -> Tensor:
        """Return the task's own values."""
        return parts["values"].reshape(shared.reference.shape)

    def readout(self, parts: Parts, head: Readout) -> Readout:
        """Return the task's own head: the frozen one with another weight, and a bias."""
        return lambda features: _classified(features, parts, head)

    def _names(self, problem: Problem) -> list[str]:
        known = problem.pretrained.mergeable()
        if found := [name for name in known if name.startswith(self.layer)]:
            return found
        raise OptionError(
            f"byom.layer={self.layer} begins no parameter's name; use head, or one of {listed(known, limit=200)}"
        )

    def _packed(self, problem: Problem, own: Own, names: list[str]) -> Delta:
        stored = {name: value.detach().cpu() for name, value in own.items()}
        if not names:
            return Delta(self, {READOUT: stored})
        base = problem.pretrained
        parts = {name: {"values": stored[name].to(base.dtype(name))} for name in names}
        return Delta(self, parts, {name: base.shape(name) for name in names})

    def _descend(self, problem: Problem, blend: Blend, learnt: Tensor, own: Mapping[str, Own]) -> None:
        teachers = {task: _predictions(problem, task, self.inputs) for task in problem.tasks}
        leaves = [value for task in sorted(own) for value in own[task].values()]
        optimizer = torch.optim.Adam([learnt, *leaves], lr=self.learning_rate)
        for task, batch in self._visits(problem):
            coefficients = learnt.clamp(0, 1)
            thetas = blend.at(coefficients)
            loss = self._loss(problem, thetas, task, own[task], batch, teachers[task])
            if loss is None:
                continue
            optimizer.zero_grad()
            loss.backward()
            blend.backward(coefficients, thetas)
            optimizer.step()

    def _visits(self, problem: Problem) -> Iterator[tuple[str, Batch]]:
        """Yield one batch of every task a round, in an order that no other order of the tasks changes."""
        tasks, probe = sorted(problem.tasks), problem.inputs()
        streams = {task: probe.batches(task, self.inputs, self.batch_size, self.seed) for task in tasks}
        for step in tqdm(range(self.steps), desc=self.title, unit="round", leave=False, mininterval=1):
            generator = torch.Generator().manual_seed(keyed(self.seed, "tasks", step))
            for place in torch.randperm(len(tasks), generator=generator).tolist():
                yield tasks[place], next(streams[tasks[place]])

    def _loss(
        self,
        problem: Problem,
        thetas: Mapping[str, Tensor],
        task: str,
        own: Own,
        batch: Batch,
        teacher: Predictions,
    ) -> Tensor | None:
        """Return the cross-entropy of a batch to the teacher's classes; None if no example is to be learnt from."""
        probe = problem.inputs()
        features = probe.encode(thetas if self.layer == HEAD else {**thetas, **own}, batch.inputs)
        head = probe.readout(task)
        logits = _classified(features, own, head) if self.layer == HEAD else head(features)
        said = Predictions(*(each[batch.places].to(logits.device) for each in teacher))
        kept = trusted(logits.detach(), said) if self.plus_plus else torch.ones_like(said.labels, dtype=torch.bool)
        return cross_entropy(logits[kept], said.labels[kept]) if kept.any() else None


def trusted(logits: Tensor, teacher: Predictions) -> Tensor:
    """Say which examples are worth learning from: both models agree, or the teacher is at least as confident.

    Args:
        logits: ``[B, C]`` of the merged model.
        teacher: What the task's own model says about the same examples.

    Returns:
        Bool ``[B]``.
    """
    confidence, labels = logits.float().softmax(-1).max(-1)
    return (labels == teacher.labels) | (teacher.confidence >= confidence)


@torch.no_grad()
def _predictions(problem: Problem, task: str, split: str) -> Predictions:
    probe = problem.inputs()
    found = probe.readout(task)(probe.features(problem.finetuned[task], task, split).values)
    require_classes(found, "byom=tinting")
    confidence, labels = found.float().softmax(-1).max(-1)
    return Predictions(labels, confidence)


def _initial(problem: Problem, task: str, start: Mapping[str, Tensor], names: list[str]) -> Own:
    """Return what the task keeps, before learning."""
    if names:
        return {name: start[name].detach().clone().requires_grad_() for name in names}
    device = next(iter(start.values())).device
    head = problem.inputs().readout(task)
    if not hasattr(head, "temperature"):
        raise OptionError(
            f"byom=tinting with byom.layer={HEAD} starts from a cosine head, and that of task {task} is a "
            f"{type(head).__name__}; name a layer of the encoder instead, as in byom.layer=visual.ln_post"
        )
    weight = cast(Cosine, head).weight.detach().float().to(device)
    return {
        "weight": weight.clone().requires_grad_(),
        "bias": torch.zeros(len(weight), device=device, requires_grad=True),
    }


def _classified(features: Tensor, own: Parts, head: Readout) -> Tensor:
    weight, bias = own["weight"].to(features.device), own["bias"].to(features.device)
    temperature = cast(Cosine, head).temperature
    return temperature * normalize(features.float(), dim=-1) @ weight.T + bias

"""SyMerge: coefficients of task vectors, learnt together with one layer that every task keeps for itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from tqdm import tqdm

from byom.errors import OptionError, fraction, listed
from byom.functional.heads import Head, require_classes
from byom.functional.seeding import keyed
from byom.merge.base import Problem
from byom.merge.base.descent import Blend, merged, require, require_finite, require_unlabelled
from byom.merge.base.needs import Needs
from byom.merge.base.probe import Batch
from byom.variants.base import Variant
from byom.variants.base.delta import READOUT, Delta, Parts, Readout, Served, Shared
from byom.weights import Weights

HEAD = "head"
Own = dict[str, Tensor]  # a task's own tensors: its head's weight and bias, or parameters by name


class Predictions(NamedTuple):
    """Predictions of a task's own model for every example of a split."""

    labels: Tensor  # int64 [N]
    confidence: Tensor  # fp32 [N], the largest probability


class OwnPart(Protocol):
    """The part of a model that every task keeps for itself."""

    def start(self, problem: Problem, task: str, thetas: Mapping[str, Tensor]) -> Own:
        """Return what a task keeps before learning, as leaves that need gradients.

        Args:
            problem: The models.
            task: The task's name.
            thetas: The parameters of the shared model before learning.
        """
        ...

    def logits(
        self, problem: Problem, task: str, thetas: Mapping[str, Tensor], own: Own, inputs: Mapping[str, Tensor]
    ) -> Tensor:
        """Return a task's logits ``[B, C]``, differentiable in the shared parameters and in what the task keeps."""
        ...

    def packed(self, variant: ModelTinting, problem: Problem, own: Own) -> Delta:
        """Return what is stored of a task."""
        ...


@dataclass(frozen=True)
class ModelTinting(Variant):  # the method's first name, by which records and bundles know it
    """Learn a merged model and one layer per task together, so that predictions are those of the tasks' own models.

    ``theta^l = theta_0^l + sum_t clamp(lambda_t^l, 0, 1) tau_t^l`` is shared; a task's head (or the parameters that
    `layer` names) is its own, and starts as the frozen head (or as the merged values). Both minimise the cross-entropy
    to the class that the task's own model finds likeliest, on unlabelled inputs, one task per step.

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
        SyMerge, ICML 2026; before as Why Train Everything? Tint a Single Layer for Multi-task Model Merging, section 4.
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

    title = "SyMerge"
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
        layer = OwnHead() if self.layer == HEAD else OwnLayer.starting(self.layer, problem.pretrained)
        blend = Blend(problem, self.inputs)
        coefficients = blend.start(self.scale)
        start = blend.at(coefficients)
        own = {task: layer.start(problem, task, start) for task in problem.tasks}
        leaves = [value for task in sorted(own) for value in own[task].values()]
        optimizer = torch.optim.Adam([coefficients, *leaves], lr=self.learning_rate)
        for clamped, thetas, loss in self._losses(problem, blend, coefficients, layer, own):
            optimizer.zero_grad()
            loss.backward()
            blend.backward(clamped, thetas)
            optimizer.step()
        rows = dict(zip(blend.names, coefficients.detach().clamp(0, 1), strict=True))
        return Served(
            problem.back(merged(problem, rows)), {task: layer.packed(self, problem, own[task]) for task in own}
        )

    def unpack(self, parts: Parts, shared: Shared) -> Tensor:
        """Return the task's own values."""
        return parts["values"].reshape(shared.reference.shape)

    def readout(self, parts: Parts, head: Readout) -> Readout:
        """Return the task's own head: the frozen one with another weight, and a bias."""
        return lambda features: classified(features, parts, cosine(head, "a head that was stored").temperature)

    def _losses(
        self, problem: Problem, blend: Blend, coefficients: Tensor, layer: OwnPart, own: Mapping[str, Own]
    ) -> Iterator[tuple[Tensor, Mapping[str, Tensor], Tensor]]:
        """Yield, for every batch with an example to learn from, coefficients, parameters and the loss."""
        teachers = {task: _predictions(problem, task, self.inputs) for task in problem.tasks}
        for task, batch in self._visits(problem):
            clamped = coefficients.clamp(0, 1)
            thetas = blend.at(clamped)
            logits = layer.logits(problem, task, thetas, own[task], batch.inputs)
            teacher = Predictions(*(each[batch.places].to(logits.device) for each in teachers[task]))
            mask = trusted(logits.detach(), teacher) if self.plus_plus else torch.ones_like(teacher.labels).bool()
            if mask.any():
                yield clamped, thetas, cross_entropy(logits[mask], teacher.labels[mask])

    def _visits(self, problem: Problem) -> Iterator[tuple[str, Batch]]:
        """Yield one batch of every task per round, in an order that no other order of the tasks changes."""
        tasks, probe = sorted(problem.tasks), problem.inputs()
        streams = {task: probe.batches(task, self.inputs, self.batch_size, self.seed) for task in tasks}
        for step in tqdm(range(self.steps), desc=self.title, unit="round", leave=False, mininterval=1):
            generator = torch.Generator().manual_seed(keyed(self.seed, "tasks", step))
            for place in torch.randperm(len(tasks), generator=generator).tolist():
                yield tasks[place], next(streams[tasks[place]])


class OwnHead:
    """Every task keeps its head: a weight, which starts as that of the frozen head, and a bias, which starts at 0."""

    def start(self, problem: Problem, task: str, thetas: Mapping[str, Tensor]) -> Own:
        """Return a copy of the frozen head's weight ``[C, D]`` and a bias ``[C]``; see `OwnPart.start`."""
        device = next(iter(thetas.values())).device
        weight = cosine(problem.inputs().readout(task), f"that of task {task}").weight.detach().float().to(device)
        bias = torch.zeros(len(weight), device=device, requires_grad=True)
        return {"weight": weight.clone().requires_grad_(), "bias": bias}

    def logits(
        self, problem: Problem, task: str, thetas: Mapping[str, Tensor], own: Own, inputs: Mapping[str, Tensor]
    ) -> Tensor:
        """Classify features of the shared model by the task's own head; see `OwnPart.logits`."""
        probe = problem.inputs()
        temperature = cosine(probe.readout(task), f"that of task {task}").temperature
        return classified(probe.encode(thetas, inputs), own, temperature)

    def packed(self, variant: ModelTinting, problem: Problem, own: Own) -> Delta:
        """Return weight and bias under `READOUT`; see `OwnPart.packed`."""
        return Delta(variant, {READOUT: {name: value.detach().cpu() for name, value in own.items()}})


class OwnLayer:
    """Every task keeps some parameters of the encoder, which start as those of the shared model.

    Args:
        names: The parameters.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    @classmethod
    def starting(cls, start: str, pretrained: Weights) -> OwnLayer:
        """Return the layer of all parameters whose names begin in one way.

        Raises:
            OptionError: If no name begins so.
        """
        known = pretrained.mergeable()
        if names := [name for name in known if name.startswith(start)]:
            return cls(names)
        raise OptionError(
            f"byom.layer={start} begins no parameter's name; use head, or one of {listed(known, limit=200)}"
        )

    def start(self, problem: Problem, task: str, thetas: Mapping[str, Tensor]) -> Own:
        """Return copies of the shared parameters; see `OwnPart.start`."""
        return {name: thetas[name].detach().clone().requires_grad_() for name in self.names}

    def logits(
        self, problem: Problem, task: str, thetas: Mapping[str, Tensor], own: Own, inputs: Mapping[str, Tensor]
    ) -> Tensor:
        """Classify features of the task's own encoder by its frozen head; see `OwnPart.logits`."""
        probe = problem.inputs()
        return probe.readout(task)(probe.encode({**thetas, **own}, inputs))

    def packed(self, variant: ModelTinting, problem: Problem, own: Own) -> Delta:
        """Return the parameters in the dtypes of the pre-trained model; see `OwnPart.packed`."""
        base = problem.pretrained
        parts = {name: {"values": own[name].detach().cpu().to(base.dtype(name))} for name in self.names}
        return Delta(variant, parts, {name: base.shape(name) for name in self.names})


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
    logits = probe.readout(task)(probe.features(problem.finetuned[task], task, split).values)
    require_classes(logits, "byom=symerge")
    confidence, labels = logits.float().softmax(-1).max(-1)
    return Predictions(labels, confidence)


def cosine(head: Readout, whose: str) -> Head:
    """Return a head if it is a cosine classifier.

    Args:
        head: A task's head.
        whose: What it is called in the message.

    Raises:
        OptionError: If it is another kind of head.
    """
    if not isinstance(head, Head):
        raise OptionError(
            f"byom=symerge with byom.layer={HEAD} starts from a cosine head, and {whose} is a "
            f"{type(head).__name__}; name a layer of the encoder instead, as in byom.layer=visual.ln_post"
        )
    return head


def classified(features: Tensor, own: Parts, temperature: float) -> Tensor:
    """Return logits ``[B, C]`` of a task's own head: ``temperature * normalised features @ weight.T + bias``.

    Args:
        features: ``[B, D]``.
        own: ``weight [C, D]`` and ``bias [C]``.
        temperature: Factor on the cosine.
    """
    weight, bias = own["weight"].to(features.device), own["bias"].to(features.device)
    return temperature * normalize(features.float(), dim=-1) @ weight.T + bias

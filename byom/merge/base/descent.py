"""Models that adapt on inputs: descent on the coefficients of task vectors, which costs no graph over T * d."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from byom.errors import one_of, positive, whole
from byom.functional.deltas import total
from byom.functional.seeding import keyed
from byom.functional.tensors import wide
from byom.merge.base.group import Group, blockwise
from byom.merge.base.probe import Batch, Probe
from byom.merge.base.problem import Problem
from byom.weights import Weights

JOINED = 64  # examples encoded in one pass: fills two cores, and its activations stay well below the task vectors
Vectors = Callable[[Group, int], Tensor]  # (flat piece of a parameter, its flat offset) -> task vectors [T, n]
Origin = Callable[[Group], Tensor]  # a parameter, or a flat piece -> what the task vectors are added to, [*shape]


def unchanged(group: Group, start: int = 0) -> Tensor:
    """Return the task vectors as they are."""
    return group.deltas


def pretrained(group: Group) -> Tensor:
    """Return theta_0."""
    return wide(group.pretrained)


class Blend:
    """``theta^l = theta_0^l + sum_t lambda_t^l tau_t^l`` for every tensor l, differentiable in lambda.

    dL/dlambda_t^l is the dot product of dL/dtheta^l and tau_t^l, so that one backward pass to theta is enough.
    theta_0, all task vectors, theta and its gradient are in memory as fp32, where the encoder computes:
    (T + 3) * d floats.

    Args:
        problem: The models, and the probe.
        split: A split of which the problem has inputs.
        vectors: The task vectors.
        origin: What stands for theta_0.
    """

    def __init__(self, problem: Problem, split: str, vectors: Vectors = unchanged, origin: Origin = pretrained) -> None:
        self.names = problem.pretrained.mergeable()
        self.tasks = len(problem.tasks)
        self.device = where(problem, split)
        self.base: dict[str, Tensor] = {}
        self.vectors: dict[str, Tensor] = {}
        for name in self.names:
            group = problem.group(name)
            self.base[name] = origin(group).float().to(self.device)
            self.vectors[name] = vectors(group, 0).float().to(self.device)

    def start(self, value: float, rows: int | None = None) -> Tensor:
        """Return coefficients to learn, ``[L, T]`` or ``[rows, T]``, all of them `value`."""
        return torch.full((len(self.names) if rows is None else rows, self.tasks), value, requires_grad=True)

    def at(self, coefficients: Tensor) -> dict[str, Tensor]:
        """Return theta at coefficients ``[L, T]``, as tensors that collect their gradient."""
        rows = coefficients.detach().to(self.device)
        return {name: self._at(name, row).requires_grad_() for name, row in zip(self.names, rows, strict=True)}

    def backward(self, coefficients: Tensor, thetas: Mapping[str, Tensor]) -> None:
        """Carry the gradients that theta has collected on to the coefficients ``[L, T]``, and what they came from."""
        coefficients.backward(torch.stack([self._slope(name, thetas[name].grad) for name in self.names]).cpu())

    def _at(self, name: str, row: Tensor) -> Tensor:
        base, vectors = self.base[name], self.vectors[name]
        return torch.addmv(base.reshape(-1), vectors.reshape(self.tasks, -1).T, row).reshape(base.shape)

    def _slope(self, name: str, gradient: Tensor | None) -> Tensor:
        if gradient is None:  # the encoder doesn't use it, or a task keeps its own
            return torch.zeros(self.tasks, device=self.device)
        return self.vectors[name].reshape(self.tasks, -1) @ gradient.reshape(-1)


def blended(group: Group, coefficients: Tensor, vectors: Vectors = unchanged, origin: Origin = pretrained) -> Tensor:
    """Return one parameter of the model that coefficients give, block by block.

    Args:
        group: The parameter in every model.
        coefficients: ``[T]`` (lambda).
        vectors: The task vectors.
        origin: What stands for theta_0.

    Returns:
        ``[*shape]`` in fp32 or fp64.
    """

    def merge(start: int, piece: Group) -> Tensor:
        deltas = vectors(piece, start)
        return origin(piece) + total(deltas * coefficients.to(deltas)[:, None])

    return blockwise(group, merge)


def where(problem: Problem, split: str) -> torch.device:
    """Return the device on which the encoder computes."""
    probe, task = problem.inputs(), problem.tasks[0]
    with torch.no_grad():
        return probe.encode({}, probe.take(task, split, torch.tensor([0])).inputs).device


def encoded(probe: Probe, state: Mapping[str, Tensor], batches: Sequence[Batch]) -> Iterator[list[tuple[int, Tensor]]]:
    """Encode batches, those of equal shape together: one product of 64 rows costs less than four of 16.

    Args:
        probe: The encoder.
        state: The model.
        batches: Batches of one or several tasks.

    Yields:
        For each pass the places of its batches in `batches`, and their features ``[B, D]``. Go backward before asking
        for the next pass, so that the activations of one are in memory at a time.
    """
    for places in _passes(batches):
        chosen = [batches[place].inputs for place in places]
        inputs = {name: torch.cat([each[name] for each in chosen]) for name in chosen[0]}
        sizes = [len(batches[place].places) for place in places]
        yield list(zip(places, probe.encode(state, inputs).split(sizes), strict=True))


def _passes(batches: Sequence[Batch]) -> Iterator[list[int]]:
    held: list[int] = []
    for place, batch in enumerate(batches):
        size = sum(len(batches[other].places) for other in [*held, place])
        if held and (size > JOINED or _shapes(batch) != _shapes(batches[held[0]])):
            yield held
            held = []
        held = [*held, place]
    if held:
        yield held


def _shapes(batch: Batch) -> dict[str, torch.Size]:
    return {name: tensor.shape[1:] for name, tensor in batch.inputs.items()}


def shuffled(examples: int, size: int, *key: object) -> Iterator[Tensor]:
    """Yield places ``[B]`` without end, every example once an epoch, in an order drawn by the key and the epoch."""
    epoch = 0
    while examples:
        generator = torch.Generator().manual_seed(keyed(*key, epoch))
        yield from torch.randperm(examples, generator=generator).split(size)
        epoch += 1


def require_finite(problem: Problem, *further: Weights) -> None:
    """Refuse models that hold NaN or infinity, for methods that only look at what the models compute.

    Raises:
        CheckpointError: Naming the model and the tensor.
    """
    for weights in (problem.pretrained, *problem.finetuned.values(), *further):
        for name in weights.mergeable():
            weights.read_finite(name)


def require_unlabelled(group: str, inputs: str) -> None:
    """Check which inputs a method adapts on.

    Args:
        group: ``merge`` or ``byom``, for the message.
        inputs: The split.

    Raises:
        OptionError: If it is neither ``test`` nor ``validation``.
    """
    one_of(f"{group}.inputs", inputs, ("test", "validation"))


def require(group: str, steps: int, learning_rate: float, **sizes: int) -> None:
    """Check what every method that adapts is given.

    Args:
        group: ``merge`` or ``byom``, for the message.
        steps: Steps, 0 or more.
        learning_rate: Positive.
        sizes: Further options that are at least 1.

    Raises:
        OptionError: Naming the option and what it may be.
    """
    whole(f"{group}.steps", steps, 0)
    positive(f"{group}.learning_rate", learning_rate, "0.001")
    for name, size in sizes.items():
        whole(f"{group}.{name}", size, 1)


def merged(problem: Problem, coefficients: Mapping[str, Tensor]) -> Weights:
    """Return the model that coefficients ``[T]`` for every parameter give, lazily."""
    base = problem.pretrained

    def read(name: str) -> Tensor:
        return blended(problem.group(name), coefficients[name]) if base.merges(name) else base[name]

    return base.derived(read, "merged")

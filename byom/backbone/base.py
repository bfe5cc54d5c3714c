"""Backbones: encoders that are merged, and frozen heads made from the pre-trained encoder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from byom.data.splits import Split
from byom.data.suite import Task
from byom.errors import CheckpointError, DataError
from byom.functional.heads import Head, Readout
from byom.storage.repository import Download


@dataclass(frozen=True)
class Reader:
    """`Backbone.encode` with the files that it reads kept open, for many small batches.

    Args:
        encode: Does what `Backbone.encode` does.
        tokens: Returns how many tokens an input has before it is cut; None where inputs are not cut.
        limit: How many are left of it.
    """

    encode: Callable[[Sequence[Any], Task | None], dict[str, Tensor]]
    tokens: Callable[[Any, Task | None], int] | None = None
    limit: int = 0


class Backbone(ABC):
    """A frozen dataclass that says how to build an encoder and how to feed it."""

    modality: ClassVar[Literal["image", "text"]]
    learning_rate: float
    """Learning rate of full fine-tuning that keeps the experts mergeable."""
    temperature: float
    """Factor on the cosine of prototype heads."""
    answers: ClassVar[bool] = False
    """True where its features are scores of the task's own answers, which give the task away."""
    reads_shots: ClassVar[bool] = True
    """True where heads are made from labelled examples."""
    inner: ClassVar[str] = ""
    """Prefix of the encoder's parameters before the library's own names; the module of that name is adapted."""

    @property
    @abstractmethod
    def encoding(self) -> Mapping[str, Any]:
        """Everything that determines `encode`, as JSON: part of the signature of cached inputs."""

    def encoding_for(self, task: Task) -> Mapping[str, Any]:
        """Return what determines `encode` for a task; the same for all of them unless inputs are put into prompts."""
        return self.encoding

    @abstractmethod
    def encode(self, inputs: Sequence[Any], task: Task | None = None) -> dict[str, Tensor]:
        """Turn raw inputs into tensors with a leading axis of examples.

        Args:
            inputs: PIL images, strings, or rows of strings (column to text).
            task: Whose inputs they are; needed only where inputs are put into prompts.
        """

    def reader(self) -> Reader:
        """Return `encode` with what it reads from files kept."""
        return Reader(self.encode)

    @abstractmethod
    def load(self) -> nn.Module:
        """Build the encoder with its pre-trained weights: keyword inputs to features ``[B, D]``.

        Raises:
            CheckpointError: If the weights cannot be had or do not fit.
        """

    def head(self, encoder: nn.Module, task: Task, shots: Split | None) -> Readout:
        """Make the frozen head of a task from the pre-trained encoder and a few labelled examples.

        The row of a class is its normalised mean of normalised features (a prototype).

        Args:
            encoder: The pre-trained encoder.
            task: The task.
            shots: Labelled examples, at least one per class; None where `reads_shots` is False.

        Returns:
            The head.
        """
        assert shots is not None
        return Head(prototypes(encoder, shots, len(task.classes)), self.temperature)

    def heads(self, encoder: nn.Module, tasks: Sequence[Task], shots: Split | None) -> Iterator[Readout]:
        """Yield the heads of several tasks, which may share what they are made with.

        Args:
            encoder: The pre-trained encoder; where it is, heads are computed.
            tasks: The tasks; one alone where `reads_shots`.
            shots: See `head`.
        """
        yield from (self.head(encoder, task, shots) for task in tasks)

    def require_head(self, task: Task) -> None:  # noqa: B027 - most heads are made of examples
        """Refuse a task for which no head can be made, before anything is loaded.

        Raises:
            DataError: Naming the task and what it lacks.
        """

    def own_head(self, task: Task, tensors: Mapping[str, Tensor]) -> Readout | None:
        """Make a task's head from the classifier that came with its fine-tuned checkpoint.

        Args:
            task: The task.
            tensors: Tensors of the checkpoint outside the encoder.

        Returns:
            The head, or None if such checkpoints of this backbone have none.
        """
        return None

    def blank(self) -> nn.Module | None:
        """Return the encoder with random weights, without fetching anything; None if only the hub knows its size."""
        return None

    def require_features(self) -> None:  # noqa: B027 - most backbones have features
        """Refuse methods that compare features, where those of evaluation are others.

        Raises:
            OptionError: If they are.
        """

    @property
    def hub_name(self) -> str:
        """The name of its model on hubs, which exported adapters give as the model to load them onto."""
        return type(self).__name__

    def contents(self, cache: Path | None = None) -> str | None:
        """Return what tells its weights from others under the same options; None where the options tell them.

        Args:
            cache: Where digests of unchanged files are remembered; None reads them every time.

        Returns:
            The digest of local files, or the commit that a branch of a hub points to.

        Raises:
            CheckpointError: If files cannot be read.
        """
        return None

    def downloads(self) -> Iterator[Download]:
        """Say what would have to be fetched from a hub; nothing where the weights are on this machine."""
        yield from ()

    def fetch(self) -> None:  # noqa: B027 - most kinds need none
        """Bring the weights to this machine; nothing where they are there."""

    @property
    def frozen_parameters(self) -> int:
        """Parameters that published counts include although no expert differs in them; they are not in the encoder."""
        return 0

    def require(self, task: Task) -> None:
        """Refuse a task of the other modality.

        Raises:
            DataError: Naming task and backbone.
        """
        if task.modality != self.modality:
            raise DataError(
                f"task '{task.name}' is {task.modality}, but {type(self).__name__} reads {self.modality}; "
                f"choose another suite= or backbone="
            )


@torch.no_grad()
def prototypes(encoder: nn.Module, shots: Split, classes: int) -> Tensor:
    """Return class prototypes ``[C, D]``: normalised class means of normalised features.

    Args:
        encoder: The encoder, put in evaluation mode.
        shots: Labelled examples with labels in ``[0, C)``.
        classes: Number of classes (C).

    Returns:
        Unit rows in fp32, on the CPU.
    """
    device = next(encoder.parameters()).device
    encoder.eval()
    sums = 0
    for inputs, labels, *_ in shots.batches(64):
        features = normalize(encoder(**{k: v.to(device) for k, v in inputs.items()}).float(), dim=-1).cpu()
        sums = sums + torch.zeros(classes, features.shape[1]).index_add_(0, labels, features)
    return normalize(torch.as_tensor(sums), dim=-1)


def fill(module: nn.Module, state: Mapping[str, Tensor], source: str) -> nn.Module:
    """Load a complete state dict into a module.

    Args:
        module: The module.
        state: Name to tensor; every name and shape must fit.
        source: What the error calls the weights.

    Returns:
        The module.

    Raises:
        CheckpointError: If names or shapes differ.
    """
    try:
        module.load_state_dict(dict(state), strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{source} does not fit {type(module).__name__}: {error}") from error
    return module

"""The access that methods have to inputs: batches, features, logits and Grams of models given by weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from torch import Tensor

from byom.functional.heads import Readout
from byom.weights import Weights

State = Mapping[str, Tensor]


class Batch(NamedTuple):
    """Examples of one task."""

    inputs: dict[str, Tensor]
    labels: Tensor  # int64 [B]
    places: Tensor  # int64 [B], in the split


class Features(NamedTuple):
    """Features of all examples of a split, in its order."""

    values: Tensor  # fp32 [N, D], not normalised
    labels: Tensor  # int64 [N]


class Probe(ABC):
    """The tasks' inputs and the encoder that every model of a problem is loaded into.

    Methods get one through `Problem.probe` and stay ignorant of backbones and data. States may leave out tensors
    that equal the pre-trained model's. The encoder is always in evaluation mode.
    """

    @abstractmethod
    def examples(self, task: str, split: str) -> int:
        """Return how many examples a task's split has."""

    @abstractmethod
    def batches(self, task: str, split: str, size: int, seed: int) -> Iterator[Batch]:
        """Yield batches without end, every example once an epoch, in an order drawn by (seed, task, epoch)."""

    @abstractmethod
    def shots(self, task: str, split: str, per_class: int, seed: int) -> Tensor:
        """Return places int64 [M] of at most `per_class` examples of each class, drawn by (seed, task)."""

    @abstractmethod
    def take(self, task: str, split: str, index: Tensor) -> Batch:
        """Return the examples at some places of a split."""

    @abstractmethod
    def encode(self, state: State, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return features [B, D] of a batch; differentiable in the tensors of `state`."""

    @abstractmethod
    def readout(self, task: str) -> Readout:
        """Return a task's frozen head, which maps features to logits; it has ``weight`` [C, D] and ``temperature``."""

    @abstractmethod
    def features(self, weights: Weights, task: str, split: str) -> Features:
        """Return the features of a whole split, without gradients."""

    @abstractmethod
    def grams(
        self, state: State, task: str, split: str, examples: int, parameters: Collection[str]
    ) -> dict[str, Tensor]:
        """Return fp64 Grams of the inputs of matrix parameters; see `byom.statistics.gram`.

        Args:
            state: The model.
            task: Whose inputs.
            split: Which split.
            examples: How many of its examples, the first ones.
            parameters: Names of the parameters wanted; those that multiply no captured input are left out.

        Returns:
            Parameter name to ``[n, n]``, n the parameter's input size; normalised by the number of rows.
        """

    @abstractmethod
    def order(self) -> list[list[str]]:
        """Return groups of matrix parameters in the order in which a forward pass uses their inputs."""

    @abstractmethod
    def joint(self, shares: Mapping[str, float]) -> Weights:
        """Return a model fine-tuned on all tasks together, the loss of each weighted by its share."""

"""The probe of a lab: what methods that look at inputs are given in the pipeline."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor
from torch.func import functional_call

from byom.data.splits import Split
from byom.functional.heads import Readout
from byom.functional.precision import DEFAULT, products
from byom.functional.seeding import keyed
from byom.merge.base.probe import Batch, Features, Probe, State
from byom.pipeline.lab import Lab
from byom.statistics.gram import grams, order
from byom.weights import Weights


class LabProbe(Probe):
    """A lab's tasks, encoder and heads behind the interface that merge methods and variants know.

    Args:
        lab: The lab.
    """

    def __init__(self, lab: Lab) -> None:
        self.lab = lab

    def examples(self, task: str, split: str) -> int:
        """Return how many examples a task's split has."""
        return len(self._split(task, split))

    def batches(self, task: str, split: str, size: int, seed: int) -> Iterator[Batch]:
        """Yield batches without end; see `Probe.batches`."""
        held, epoch = self._split(task, split), 0
        while True:
            generator = torch.Generator().manual_seed(keyed(seed, task, split, epoch))
            yield from (Batch(*batch) for batch in held.batches(size, torch.randperm(len(held), generator=generator)))
            epoch += 1

    def shots(self, task: str, split: str, per_class: int, seed: int) -> Tensor:
        """Return places of a few examples of each class; see `Probe.shots`."""
        labels = self._split(task, split).labels
        generator = torch.Generator().manual_seed(keyed(seed, task, split, "shots"))
        drawn = torch.randperm(len(labels), generator=generator)
        rows = [drawn[labels[drawn] == label][:per_class] for label in labels.unique()]
        return torch.cat(rows).sort().values

    def take(self, task: str, split: str, index: Tensor) -> Batch:
        """Return the examples at some places of a split."""
        return next(Batch(*batch) for batch in self._split(task, split).batches(max(1, len(index)), index))

    def encode(self, state: State, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return features of a batch; see `Probe.encode`."""
        device = self.lab.device
        encoder = self.lab.encoder.eval()
        moved = {name: tensor.to(device) for name, tensor in state.items()}
        with products(DEFAULT, device):
            return functional_call(encoder, self._rest(moved), kwargs={k: v.to(device) for k, v in inputs.items()})

    def readout(self, task: str) -> Readout:
        """Return a task's frozen head."""
        return self.lab.head(task)

    def features(self, weights: Weights, task: str, split: str) -> Features:
        """Return the features of a whole split."""
        self.lab.backbone.require_features()
        return self.lab.features(weights, task, split)

    def grams(
        self, state: State, task: str, split: str, examples: int, parameters: Collection[str]
    ) -> dict[str, Tensor]:
        """Return Grams of the inputs of some parameters; see `Probe.grams`."""
        self.lab.fill({**self.lab.pretrained.state(), **state})
        with products(DEFAULT, self.lab.device):
            return grams(self.lab.encoder, self._first(task, split, examples), parameters)

    def order(self) -> list[list[str]]:
        """Return groups of matrix parameters in the order of a forward pass."""
        task = next(iter(self.lab.tasks))
        self.lab.fill(self.lab.pretrained.state())
        return order(self.lab.encoder, self._first(task, "train", 2))

    def joint(self, shares: Mapping[str, float]) -> Weights:
        """Return a model fine-tuned on all tasks together; see `Probe.joint`."""
        return self.lab.joint(shares)

    def _split(self, task: str, split: str) -> Split:
        return self.lab.splits(task)[split]

    def _first(self, task: str, split: str, examples: int) -> Iterator[dict[str, Tensor]]:
        held = self._split(task, split)
        for inputs, *_ in held.batches(self.lab.size.plain, torch.arange(min(examples, len(held)))):
            yield {name: tensor.to(self.lab.device) for name, tensor in inputs.items()}

    def _rest(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Fill in what `state` leaves out from the pre-trained model, whatever the encoder holds at the moment."""
        missing = [name for name in self.lab.pretrained.canonical() if name not in state]
        return {name: self.lab.pretrained[name].to(self.lab.device) for name in missing} | state

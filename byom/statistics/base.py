"""Statistics of fine-tuned models, and the one pass over a task's data that fits several of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from byom.data.feed import feed
from byom.data.splits import Split
from byom.errors import OptionError, whole
from byom.functional.heads import Readout
from byom.merge.base.probe import Batch


class Fitter(ABC):
    """A statistic in the making. The result depends neither on how examples are batched nor on their order."""

    @abstractmethod
    def update(self, batch: Batch) -> None:
        """Take in examples, on the encoder's device; each place comes once."""

    @abstractmethod
    def finish(self) -> dict[str, Tensor]:
        """Return the values under canonical parameter names, without parameters that the statistic does not cover."""


@dataclass(frozen=True)
class Statistic(ABC):
    """A frozen dataclass that says what is estimated.

    Args:
        examples: How many of the split's examples are looked at, the first ones; all if it has fewer.
        split: ``train`` or ``validation``.

    Raises:
        OptionError: If a value is out of range.
    """

    examples: int = 256
    split: str = "train"

    def __post_init__(self) -> None:
        whole("statistic.examples", self.examples, 1)
        if self.split not in ("train", "validation"):
            raise OptionError(f"statistic.split={self.split} may not be looked at; use train or validation")

    @abstractmethod
    def start(self, encoder: nn.Module, head: Readout) -> Fitter:
        """Begin to fit.

        Args:
            encoder: The fine-tuned model, in evaluation mode: keyword inputs to features ``[B, D]``. It is left
                as it was.
            head: The task's frozen head: features to logits ``[B, C]``.
        """


def fit(
    encoder: nn.Module,
    head: Readout,
    split: Split,
    statistics: Mapping[str, Statistic],
    batch_size: int,
) -> dict[str, dict[str, Tensor]]:
    """Fit several statistics of one model in one pass over its data.

    Args:
        encoder: The fine-tuned model, put in evaluation mode.
        head: The task's frozen head.
        split: The examples; each statistic takes the first ones.
        statistics: Name to what is fitted.
        batch_size: Examples a forward pass; changes no result beyond rounding.

    Returns:
        Statistic name to parameter name to values, on the encoder's device.
    """
    device = next(encoder.parameters()).device
    fitters = {name: statistic.start(encoder.eval(), head) for name, statistic in statistics.items()}
    places = _first(split, max((statistic.examples for statistic in statistics.values()), default=0))
    bar = tqdm(total=len(places), desc=f"fit {', '.join(statistics)}", unit="example", leave=False, mininterval=1)
    with bar, closing(feed(split.batches(batch_size, places), device)) as batches:
        for inputs, labels, index in batches:
            for name, fitter in fitters.items():
                _update(fitter, Batch(inputs, labels, index), index < statistics[name].examples)
            bar.update(len(index))
    return {name: fitter.finish() for name, fitter in fitters.items()}


def parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return a module's distinct parameters by canonical name: of tied ones the alphabetically first."""
    named = sorted(module.named_parameters(remove_duplicate=False))
    names = {id(parameter): name for name, parameter in reversed(named)}
    return {name: parameter for name, parameter in named if names[id(parameter)] == name}


def _first(split: Split, examples: int) -> Tensor:
    """The first places; texts from long to short, which spares padding."""
    places = torch.arange(min(examples, len(split)))
    if "attention_mask" not in split.inputs:
        return places
    return places[split.inputs["attention_mask"][places].sum(1).argsort(descending=True, stable=True)]


def _update(fitter: Fitter, batch: Batch, wanted: Tensor) -> None:
    if wanted.all():
        fitter.update(batch)
    elif wanted.any():
        keep = wanted.to(batch.labels.device)
        fitter.update(Batch({n: v[keep] for n, v in batch.inputs.items()}, batch.labels[keep], batch.places[wanted]))

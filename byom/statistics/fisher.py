"""The diagonal Fisher information: the mean over examples of squared gradients, one example at a time."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from textwrap import shorten
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from byom.errors import one_of, whole
from byom.functional.heads import Readout
from byom.functional.seeding import keyed
from byom.functional.tensors import wide
from byom.merge.base.probe import Batch
from byom.statistics.base import Fitter, Statistic, parameters

BUDGET = 1 << 27  # gradient entries held at a time: 512 MB in fp32
ESTIMATES = ("exact", "sampled", "empirical")


@dataclass(frozen=True)
class Fisher(Statistic):
    """The diagonal of the Fisher information of each parameter.

    ``F = (1/N) sum_i E_c[(d log p(c | x_i) / d theta)^2]``: gradients are squared for each example and class on its
    own, before any sum. An example is a whole input, a sequence included. Weight decay plays no part.

    Args:
        estimate: How the expectation over classes is taken. ``exact`` sums over all C classes, weighted by what
            the model gives them, and costs C backward passes per example. ``sampled`` draws labels from the model:
            unbiased, one backward pass per draw, and like ``exact`` it never sees a label of the data. ``empirical``
            takes the data's label, which is not the Fisher information away from a perfect fit.
        samples: Labels drawn per example by ``sampled`` (S).
        seed: With an example's place in the split it keys the draws.

    Raises:
        OptionError: If a value is out of range.

    References:
        Merging Models with Fisher-Weighted Averaging, section 3. https://arxiv.org/abs/2111.09832
        Limitations of the Empirical Fisher Approximation. https://arxiv.org/abs/1905.12558

    Differences:
        The authors sum over all classes of 4096 examples; the common re-implementations square the gradient of
        ``sum_c sqrt(p_c) log p_c`` summed over a batch, whose cross terms do not vanish (it can be 0 where the
        Fisher is 1). That form is not offered.
    """

    estimate: Literal["exact", "sampled", "empirical"] = "sampled"
    samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("statistic.estimate", self.estimate, ESTIMATES)
        whole("statistic.samples", self.samples, 1)

    def start(self, encoder: nn.Module, head: Readout) -> Fitter:
        """Begin to fit; see `Statistic.start`."""
        return FisherFitter(self, encoder, head)


class Rows(NamedTuple):
    """Pairs of an example and a class, each a backward pass."""

    examples: Tensor  # int64 [R], in the batch
    classes: Tensor  # int64 [R]
    weights: Tensor  # [R], how much the squared gradient counts


class FisherFitter(Fitter):
    """Sums squared per-example gradients in fp64; of single examples it holds what `BUDGET` or a GPU's memory allows.

    Args:
        what: What is estimated.
        encoder: The model.
        head: Its head.
    """

    def __init__(self, what: Fisher, encoder: nn.Module, head: Readout) -> None:
        self.what, self.encoder, self.head = what, encoder, head
        self.values = {
            name: wide(value.detach()) for name, value in parameters(encoder).items() if value.is_floating_point()
        }
        self.places = _places(encoder)
        self.sums = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in self.values.items()}
        self.chunk = _chunk(self.values)
        self.seen = 0
        self.together = True

    def update(self, batch: Batch) -> None:
        """Take in examples; see `Fitter.update`."""
        rows = self._rows(batch)
        start = 0
        while start < len(rows.examples):
            part = Rows(*(column[start : start + self.chunk] for column in rows))
            if self._fits(batch.inputs, part):
                start += len(part.examples)
        self.seen += len(batch.labels)

    def finish(self) -> dict[str, Tensor]:
        """Return the mean over examples, in fp32; see `Fitter.finish`."""
        return {name: (value / max(1, self.seen)).float() for name, value in self.sums.items()}

    def _rows(self, batch: Batch) -> Rows:
        if self.what.estimate == "empirical":
            return Rows(
                torch.arange(len(batch.labels), device=batch.labels.device), batch.labels, torch.ones(len(batch.labels))
            )
        with torch.no_grad():
            likely = self.head(self.encoder(**batch.inputs)).double().softmax(-1)
        if self.what.estimate == "sampled":
            return _sampled(likely, batch.places, self.what)
        examples, classes = likely.nonzero(as_tuple=True)
        return Rows(examples, classes, likely[examples, classes].float())

    def _fits(self, inputs: Mapping[str, Tensor], rows: Rows) -> bool:
        """Add some rows, or take fewer at a time where memory runs out."""
        try:
            gradients = self._gradients({name: value[rows.examples] for name, value in inputs.items()}, rows.classes)
        except torch.OutOfMemoryError:
            if len(rows.examples) == 1:
                raise
        else:
            self._add(gradients, rows.weights)
            return True
        self.chunk = len(rows.examples) // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return False

    def _add(self, gradients: dict[str, Tensor], weights: Tensor) -> None:
        for name in list(gradients):  # each is let go before the next is squared
            each = gradients.pop(name)
            self.sums[name] += torch.tensordot(weights.to(each), each.square(), 1)

    def _gradients(self, inputs: dict[str, Tensor], classes: Tensor) -> dict[str, Tensor]:
        """Gradients ``[R, *shape]`` of every row on its own."""
        if self.together and len(classes) > 1:
            try:
                with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no rule for many gradients at once
                    return vmap(grad(self._loss), in_dims=(None, 0, 0))(self.values, inputs, classes)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self.together = False
                reason = shorten(str(error), 120, placeholder=" ...")
                warnings.warn(
                    f"fisher: {type(self.encoder).__name__} refuses vmap ({reason}); "
                    "its gradients are taken one example at a time, which is slower",
                    stacklevel=2,
                )
        return self._one_by_one(inputs, classes)

    def _one_by_one(self, inputs: dict[str, Tensor], classes: Tensor) -> dict[str, Tensor]:
        rows = range(len(classes))
        gradients = [grad(self._loss)(self.values, {n: v[i] for n, v in inputs.items()}, classes[i]) for i in rows]
        return {name: torch.stack([each[name] for each in gradients]) for name in self.values}

    def _loss(self, values: dict[str, Tensor], inputs: dict[str, Any], label: Tensor) -> Tensor:
        kwargs = {name: value.unsqueeze(0) for name, value in inputs.items()}
        filled = {place: values[name] for place, name in self.places.items() if name in values}
        logits = self.head(functional_call(self.encoder, filled, kwargs=kwargs, tie_weights=False))
        if logits.shape[-1] == 1:
            return self._gaussian(logits, label)
        return cross_entropy(logits, label.unsqueeze(0))

    def _gaussian(self, logits: Tensor, label: Tensor) -> Tensor:
        """Return what has the score of a Gaussian of unit variance around one prediction as its gradient.

        The expectation over its labels is taken in closed form: that of the squared residual is 1.
        """
        if self.what.estimate == "empirical":
            return (logits - label).square().sum() / 2
        return logits.sum()


def _chunk(values: Mapping[str, Tensor]) -> int:
    """Return how many rows of gradients to hold at a time: on a GPU a quarter of what is free, in fp32."""
    entries = max(1, sum(value.numel() for value in values.values()))
    device = next((value.device for value in values.values()), torch.device("cpu"))
    if device.type != "cuda" or not torch.cuda.is_available():
        return max(1, BUDGET // entries)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # PyTorch's own, and unused
    return max(1, (torch.cuda.mem_get_info(device)[0] + kept) // (4 * 4 * entries))


def _places(module: nn.Module) -> dict[str, str]:
    """Canonical names of parameters by where they are: a tied one is in several places, a shared module counts once.

    `functional_call` ties by itself, but then it leaves its own tensors in a module that has two names.
    """
    names = {id(value): name for name, value in parameters(module).items()}
    return {
        f"{prefix}.{name}".removeprefix("."): names[id(value)]
        for prefix, part in module.named_modules()
        for name, value in part.named_parameters(recurse=False)
    }


def _sampled(likely: Tensor, places: Tensor, what: Fisher) -> Rows:
    """Draw classes by inverting the distribution function, so that rounding of p hardly ever changes a draw."""
    uniform = torch.stack([_uniform(what, int(place)) for place in places]).to(likely)
    reached = likely.cumsum(-1)
    classes = torch.searchsorted(reached, uniform * reached[:, -1:], right=True).clamp(max=likely.shape[-1] - 1)
    examples = torch.arange(len(places), device=likely.device).repeat_interleave(what.samples)
    return Rows(examples, classes.reshape(-1), torch.full((len(examples),), 1 / what.samples))


def _uniform(what: Fisher, place: int) -> Tensor:
    generator = torch.Generator().manual_seed(keyed(what.seed, "fisher", place))
    return torch.rand(what.samples, generator=generator, dtype=torch.float64)

"""The posterior precision that the optimiser IVON estimates around a fine-tuned model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from byom.errors import OptionError, at_least, fraction, positive, whole
from byom.functional.heads import Readout, loss
from byom.functional.seeding import keyed
from byom.merge.base.probe import Batch
from byom.statistics.base import Fitter, Statistic, parameters


@dataclass(frozen=True)
class Ivon(Statistic):
    """The diagonal precision of a Gaussian posterior around a model that was fine-tuned by any optimiser.

    IVON runs for a few steps at learning rate 0: the model stays where it is while ``h`` follows
    ``h <- b h + (1 - b) f + (1 - b)^2 (h - f)^2 / (2 (h + weight_decay))`` with
    ``f = ess (h + weight_decay) e * gradient(theta + e)`` and ``e ~ N(0, 1 / (ess (h + weight_decay)))``, an unbiased
    but noisy estimate of the diagonal Hessian of the mean loss, smoothed over about ``e``. The result is the
    precision ``ess (h + weight_decay)``. It looks at labels.

    This is a sketch of what training with IVON would give: `initial` is forgotten only as ``retention ** steps``, and
    where ``f`` is noisier than the Hessian is large, the quadratic term holds h at the noise. Raise `steps` and
    `retention` together.

    Args:
        steps: Optimiser steps.
        batch_size: Examples per step, in an order drawn by the seed.
        ess: Effective sample size; larger means less noise on the weights.
        initial: First value of h.
        retention: How much of h a step keeps (beta_2 in the paper), in [0, 1).
        weight_decay: Precision of the prior around 0, divided by `ess`.
        seed: Draws the order of examples and the noise.

    Raises:
        OptionError: If a value is out of range.

    References:
        Variational Learning is Effective for Large Deep Networks, algorithm 1. https://arxiv.org/abs/2402.17641

    Differences:
        There h is learned along with the model over a whole training run, with retention 0.99999 and initial 1.
    """

    steps: int = 200
    batch_size: int = 32
    ess: float = 1e7
    initial: float = 0.1
    retention: float = 0.98
    weight_decay: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("statistic.steps", self.steps, 1)
        whole("statistic.batch_size", self.batch_size, 1)
        positive("statistic.ess", self.ess, "1e7")
        positive("statistic.initial", self.initial, "0.1")
        fraction("statistic.retention", self.retention, below=1)
        at_least("statistic.weight_decay", self.weight_decay, 0, "1e-4")

    def start(self, encoder: nn.Module, head: Readout) -> Fitter:
        """Begin to fit; see `Statistic.start`.

        Raises:
            OptionError: If the package is not installed.
        """
        return IvonFitter(self, encoder, head, _optimiser())


class IvonFitter(Fitter):
    """Gathers the examples, and runs the optimiser on them at the end.

    Args:
        what: What is estimated.
        encoder: The model.
        head: Its head.
        optimiser: The class ``ivon.IVON``.
    """

    def __init__(self, what: Ivon, encoder: nn.Module, head: Readout, optimiser: Any) -> None:
        self.what, self.encoder, self.head, self.optimiser = what, encoder, head, optimiser
        self.examples: dict[int, tuple[dict[str, Tensor], Tensor]] = {}

    def update(self, batch: Batch) -> None:
        """Take in examples; see `Fitter.update`."""
        for row, place in enumerate(batch.places.tolist()):
            self.examples[place] = {name: value[row] for name, value in batch.inputs.items()}, batch.labels[row]

    def finish(self) -> dict[str, Tensor]:
        """Run the optimiser and return its posterior precision; see `Fitter.finish`."""
        trained = {name: value for name, value in parameters(self.encoder).items() if value.requires_grad}
        starts = {name: value.data for name, value in trained.items()}
        devices = {value.device for value in starts.values() if value.is_cuda}
        try:
            with torch.random.fork_rng(sorted(device.index for device in devices)):
                torch.manual_seed(keyed(self.what.seed, "ivon"))
                values = self._run(list(trained.values()), self._gathered())
        finally:
            for name, value in trained.items():
                value.data, value.grad = starts[name], None  # the optimiser puts copies in their place
        return {name: row.reshape(trained[name].shape) for name, row in zip(trained, values, strict=True)}

    def _gathered(self) -> Batch:
        """Return all examples in the order of their places."""
        places = sorted(self.examples)
        inputs, labels = zip(*(self.examples[place] for place in places), strict=True)
        together = {name: _stacked([each[name] for each in inputs]) for name in inputs[0]}
        return Batch(together, torch.stack(labels), torch.tensor(places))

    def _run(self, trained: list[nn.Parameter], batch: Batch) -> list[Tensor]:
        what = self.what
        optimiser = self.optimiser(
            trained,
            lr=0.0,
            ess=what.ess,
            hess_init=what.initial,
            beta2=what.retention,
            weight_decay=what.weight_decay,
        )
        for _ in range(what.steps):
            chosen = torch.randperm(len(batch.labels))[: what.batch_size].to(batch.labels.device)
            with torch.enable_grad(), optimiser.sampled_params(train=True):
                features = self.encoder(**{name: value[chosen] for name, value in batch.inputs.items()})
                error = loss(self.head, self.head(features), batch.labels[chosen])
                gradients = torch.autograd.grad(error, trained, allow_unused=True, materialize_grads=True)
                for value, gradient in zip(trained, gradients, strict=True):
                    value.grad = gradient
            optimiser.step()
        hessian = optimiser.param_groups[0]["hess"]
        return list((what.ess * (hessian + what.weight_decay)).split([value.numel() for value in trained]))


def _stacked(rows: list[Tensor]) -> Tensor:
    """Stack rows, padding token sequences of different length with 0, which their mask hides."""
    if rows[0].ndim != 1:
        return torch.stack(rows)
    longest = max(len(row) for row in rows)
    return torch.stack([pad(row, (0, longest - len(row))) for row in rows])


def _optimiser() -> Any:
    try:
        import ivon
    except ImportError as error:
        raise OptionError(
            "the statistic 'ivon' needs the package ivon-opt; install it with pip install ivon-opt, or use "
            "merge.posterior=fisher"
        ) from error
    return ivon.IVON

"""A small classifier of tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from byom.errors import OptionError
from byom.functional.seeding import keyed
from byom.merge.base import Problem
from byom.pipeline.router.base import LearnedRouter, Routing, labelled_by_task
from byom.variants.base.delta import Served


@dataclass(frozen=True)
class Perceptron(LearnedRouter):
    """Guess the task with a small network on the features of the shared model.

    One hidden layer with batch normalisation, ReLU and dropout, trained by cross-entropy on which task a training
    example belongs to. The share of a task is its softmax probability.

    Args:
        hidden: Width of the hidden layer.
        dropout: Fraction of hidden units dropped in training, in [0, 1).
        epochs: Passes over the training examples of all tasks.
        learning_rate: Adam's.
        seed: Draws initial values and orders.
        mix: ``sample`` or ``batch``; see `LearnedRouter`.
        batch_size: For ``mix=batch``.
        heads: ``routed`` or ``given``; see `LearnedRouter`.

    References:
        Twin-Merging: Dynamic Integration of Modular Expertise in Model Merging, section 3.3.
        https://arxiv.org/abs/2406.15479

    Differences:
        The authors mix experts by the softmax shares of each input; here the likeliest task serves an example alone,
        because a mixture per sample is a model per sample. ``mix=batch`` mixes, by the mean over a batch.
    """

    hidden: int = 1024
    dropout: float = 0.5
    epochs: int = 20
    learning_rate: float = 1e-3
    seed: int = 0

    title = "MLP-routed"

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.hidden, self.epochs, self.learning_rate) <= 0 or not 0 <= self.dropout < 1:
            raise OptionError(
                f"router.hidden={self.hidden}, router.epochs={self.epochs} and router.learning_rate="
                f"{self.learning_rate} must be positive, router.dropout={self.dropout} in [0, 1)"
            )

    def fit(self, problem: Problem, served: Served) -> Routing:
        """Train on the features of the training examples; see `Router.fit`."""
        probe, shared = problem.inputs(), served.reference
        values, tasks = labelled_by_task([probe.features(shared, t, "train").values for t in problem.tasks])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keyed(self.seed, "router"))
            network = self._network(values.shape[1], len(problem.tasks))
            self._train(network, values, tasks)
        return _Network(self, problem, served, network.eval())

    def restored(self, tensors: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
        """Build the trained network; see `LearnedRouter.restored`."""
        network = self._network(tensors["0.weight"].shape[1], len(tensors["4.weight"])).eval()
        network.load_state_dict(dict(tensors))
        return lambda features: network(features).softmax(-1)

    def _network(self, width: int, tasks: int) -> nn.Module:
        return nn.Sequential(
            nn.Linear(width, self.hidden),
            nn.BatchNorm1d(self.hidden),
            nn.ReLU(),
            nn.Dropout(self.dropout),
            nn.Linear(self.hidden, tasks),
        )

    def _train(self, network: nn.Module, values: Tensor, tasks: Tensor) -> None:
        optimizer = torch.optim.Adam(network.parameters(), lr=self.learning_rate)
        for _ in range(self.epochs):
            for batch in torch.randperm(len(values)).split(64):
                if len(batch) == 1:  # batch normalisation has no variance of one example
                    continue
                loss = cross_entropy(network(values[batch]), tasks[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()


class _Network(Routing):
    def __init__(self, router: Perceptron, problem: Problem, served: Served, network: nn.Module) -> None:
        self.router, self.problem, self.served, self.network = router, problem, served, network

    @torch.no_grad()
    def shares(self, task: str, split: str) -> Tensor:
        features = self.problem.inputs().features(self.served.reference, task, split).values
        return self.network(features).softmax(-1)

    @property
    def stored(self) -> tuple[Tensor, ...]:
        return tuple(self.network.state_dict().values())

    @property
    def tensors(self) -> dict[str, Tensor]:
        return dict(self.network.state_dict())

"""Nearest neighbours on features."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from byom.errors import OptionError
from byom.functional.seeding import keyed
from byom.merge.base import Problem
from byom.pipeline.router.base import LearnedRouter, Routing, labelled_by_task
from byom.variants.base.delta import Served


@dataclass(frozen=True)
class NearestNeighbours(LearnedRouter):
    """Guess the task from the nearest training examples in the features of the pre-trained encoder.

    The share of a task is the fraction of its examples among the neighbours, all with equal weight.

    Args:
        neighbours: How many neighbours vote (k).
        examples: Unlabelled training examples kept per task, drawn by `seed`.
        seed: Draws them.
        metric: Distance between features, ``euclidean`` as in the paper or ``cosine``. The norm of features pooled over
            tokens falls with the length of a text, and then the shortest distances go to tasks of long texts.
        mix: ``sample`` or ``batch``; see `LearnedRouter`.
        batch_size: For ``mix=batch``.
        heads: ``routed`` or ``given``; see `LearnedRouter`.

    References:
        Less is More: Efficient Model Merging with Binary Task Switch, section 4 (Auto-Switch).
        https://arxiv.org/abs/2412.00054

    Differences:
        The authors' code averages the shares over batches of one data set (``mix=batch``) and scores with the data
        set's own head (``heads=given``); both give the task away in part, so neither is the default.
    """

    neighbours: int = 10
    examples: int = 100
    seed: int = 0
    metric: Literal["euclidean", "cosine"] = "euclidean"

    title = "kNN-routed"
    features = "pretrained"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.neighbours < 1 or self.examples < 1:
            raise OptionError(f"router.neighbours={self.neighbours} and router.examples={self.examples} must be >= 1")
        if self.metric not in ("euclidean", "cosine"):
            raise OptionError(f"router.metric={self.metric} is not known; use euclidean or cosine")

    def fit(self, problem: Problem, served: Served) -> Routing:
        """Keep a few training examples of each task; see `Router.fit`."""
        values, tasks = labelled_by_task([self._drawn(problem, task) for task in problem.tasks])
        return _Neighbours(self, problem, values, tasks)

    def restored(self, tensors: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
        """Let the kept examples vote; see `LearnedRouter.restored`."""
        from sklearn.neighbors import KNeighborsClassifier

        values, tasks = tensors["values"], tensors["tasks"]
        voters = min(self.neighbours, len(values))
        model = KNeighborsClassifier(voters, metric=self.metric).fit(values.numpy(), tasks.numpy())
        return lambda features: torch.from_numpy(model.predict_proba(features.numpy())).float()

    def _drawn(self, problem: Problem, task: str) -> Tensor:
        values = problem.inputs().features(problem.pretrained, task, "train").values
        generator = torch.Generator().manual_seed(keyed(self.seed, "router", task))
        return values[torch.randperm(len(values), generator=generator)[: self.examples]]


class _Neighbours(Routing):
    def __init__(self, router: NearestNeighbours, problem: Problem, values: Tensor, tasks: Tensor) -> None:
        self.router, self.problem, self.values, self.tasks = router, problem, values, tasks
        self.vote = router.restored(self.tensors)

    def shares(self, task: str, split: str) -> Tensor:
        features = self.problem.inputs().features(self.problem.pretrained, task, split).values
        return self.vote(features)

    @property
    def stored(self) -> tuple[Tensor, ...]:
        return (self.values,)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.values, "tasks": self.tasks}

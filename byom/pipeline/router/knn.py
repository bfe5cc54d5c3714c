"""Nearest neighbours on features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.neighbours < 1 or self.examples < 1:
            raise OptionError(f"router.neighbours={self.neighbours} and router.examples={self.examples} must be >= 1")
        if self.metric not in ("euclidean", "cosine"):
            raise OptionError(f"router.metric={self.metric} is not known; use euclidean or cosine")

    def fit(self, problem: Problem, served: Served) -> Routing:
        """Keep a few training examples of each task; see `Router.fit`."""
        from sklearn.neighbors import KNeighborsClassifier

        values, tasks = labelled_by_task([self._drawn(problem, task) for task in problem.tasks])
        voters = min(self.neighbours, len(values))
        model = KNeighborsClassifier(voters, metric=self.metric).fit(values.numpy(), tasks.numpy())
        return _Neighbours(self, problem, model, values)

    def _drawn(self, problem: Problem, task: str) -> Tensor:
        values = problem.inputs().features(problem.pretrained, task, "train").values
        generator = torch.Generator().manual_seed(keyed(self.seed, "router", task))
        return values[torch.randperm(len(values), generator=generator)[: self.examples]]


class _Neighbours(Routing):
    def __init__(self, router: NearestNeighbours, problem: Problem, model: Any, values: Tensor) -> None:
        self.router, self.problem, self.model, self.values = router, problem, model, values

    def shares(self, task: str, split: str) -> Tensor:
        features = self.problem.inputs().features(self.problem.pretrained, task, split).values
        return torch.from_numpy(self.model.predict_proba(features.numpy())).float()

    @property
    def stored(self) -> tuple[Tensor, ...]:
        return (self.values,)

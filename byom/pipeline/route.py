"""Evaluation without task identity: a router chooses, or mixes, the task models for each example."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from byom.pipeline.evaluate import Score
from byom.pipeline.lab import Lab
from byom.pipeline.router.base import Routing
from byom.variants.base.delta import Served
from byom.weights import Weights

Rows = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Routed:
    """Evaluation when the task of each example has to be guessed.

    Args:
        lab: Encoder, heads and data.
        served: The shared models and packed differences that serve the tasks.
        routing: The fitted router.
    """

    lab: Lab
    served: Served
    routing: Routing

    def evaluate(
        self, splits: Iterable[str], known: Callable[[str, str], Score]
    ) -> tuple[dict[str, Rows], dict[str, Any]]:
        """Score all tasks.

        Args:
            splits: Splits to score.
            known: Scores a task's split with the task known.

        Returns:
            Split to task to a score as JSON, and split to task to the fraction of examples sent to their own task.
        """
        router, tasks = self.routing.router, list(self.lab.tasks)
        scores: dict[str, Rows] = {}
        right: dict[str, Any] = {}
        for split in splits:
            shares = {task: self.routing.shares(task, split) for task in tasks}
            if router.mix == "batch":
                shares = {task: _by_batch(rows, router.batch_size) for task, rows in shares.items()}
            if router.mix == "sample" and router.heads == "routed":
                points = _right(shares, known, split)
            else:
                points = self._points(split, shares)
            scores[split] = {task: Score.of(points[task], self.lab.tasks[task].metric).to_json() for task in tasks}
            right[split] = {t: float((shares[t].argmax(1) == i).double().mean()) for i, t in enumerate(tasks)}
        return scores, {"accuracy": right, "mix": router.mix, "heads": router.heads}

    def _points(self, split: str, shares: dict[str, Tensor]) -> dict[str, Tensor]:
        router, names = self.routing.router, list(shares)
        points: dict[str, Tensor] = {}
        groups = _mixtures(shares) if router.mix == "batch" else _choices(shares)
        for (model_shares, answering), members in tqdm(
            groups.items(), desc="route", unit="model", leave=False, mininterval=1
        ):
            model: Weights | None = None
            for task, places in members.items():
                if router.heads == "routed" and names[answering] != task:
                    continue  # another task's head cannot give this task's answer
                model = model or _mixed(self.served, names, model_shares)
                scored = self._scored(model, task, split, places)
                points.setdefault(task, torch.zeros(len(shares[task]), dtype=scored.dtype))[places] = scored
        return {task: points.get(task, torch.zeros(len(rows), dtype=torch.bool)) for task, rows in shares.items()}

    def _scored(self, model: Weights, task: str, split: str, places: Tensor) -> Tensor:
        """Return the scores of a model with the task's own head on examples at some places of a split."""
        part = self.lab.splits(task)[split].at(places)
        self.lab.fill(model.state())
        head = self.served.deltas[task].readout(self.lab.head(task))
        return self.lab.evaluated(head, part, self.lab.tasks[task].metric).points


def _right(shares: dict[str, Tensor], known: Callable[[str, str], Score], split: str) -> dict[str, Tensor]:
    """Give examples sent to their own task's model its answers; elsewhere no head has the right classes."""
    places = enumerate(shares.items())
    return {task: known(task, split).points * (rows.argmax(1) == place) for place, (task, rows) in places}


def _by_batch(shares: Tensor, size: int) -> Tensor:
    """Give every example of a batch the batch's mean shares."""
    return torch.cat([rows.mean(0).expand_as(rows) for rows in shares.split(size)])


Groups = dict[tuple[tuple[float, ...], int], dict[str, Tensor]]


def _choices(shares: dict[str, Tensor]) -> Groups:
    """Group examples by the one model that serves them: model -> task -> places."""
    groups: Groups = {}
    for task, rows in shares.items():
        chosen = rows.argmax(1)
        for model in chosen.unique().tolist():
            one_hot = tuple(float(i == model) for i in range(rows.shape[1]))
            groups.setdefault((one_hot, model), {})[task] = (chosen == model).nonzero().flatten()
    return groups


def _mixtures(shares: dict[str, Tensor]) -> Groups:
    """Group examples by the mixture that serves their batch."""
    groups: Groups = {}
    for task, rows in shares.items():
        mixtures, which = rows.unique(dim=0, return_inverse=True)
        for place, mixture in enumerate(mixtures):
            key = (tuple(mixture.tolist()), int(mixture.argmax()))
            groups.setdefault(key, {})[task] = (which == place).nonzero().flatten()
    return groups


def _mixed(served: Served, names: list[str], shares: tuple[float, ...]) -> Weights:
    parts = [(share, served.weights(name)) for name, share in zip(names, shares, strict=True) if share > 0]
    if len(parts) == 1:
        return parts[0][1].materialise()
    total: Any = sum(share * weights for share, weights in parts)
    return total.materialise()

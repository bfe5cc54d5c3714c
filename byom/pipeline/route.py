"""Evaluation without task identity: a router chooses, or mixes, the task models for each example."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from byom.data.splits import Split
from byom.pipeline.evaluate import Score
from byom.pipeline.lab import Lab
from byom.pipeline.router.base import LearnedRouter, Routing
from byom.variants.base.delta import Served
from byom.weights import Weights

Rows = dict[str, dict[str, Any]]


def evaluate_routed(
    lab: Lab,
    served: Served,
    routing: Routing,
    router: LearnedRouter,
    splits: Iterable[str],
    known: Callable[[str, str], Score],
) -> tuple[dict[str, Rows], dict[str, Any]]:
    """Score all tasks when each example's task has to be guessed.

    Args:
        lab: Encoder, heads and data.
        served: What serves the tasks.
        routing: The fitted router.
        router: Its options, which say whether examples are routed one by one and whose head answers.
        splits: Splits to score.
        known: Scores a task's split with the task known.

    Returns:
        Split to task to a score as JSON, and split to task to the fraction of examples sent to their own task.
    """
    scores: dict[str, Rows] = {}
    right: dict[str, Any] = {}
    for split in splits:
        shares = {task: routing.shares(task, split) for task in lab.tasks}
        if router.mix == "batch":
            shares = {task: _by_batch(rows, router.batch_size) for task, rows in shares.items()}
        tasks = list(lab.tasks)
        alone = router.mix == "sample" and router.heads == "routed"
        points = _right(shares, known, split) if alone else _points(lab, served, router, split, shares)
        scores[split] = {task: Score.of(points[task], lab.tasks[task].metric).to_json() for task in tasks}
        right[split] = {t: float((shares[t].argmax(1) == i).double().mean()) for i, t in enumerate(tasks)}
    return scores, {"accuracy": right, "mix": router.mix, "heads": router.heads}


def _right(shares: dict[str, Tensor], known: Callable[[str, str], Score], split: str) -> dict[str, Tensor]:
    """An example sent to its own task's model gets that model's answer; elsewhere no head has the right classes."""
    places = enumerate(shares.items())
    return {task: known(task, split).points * (rows.argmax(1) == place) for place, (task, rows) in places}


def _by_batch(shares: Tensor, size: int) -> Tensor:
    """Give every example of a batch the batch's mean shares."""
    return torch.cat([rows.mean(0).expand_as(rows) for rows in shares.split(size)])


def _points(
    lab: Lab, served: Served, router: LearnedRouter, split: str, shares: dict[str, Tensor]
) -> dict[str, Tensor]:
    points: dict[str, Tensor] = {}
    groups = _mixtures(shares) if router.mix == "batch" else _choices(shares)
    names = list(shares)
    for (model_shares, answering), members in tqdm(
        groups.items(), desc="route", unit="model", leave=False, mininterval=1
    ):
        model: Weights | None = None
        for task, places in members.items():
            if router.heads == "routed" and names[answering] != task:
                continue  # another task's head cannot give this task's answer
            model = model or _mixed(served, names, model_shares)
            scored = _score(lab, served, model, task, split, places)
            points.setdefault(task, torch.zeros(len(shares[task]), dtype=scored.dtype))[places] = scored
    return {task: points.get(task, torch.zeros(len(rows), dtype=torch.bool)) for task, rows in shares.items()}


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


def _score(lab: Lab, served: Served, model: Weights, task: str, split: str, places: Tensor) -> Tensor:
    whole = lab.splits(task)[split]
    part = Split({name: rows[places] for name, rows in whole.inputs.items()}, whole.labels[places], whole.fingerprint)
    lab.fill(model.state())
    return lab.points(served.deltas[task].readout(lab.head(task)), part, lab.tasks[task].metric)

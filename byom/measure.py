"""What is measured of a run besides predictions: summaries, distances, storage, fingerprints."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from byom.lab import Lab
from byom.merge.base import Problem
from byom.variants.base import Delta, Variant
from byom.weights import Weights


def norms(problem: Problem, task: str, reference: Weights, model: Weights) -> dict[str, float]:
    """Return the distances that say what was put back and what was lost.

    Args:
        problem: The models.
        task: The task.
        reference: What the variant's difference was taken to.
        model: The task's weights after the difference was put back.

    Returns:
        Euclidean norms of theta_t - theta_0, theta_t - reference, what was kept and what was dropped.
    """
    expert = problem.finetuned[task]
    return {
        "to_pretrained": _distance(expert, problem.pretrained),
        "to_merged": _distance(expert, reference),
        "kept": (model - reference).norm(),
        "dropped": (expert - model).norm(),
    }


@lru_cache(maxsize=64)  # the cells of a sweep share their experts and references
def _distance(a: Weights, b: Weights) -> float:
    return (a - b).norm()


def stored(variant: Variant, problem: Problem, deltas: Mapping[str, Delta]) -> dict[str, Any]:
    """Account for what must be stored to serve all tasks.

    Args:
        variant: The variant.
        problem: The models.
        deltas: Task name to packed difference.

    Returns:
        Values only (shared model + all tasks: the BYOM convention), honest bytes (positions included), and the
        density relative to all parameters and to those that differ from the pre-trained model.
    """
    base = problem.pretrained
    shared = base.numel if variant.shares_reference else 0
    shared_bytes = sum(base[name].nbytes for name in base.mergeable()) if variant.shares_reference else 0
    kept = {task: delta.stored_parameters for task, delta in deltas.items()}
    differing = {task: _count_differing(base, problem.finetuned[task]) for task in deltas}
    return {
        "model_parameters": base.numel,
        "shared_parameters": shared,
        "task_parameters": kept,
        "parameters": shared + sum(kept.values()),
        "bytes": shared_bytes + sum(delta.nbytes for delta in deltas.values()),
        "differing_parameters": differing,
        "density": {
            "of_all": sum(kept.values()) / (len(kept) * base.numel),
            "of_differing": sum(kept.values()) / max(1, sum(differing.values())),
        },
    }


@lru_cache(maxsize=64)
def _count_differing(a: Weights, b: Weights) -> int:
    return sum(int((a[name] != b[name]).sum()) for name in a.mergeable())


def fingerprints(lab: Lab, experts: Mapping[str, Weights]) -> dict[str, Any]:
    """Return what identifies the inputs: pre-trained and fine-tuned weights, and every split."""
    return {
        "pretrained": lab.pretrained.fingerprint(),
        "experts": {task: weights.fingerprint() for task, weights in experts.items()},
        "data": {task: {name: s.fingerprint for name, s in lab.splits(task).items()} for task in lab.tasks},
    }


def summary(scores: Mapping[str, Any], single: Mapping[str, float]) -> dict[str, float]:
    """Return absolute accuracy and normalised accuracy (the mean over tasks of the ratio to the task's own model)."""
    accuracy = {task: row["accuracy"] for task, row in scores.items()}
    ratios = [ratio(accuracy[task], single[task]) for task in accuracy]
    return {"absolute": sum(accuracy.values()) / len(accuracy), "normalised": sum(ratios) / len(ratios)}


def ratio(accuracy: float, single: float) -> float:
    """Return an accuracy relative to the single-task model's; 1 where both are 0."""
    return accuracy / single if single else float(accuracy == single)

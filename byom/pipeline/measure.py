"""Measurements of a run other than predictions: summaries, distances, storage, fingerprints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from byom.functional.metrics import ratio, value_of
from byom.merge.base import Problem
from byom.pipeline.lab import Lab, count_differing
from byom.pipeline.router.base import Routing
from byom.storage import tensor_files as storage
from byom.variants.base.common import apart
from byom.variants.base.delta import Served
from byom.weights import Weights


def norms(lab: Lab, expert: Weights, reference: Weights, model: Weights) -> dict[str, float]:
    """Return the distances that say what was put back and what was lost.

    Args:
        lab: Has theta_0, and remembers distances between models that cells share.
        expert: theta_t.
        reference: The model that the variant's difference was taken to.
        model: The task's weights after the difference was put back.

    Returns:
        Euclidean norms of theta_t - theta_0, theta_t - reference, what was kept and what was dropped.
    """
    return {
        "to_pretrained": lab.distance(expert, lab.pretrained),
        "to_merged": lab.distance(expert, reference),
        "kept": (model - reference).norm(),
        "dropped": (expert - model).norm(),
    }


def stored(
    served: Served,
    problem: Problem,
    frozen: int = 0,
    differing: Callable[[Weights, Weights], int] = count_differing,
) -> dict[str, Any]:
    """Account for what must be stored to serve all tasks.

    Args:
        served: Shared models, and one packed difference per task.
        problem: The models.
        frozen: Parameters outside the encoder that published counts include and no expert changes.
        differing: Counts the parameters in which two models differ; a lab's remembers.

    Returns:
        Values only (shared models + all tasks: the BYOM convention), honest bytes (positions and masks included),
        and the density: values stored per task relative to all parameters of one model, and to those that differ
        from the pre-trained model. Masks and signs are bytes and no values, so that the density of a variant that
        stores masks is near 0, and ``task_bytes`` says what they take. What several tasks have in common beyond the
        shared models counts once, with the first of them. Where `frozen` is given, ``with_frozen``
        holds model parameters, parameters and density with those counted in.
    """
    base, tasks = problem.pretrained, apart(served.deltas)
    shared = sum(weights.numel for weights in served.shared)
    values = {task: delta.stored_parameters for task, delta in tasks.items()}
    nbytes = {task: delta.nbytes for task, delta in tasks.items()}
    changed = {task: differing(base, problem.finetuned[task]) for task in tasks}
    return {
        "model_parameters": base.numel,
        "shared_models": len(served.shared),
        "shared_parameters": shared,
        "task_parameters": values,
        "parameters": shared + sum(values.values()),
        "task_bytes": nbytes,
        "bytes": sum(map(_bytes, served.shared)) + sum(nbytes.values()),
        "differing_parameters": changed,
        "density": {
            "of_all": sum(values.values()) / (len(values) * base.numel),
            "of_differing": sum(values.values()) / max(1, sum(changed.values())),
        },
    } | ({"with_frozen": _with_frozen(frozen, base.numel, shared, values)} if frozen else {})


def _with_frozen(frozen: int, model: int, shared: int, values: Mapping[str, int]) -> dict[str, float]:
    """Count as papers do whose checkpoints hold frozen parameters too, which are stored once."""
    density = sum(values.values()) / (len(values) * (model + frozen))
    return {
        "model_parameters": model + frozen,
        "parameters": shared + frozen + sum(values.values()),
        "density": density,
    }


def _bytes(weights: Weights) -> int:
    """Return the bytes of a model's parameters, without reading them; buffers do not count."""
    return sum(storage.size(weights.shape(name), weights.dtype(name)) for name in weights.mergeable())


def fingerprints(lab: Lab, experts: Mapping[str, Weights]) -> dict[str, Any]:
    """Return what identifies the inputs: pre-trained and fine-tuned weights, and every split read."""
    return {
        "pretrained": lab.pretrained.fingerprint(),
        "experts": {task: weights.fingerprint() for task, weights in experts.items()},
        "data": {task: {name: s.fingerprint for name, s in lab.splits(task).read.items()} for task in lab.tasks},
    }


def summary(scores: Mapping[str, Any], single: Mapping[str, float]) -> dict[str, float]:
    """Return absolute accuracy and normalised accuracy (the mean over tasks of the ratio to the task's own model)."""
    accuracy = {task: value_of(row) for task, row in scores.items()}
    ratios = [ratio(accuracy[task], single[task]) for task in accuracy]
    return {"absolute": sum(accuracy.values()) / len(accuracy), "normalised": sum(ratios) / len(ratios)}


def routing(routing: Routing | None) -> dict[str, int]:
    """Account for what a router stores; nothing where tasks are known."""
    tensors = routing.stored if routing else ()
    return {"router_parameters": sum(t.numel() for t in tensors), "router_bytes": sum(t.nbytes for t in tensors)}

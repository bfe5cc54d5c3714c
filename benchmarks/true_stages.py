"""The stages that `benchmarks.true_size` measures, each run in a process of its own."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import true_models
from benchmarks.peak import Report
from benchmarks.true_models import built, examples
from byom.backbone.base import fill
from byom.checkpoint.bundle import Bundle
from byom.errors import CheckpointError
from byom.merge.base import MergeMethod
from byom.variants.base import Preparation, Variant
from byom.variants.fft import ByomFft
from byom.weights import Weights

TASK = "task0"  # the one that is opened and encoded


def merge(
    folder: Path, tasks: int, method: MergeMethod, before: Preparation | None, out: Path, shard: int, report: Report
) -> dict[str, Any]:
    """Merge from disk to disk."""
    given = true_models.problem(folder, tasks)
    merged = method(before(given) if before else given)
    _counted(merged, report).save(out, shard)
    return {"bytes": _bytes(out)}


def pack(folder: Path, tasks: int, variant: Variant, reference: Path, out: Path, report: Report) -> dict[str, Any]:
    """Pack every task against a model on disk, and save the bundle."""
    served = variant.streamed(true_models.problem(folder, tasks), Weights.open(reference))
    Bundle(served.reference, served.deltas, served.base).save(out)
    return {"bytes_a_task": sum(file.stat().st_size for file in out.glob("*.safetensors")) // tasks}


def restore(folder: Path, tasks: int, bundle: Path, report: Report) -> dict[str, Any]:
    """Open a bundle and read one task's whole model from it."""
    return {"parameters": Bundle.open(bundle).weights(TASK).materialise().numel}


def encode(folder: Path, tasks: int, name: str, bundle: Path, device: str, report: Report) -> dict[str, Any]:
    """Encode a few inputs with a bundle's shared model and with one task's."""
    opened = Bundle.open(bundle)
    shared, shared_seconds = features(name, opened.reference, device)
    own, own_seconds = features(name, opened.weights(TASK), device)
    if not (shared.isfinite().all() and own.isfinite().all()):
        raise CheckpointError(f"features of {bundle} are not finite; true models must not overflow")
    return {"examples": len(own), "shared_seconds": shared_seconds, "own_seconds": own_seconds}


def exact(folder: Path, tasks: int, name: str, bundle: Path, device: str, report: Report) -> dict[str, Any]:
    """See whether BYOM-FFT at density 1 has the expert's features bit for bit, and at the bundle's density has not."""
    opened, expert = Bundle.open(bundle), true_models.problem(folder, tasks).finetuned[TASK]
    whole = ByomFft(1.0).delta(expert, opened.reference).apply(opened.reference)
    models = {"expert": expert, "whole": whole, "part": opened.weights(TASK)}
    found = {kind: features(name, weights, device)[0] for kind, weights in models.items()}
    same = {kind: torch.equal(found[kind], found["expert"]) for kind in ("whole", "part")}
    return {"exact": same["whole"], "exact_in_part": same["part"]}


@torch.inference_mode()
def features(name: str, weights: Weights, device: str) -> tuple[torch.Tensor, float]:
    """Return features ``[B, D]`` of the examples, and the seconds of the second of two forward passes."""
    module = fill(built(name), weights.state(), weights.origin).to(device)
    inputs = {key: value.to(device) for key, value in examples(name).items()}
    module(**inputs)
    start = time.perf_counter()
    found = module(**inputs).cpu()
    return found, round(time.perf_counter() - start, 4)


def _counted(weights: Weights, report: Report) -> Weights:
    """Report the fraction of parameters as they are read one after the other."""
    total, read = max(1, weights.numel), 0

    def counting(name: str) -> torch.Tensor:
        nonlocal read
        value = weights[name]
        read += value.numel() if value.is_floating_point() else 0
        report(min(read / total, 1.0))
        return value

    return weights.derived(counting, weights.origin)


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))

"""Records as a finished sweep leaves them: 8 tasks, 3 seeds, made-up but plausible numbers."""

from __future__ import annotations

import json
import zlib
from functools import cache
from pathlib import Path

import numpy as np

from byom.report.report import Runs, Tables
from byom.storage.record import Record

TASKS = ("mnist", "svhn", "fashion_mnist", "cifar10", "eurosat", "gtsrb", "dtd", "flowers102")
OWN = dict(zip(TASKS, (0.985, 0.93, 0.905, 0.96, 0.97, 0.95, 0.68, 0.89), strict=True))
PRETRAINED = dict(zip(TASKS, (0.72, 0.38, 0.71, 0.88, 0.78, 0.46, 0.52, 0.71), strict=True))
# the part of the way from the pre-trained model to the task's own that each merged model has gone
REACHED = {"average": 0.42, "task_arithmetic": 0.55, "ties": 0.62}
DENSITIES = (0.01, 0.05, 0.1, 0.2)
SIZE = 22_000_000
EXAMPLES = 300


def _score(task: str, reached: float, seed: int, split: str) -> dict:
    return dict(_drawn(task, reached, seed, split))


@cache
def _drawn(task: str, reached: float, seed: int, split: str) -> dict:
    """Draw hits from difficulties every model shares, so that comparisons are paired."""
    rng = np.random.default_rng([zlib.crc32(task.encode()), len(split)])
    difficulty = rng.uniform(size=EXAMPLES)
    rng = np.random.default_rng([zlib.crc32(task.encode()), len(split), seed, int(1e4 * reached)])
    accuracy = PRETRAINED[task] + reached * (OWN[task] - PRETRAINED[task])
    hits = difficulty + rng.normal(0, 0.02, EXAMPLES) < accuracy + rng.normal(0, 0.004)
    return {"accuracy": float(hits.mean()), "examples": EXAMPLES, "hits": np.packbits(hits).tobytes().hex()}


def _reached(merge: str, variant: str, density: float) -> float:
    if variant == "single_task":
        return 1.0
    start = {"none": 0.0, "post_pruning": 0.0}.get(variant, 0.1) if merge == "pretrained" else REACHED[merge]
    return start + (1 - start) * (1 - np.exp(-((100 * density) ** 0.75) / 3)) if density else start


def _storage(variant: str, density: float) -> dict:
    if variant == "single_task":
        shared, each, position = 0, SIZE, 0
    else:
        shared, each = SIZE, int(density * SIZE)
        position = min(2.0, 1 / (8 * density)) if density else 0
    parameters = shared + len(TASKS) * each
    return {
        "shared_parameters": shared,
        "task_parameters": dict.fromkeys(TASKS, each),
        "parameters": parameters,
        "bytes": 4 * parameters + int(position * each * len(TASKS)),
        "model_parameters": SIZE,
        "differing_parameters": dict.fromkeys(TASKS, SIZE - 1000),
        "density": {"of_all": density, "of_differing": density},
    }


def _norms(merge: str, density: float) -> dict:
    distance = 3.1 * (1.0 if merge == "pretrained" else 1.15 - 0.4 * REACHED[merge])
    dropped = distance * (1 - density) ** 2
    kept = (distance**2 - dropped**2) ** 0.5
    norms = {"to_pretrained": 3.1, "to_merged": distance, "kept": kept, "dropped": dropped}
    return {task: dict(norms) for task in TASKS}


def record(merge: str, variant: str, seed: int, density: float = 0.0, **changes) -> dict:
    """Return one finished record; `changes` replace choices."""
    reached = _reached(merge, variant, density)
    scores = {s: {t: _score(t, reached, seed, s) for t in TASKS} for s in ("test", "validation")}
    single = {s: {t: _score(t, 1.0, seed, s)["accuracy"] for t in TASKS} for s in scores}
    tuned = {"scale": 0.3 + 0.1 * (seed == 2)} if merge != "pretrained" and variant != "single_task" else {}
    choices = {
        "suite": "vision8_offline", "backbone": "vit_small_dinov2", "finetune": "full", "merge": merge,
        "byom": variant, "tune": "validation", "seed": seed,
    } | changes  # fmt: skip
    byom = {"density": density, "scope": "global"} if density else {}
    merging = {"scale": tuned["scale"], "density": 0.2} if merge == "ties" else dict(tuned)
    signature = f"{zlib.crc32(json.dumps([choices, byom, merging]).encode()):08x}"
    return {
        "format": 1,
        "status": "done",
        "signature": signature,
        "created": "2026-11-22T15:00:00Z",
        "choices": choices,
        "hyperparameters": {"merge": merging, "byom": byom},
        "config": {"finetune": {"steps": 500}},
        "scores": scores,
        "single_task": single,
        "summary": {split: _summary(scores[split], single[split]) for split in scores},
        "tuning": {"searched": 10, "chosen": tuned, "trail": []} if tuned else {"searched": 0, "chosen": {}},
        "storage": _storage(variant, density),
        "norms": _norms(merge, density),
        "stages": {},
        "skipped_tasks": [],
        "provenance": {"commit": "abc", "dirty": False},
        "fingerprints": {"data": {task: {"train": f"r{seed}", "test": "t"} for task in TASKS}},
    }


def _summary(scores: dict, single: dict) -> dict:
    accuracy = np.array([score["accuracy"] for score in scores.values()])
    own = np.array(list(single.values()))
    return {"absolute": float(accuracy.mean()), "normalised": float((accuracy / own).mean())}


def records(seeds: tuple[int, ...] = (0, 1, 2), densities: tuple[float, ...] = DENSITIES) -> list[dict]:
    """Return a whole sweep."""
    cells: list[tuple] = [("pretrained", "none"), ("pretrained", "single_task")]
    cells += [(merge, "none") for merge in REACHED]
    cells += [("pretrained", "post_pruning", m) for m in densities]
    cells += [(merge, "fft", m) for merge in REACHED for m in densities]
    return [record(cell[0], cell[1], seed, *cell[2:]) for cell in cells for seed in seeds]


def lift(made: list[dict]) -> list[Record]:
    """Return records as a reader sees them."""
    return [Record.lift(one) for one in made]


def tables(made: list[dict], failed: list[dict] | None = None) -> Tables:
    """Return the tables of some records."""
    return Tables(Runs("vision8_offline", "vit_small_dinov2", tuple(lift(made)), tuple(lift(failed or []))))


def write(results: Path, made: list[dict]) -> list[Path]:
    """Write records as the runner names them."""
    return [_write(results, one) for one in made]


def _write(results: Path, one: dict) -> Path:
    choices, failed = one["choices"], ".failed" if one["status"] == "failed" else ""
    folder = results / "runs" / choices["suite"] / choices["backbone"]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{choices['merge']}+{choices['byom']}--{one['signature']}{failed}.json"
    path.write_text(json.dumps(one))
    return path

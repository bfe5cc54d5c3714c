"""Records as the LoRA experiments leave them: one folder a recipe, made-up but plausible numbers, and spectra."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np

from byom.storage.record import Record
from tests.unit import synthetic_runs as runs

TASKS = runs.TASKS
RANKS = (1, 2, 4, 8, 16, 32, 64)
DENSITIES = (0.0011, 0.0022, 0.0045, 0.009, 0.018, 0.036)  # as many bytes as the first six ranks, within 2 %
SIDES, MATRICES, RANK = 768, 48, 64
FULL_RANKS = (1, 2, 4, 8, 16, 32)
FULL_DENSITIES = (0.0044, 0.0088, 0.018, 0.036, 0.072, 0.144)
WIDTHS = {"lora": {"rank": RANK, "targets": ["q", "k", "v", "out"]}, "full": {"epochs": 4}, "ia3": {"epochs": 4}}
OTHERS = {
    "rank1": ("lora", {"rank": 1, "targets": ["q", "k", "v"]}, 27_648, 0.9),
    "ia3": ("ia3", {"epochs": 4}, 27_648, 0.85),
    "bottleneck": ("bottleneck", {"width": 128}, 2_368_512, 1.02),
}


def record(
    merge: str, variant: str, seed: int = 0, finetune: str = "lora", reached: float | None = None, **settings
) -> dict:
    """Return one finished record; `settings` are the variant's hyperparameters."""
    density, rank = settings.get("density", 0.0), settings.get("rank", 0)
    one = runs.record(merge, variant if variant != "lora" else "none", seed, density, finetune=finetune)
    one["choices"]["byom"] = variant
    one["hyperparameters"] = {**one["hyperparameters"], "byom": settings}
    one["config"] = {"finetune": WIDTHS[finetune]}
    whole = finetune == "full"
    if rank:
        left = _left(rank, whole)
        gain = 0.03 * (settings["rank_allocation"] == "global") + 0.05 * (settings["reference"] == "merged")
        reached = (0.9 if whole else 1) * (1 - left**2) + gain if reached is None else reached
        size = (4 if whole else 1) * MATRICES * rank * (SIDES + 1)
        stored, taken, shared = size, 4 * size, runs.SIZE
        one["norms"] = {task: _norms(left * scale) for task, scale in zip(TASKS, _SCALES, strict=True)}
    elif variant == "single_task":
        stored, shared = (runs.SIZE, 0) if whole else (MATRICES * RANK * SIDES, runs.SIZE)
        taken = 4 * stored
        one["norms"] = {task: _norms(0.0) for task in TASKS}
    else:
        stored, shared = int(density * runs.SIZE), runs.SIZE
        taken = 6 * stored
    if reached is not None:
        scores = {t: runs._score(t, reached, seed, "test") for t in TASKS}
        one["scores"] = {"test": scores}
        one["summary"] = {"test": runs._summary(scores, one["single_task"]["test"])}
    one["storage"] |= {
        "task_parameters": dict.fromkeys(TASKS, stored),
        "task_bytes": dict.fromkeys(TASKS, taken),
        "parameters": shared + len(TASKS) * stored,
        "bytes": 4 * shared + len(TASKS) * taken,
    }
    key = json.dumps([merge, variant, finetune, seed, settings], sort_keys=True)
    one["signature"] = f"{zlib.crc32(key.encode()):08x}"
    return one


_SCALES = np.linspace(0.8, 1.2, len(TASKS))


def _left(rank: int, whole: bool) -> float:
    return 0.0 if not whole and rank >= RANK else 0.8 * rank ** (-0.25 if whole else -0.5)


def _norms(left: float) -> dict[str, float]:
    return {"to_pretrained": 3.1, "to_merged": 3.1, "kept": 3.1 * (1 - left), "dropped": 3.1 * left}


def recipe(finetune: str, seeds: tuple[int, ...] = (0,)) -> list[dict]:
    """Return the records of LoRA experts (``lora``) or of full fine-tunes (``full``)."""
    whole = finetune == "full"
    plain = {"rank_allocation": "uniform", "reference": "pretrained"}
    cells: list[tuple[str, str, dict]] = [("pretrained", "none", {}), ("pretrained", "single_task", {})]
    cells += [("pretrained", "lora", {"rank": q, **plain}) for q in (FULL_RANKS if whole else RANKS)]
    cells += [("ties", "none", {})]
    for m in FULL_DENSITIES if whole else DENSITIES:
        cells += [("ties", "fft", {"density": m}), ("pretrained", "post_pruning", {"density": m})]
    if not whole:
        cells += [("pretrained", "lora", {"rank": q, **plain, "rank_allocation": "global"}) for q in (1, 2, 4, 8)]
        cells += [("ties", "lora", {"rank": q, **plain, "reference": "merged"}) for q in (1, 4, 16)]
        cells += [("average", "none", {}), ("task_arithmetic", "none", {})]
    return [record(merge, variant, seed, finetune, **settings) for merge, variant, settings in cells for seed in seeds]


def other(name: str, seed: int = 0) -> dict:
    """Return the single-task models of a recipe of `OTHERS`."""
    finetune, config, stored, reached = OTHERS[name]
    one = record("pretrained", "single_task", seed, "lora", reached)
    one["choices"]["finetune"], one["config"] = finetune, {"finetune": config}
    one["storage"]["task_parameters"] = dict.fromkeys(TASKS, stored)
    one["signature"] = f"{name}{seed}"
    return one


def every(seeds: tuple[int, ...] = (0,)) -> dict[str, list[dict]]:
    """Return the records of every recipe by the name of its folder."""
    rest = {name: [other(name, seed) for seed in seeds] for name in OTHERS}
    return {"adapters": recipe("lora", seeds), "full": recipe("full", seeds), **rest}


def lifted(seeds: tuple[int, ...] = (0,)) -> dict[str, list[Record]]:
    """Return the records of every recipe as a reader sees them."""
    return {name: runs.lift(made) for name, made in every(seeds).items()}


def write(results: Path, made: dict[str, list[dict]]) -> None:
    """Write records where the LoRA experiments have them: ``<results>/<recipe>/runs/...``."""
    for name, records in made.items():
        runs.write(results / name, records)


def spectrum(power: bool) -> dict:
    """Return the summary of made-up spectra that follow one of the two laws exactly."""
    places = np.arange(1, RANK + 1)
    along, slope = (np.log(places), -0.8) if power else (places - 1, -0.05)
    median = np.exp(slope * along)
    fit = {"intercept": 0.0 if power else 0.05, "slope": slope, "r2": 1.0}
    fits = {"exponential": fit if not power else {"intercept": -1.6, "slope": -0.035, "r2": 0.8}}
    fits["power"] = fit if power else {"intercept": 1.0, "slope": -0.9, "r2": 0.8}
    lines = {"median": median, "low": median**1.3, "high": median**0.8}
    return {"matrices": 384, "fits": fits, **{name: line.tolist() for name, line in lines.items()}}

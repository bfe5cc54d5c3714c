"""Singular values of fine-tuning, layer by layer: python -m experiments.spectra SUITE adapters|full [OVERRIDES].

For every matrix that BYOM-LoRA cuts: the singular values of theta_t - theta_0 relative to the largest, of adapters
through the product of their thin factors. Over the matrices of one kind: the median and the 10 and 90 % quantiles of
the first 64, and how well two laws fit the logarithm of the median: ``log s_i = a + b i`` (exponential) and
``log s_i = a + b log i`` (power). Writes results/lora/spectra/SUITE--BACKBONE--RECIPE.json.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from byom.experts.finetune.targets import WORDS
from byom.functional.linalg import VANISHING, product_svd, truncated_svd
from byom.merge.base.matrices import is_matrix
from byom.weights import Weights
from byom.weights.fused import module_of
from byom.weights.lowrank import Adapted

SHOWN = 64
FEWEST = 3  # two points lie on any line
RECIPES = {"adapters": ["finetune=lora", "finetune.rank=64"], "full": ["finetune=full"]}
KINDS = {
    **{kind: rf"(^|\.)({WORDS[kind]})$" for kind in ("q", "k", "v", "out", "up", "down")},
    "qkv": r"(^|\.)(qkv|in_proj)$",
    "embeddings": r"embed",
}
Spectrum = dict[str, Any]


def kind_of(name: str, start: int, height: int, weights: Weights) -> str:
    """Say what some rows of a parameter do: a name of `KINDS`, or ``other``.

    Args:
        name: The parameter.
        start: First of the rows.
        height: Number of rows.
        weights: The model.
    """
    path = module_of(name, start, height, weights)
    if height == weights.shape(name)[0]:
        path = name.replace("in_proj_weight", "in_proj.weight").rpartition(".")[0] or name
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, path)), "other")


def values(expert: Weights, pretrained: Weights) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the kind and the largest singular values of every matrix that fine-tuning changed.

    Args:
        expert: theta_t.
        pretrained: theta_0.

    Yields:
        A kind, and up to `SHOWN` values relative to the largest, descending; those that are rounding are left out.
    """
    found = _of_products(expert) if isinstance(expert, Adapted) else _of_differences(expert, pretrained)
    for kind, singular in found:
        if len(singular) and singular[0] > 0:
            relative = (singular / singular[0]).numpy()
            yield kind, relative[relative > VANISHING][:SHOWN]


def _of_products(expert: Adapted) -> Iterator[tuple[str, torch.Tensor]]:
    for name in sorted(expert.factored):
        for piece in expert.pieces(name):
            kind = kind_of(name, piece.start, len(piece.left), expert.base)
            yield kind, product_svd(piece.left.double(), piece.right.double())[1]


def _of_differences(expert: Weights, pretrained: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    for name in pretrained.mergeable():
        delta = (expert[name].double() - pretrained[name].double()).flatten(1) if expert[name].ndim > 1 else None
        if delta is not None and is_matrix(name, delta.shape) and delta.any():
            singular = truncated_svd(delta, min(SHOWN, *delta.shape))[1]
            yield kind_of(name, 0, len(delta), pretrained), singular


def summary(spectra: Sequence[np.ndarray]) -> Spectrum:
    """Summarise the singular values of some matrices.

    Args:
        spectra: For each matrix its values relative to the largest; what a matrix has not counts as 0.

    Returns:
        ``matrices``, their number; ``median``, ``low`` and ``high`` (10 and 90 %) for i = 1, 2, ...; ``fits``.
    """
    table = np.zeros((len(spectra), max(map(len, spectra))))
    for row, spectrum in zip(table, spectra, strict=True):
        row[: len(spectrum)] = spectrum
    low, median, high = np.quantile(table, (0.1, 0.5, 0.9), axis=0)
    quantiles = {"median": median, "low": low, "high": high}
    rounded = {name: [float(f"{value:.6g}") for value in line] for name, line in quantiles.items()}
    return {"matrices": len(spectra), **rounded, "fits": fits(median)}


def fits(line: np.ndarray) -> dict[str, dict[str, float]]:
    """Fit an exponential and a power law to descending values by least squares of their logarithm.

    Args:
        line: Values for i = 1, 2, ...; those that are 0 are left out.

    Returns:
        For ``exponential`` and ``power`` the ``intercept`` and ``slope`` of the logarithm, over i and over log i, and
        ``r2``, the part of its variance that is explained; nothing for fewer than three values or equal ones.
    """
    kept = line[line > VANISHING]
    if len(kept) < FEWEST or np.ptp(np.log(kept)) < VANISHING:
        return {}
    places = np.arange(1, len(kept) + 1)
    return {"exponential": _line(places, np.log(kept)), "power": _line(np.log(places), np.log(kept))}


def _line(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    slope, intercept = np.polyfit(x, y, 1)
    r2 = 1 - np.var(y - intercept - slope * x) / np.var(y)
    return {name: float(f"{value:.6g}") for name, value in (("intercept", intercept), ("slope", slope), ("r2", r2))}


def spectra(experts: Mapping[str, Weights], pretrained: Weights) -> Spectrum:
    """Summarise the singular values of every expert.

    Args:
        experts: Task name to theta_t.
        pretrained: theta_0.

    Returns:
        ``tasks``, a summary for every task and kind; ``kinds``, one for every kind over all tasks; ``all``.
    """
    found = {task: list(values(expert, pretrained)) for task, expert in experts.items()}
    every = [pair for pairs in found.values() for pair in pairs]
    by_task = {task: _by_kind(pairs) for task, pairs in found.items()}
    return {"tasks": by_task, "kinds": _by_kind(every), "all": summary([values for _, values in every])}


def _by_kind(pairs: Sequence[tuple[str, np.ndarray]]) -> dict[str, Spectrum]:
    kinds = sorted({kind for kind, _ in pairs})
    return {kind: summary([values for each, values in pairs if each == kind]) for kind in kinds}


def run(suite: str, recipe: str, overrides: Sequence[str] = ()) -> Spectrum:
    """Measure the experts of a suite, fine-tuning those that are not cached, and write the record.

    Args:
        suite: Its name.
        recipe: Of `RECIPES`.
        overrides: Further choices, for example ``seed=1``.
    """
    from byom.cli import config
    from byom.pipeline.labs import laboratory
    from byom.pipeline.provenance import provenance, results_root
    from byom.storage.atomic import write_json
    from byom.storage.place import now

    settings = config.settings([f"suite={suite}", *RECIPES[recipe], "byom=none", *overrides])
    lab, start = laboratory(settings), time.perf_counter()
    found = spectra({task: lab.expert(task) for task in lab.tasks}, lab.pretrained)
    seconds = round(time.perf_counter() - start, 1)
    names = {"suite": suite, "backbone": settings.names["backbone"], "recipe": recipe, "overrides": list(overrides)}
    notes = {"seconds": seconds, "finished": now(), "provenance": provenance()}
    file = f"{suite}--{names['backbone']}--{recipe}.json"
    write_json(results_root(settings.results) / "lora" / "spectra" / file, names | found | notes)
    return found


def table(kinds: Mapping[str, Spectrum]) -> str:
    """Return how well the two laws fit every kind of matrix, as Markdown.

    Args:
        kinds: Kind to summary.
    """
    head = "| matrices | number | exponential R² | halves every | power R² | exponent |\n|---|--:|--:|--:|--:|--:|\n"
    return head + "".join(
        f"| {kind} | {one['matrices']} | {' | '.join(_cells(one))} |\n" for kind, one in kinds.items()
    )


def _cells(one: Spectrum) -> list[str]:
    if not one["fits"]:
        return ["—"] * 4
    exponential, power = one["fits"]["exponential"], one["fits"]["power"]
    halves = -np.log(2) / exponential["slope"]
    return [f"{exponential['r2']:.3f}", f"{halves:.1f}", f"{power['r2']:.3f}", f"{power['slope']:.2f}"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for and print the fits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", help="a suite of conf/suite, for example vision8_offline")
    parser.add_argument("recipe", choices=sorted(RECIPES))
    parser.add_argument("overrides", nargs="*", help="further choices, for example seed=1")
    given = parser.parse_args(arguments)
    found = run(given.suite, given.recipe, given.overrides)
    sys.stdout.write(table(found["kinds"] | {"all": found["all"]}))


if __name__ == "__main__":
    main()

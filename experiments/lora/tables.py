"""Tables of the LoRA experiments: rank against accuracy, sparse beside low-rank, and recipes of equal size. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from byom.report.bootstrap import gain_interval
from byom.report.comparable import check_comparable
from byom.report.frame import spread
from byom.report.rows import Row, rows, told_apart
from byom.storage.parts import Norms
from byom.storage.record import Record

FAMILIES = (
    "pretrained", "merged", "lora", "lora_global", "lora_merged", "post_pruning", "fft", "single_task",
)  # fmt: skip
SPARSE = ("post_pruning", "fft")
LOW_RANK = ("lora", "lora_global", "lora_merged")
TOLERANCE = 0.1  # of the low-rank bytes: models further apart than this are not of equal size
EQUAL = {"ia3": "rank1", "bottleneck": "adapters"}  # recipe -> the LoRA that stores as much
RECIPES = ("rank1", "ia3", "adapters", "bottleneck", "full")
NO_DIFFERENCE = {"difference": np.nan, "difference_std": np.nan, "lower": np.nan, "upper": np.nan, "pairs": 0}


def ranked(records: Iterable[Record]) -> pd.DataFrame:
    """Return every row of one recipe with what it stores and how far it is from the tasks' own models.

    Args:
        records: Finished runs of one suite, backbone and recipe.

    Returns:
        One row per setting, by family, rank and density: ``method``, ``family`` (of `FAMILIES`, others by their
        variant's name), ``rank``, ``density`` (NaN without one), ``accuracy_<task>`` and ``error_<task>``, ``mean``,
        ``normalised``, ``error``, ``task_parameters``, ``task_bytes`` (means over tasks), ``parameters``, ``seeds``.
        Accuracies and errors are fractions; ``_std`` columns are sample deviations over seeds.
    """
    return pd.DataFrame([_numbers(name, row) for name, row in named(records)])


def named(records: Iterable[Record]) -> list[tuple[str, Row]]:
    """Return the rows of `ranked` and their names, which leave rank and density to columns of their own."""
    found = rows(records)
    alike: dict[tuple, list[Row]] = {}
    for row in found:
        alike.setdefault((_rank(row), row.settings.get("byom.rank_allocation")), []).append(row)
    renamed = {
        id(row): again.label for group in alike.values() for row, again in zip(group, told_apart(group), strict=True)
    }
    pairs = [(renamed[id(row)] + ", global ranks" * _is_global(row), row) for row in found]
    places = {name: place for place, (name, _) in reversed([*enumerate(pairs)])}
    return sorted(pairs, key=lambda pair: (*_order(pair[1]), places[pair[0]], _rank(pair[1]), _density(pair[1])))


def family(row: Row) -> str:
    """Return which part of the table a row belongs to."""
    if row.kind != "lora":
        return row.kind
    if row.settings.get("byom.reference") == "merged":
        return "lora_merged"
    return "lora_global" if _is_global(row) else "lora"


def _order(row: Row) -> tuple[int, str]:
    what = family(row)
    return (FAMILIES.index(what), "") if what in FAMILIES else (len(FAMILIES), what)


def _rank(row: Row) -> int:
    return row.settings.get("byom.rank", 0) if row.variant == "lora" else 0


def _density(row: Row) -> float:
    return float(np.nan_to_num(row.density))


def _is_global(row: Row) -> bool:
    return row.variant == "lora" and row.settings.get("byom.rank_allocation") == "global"


def _numbers(name: str, row: Row) -> dict[str, Any]:
    tests = [record.test for record in row.records]
    errors = [_errors(record) for record in row.records]
    out: dict[str, Any] = {"method": name, "family": family(row), "merge": row.merge}
    out |= {"rank": _rank(row) or np.nan, "density": row.density}
    for task in tests[0]:
        out |= spread(f"accuracy_{task}", [test[task].value for test in tests])
    out |= spread("mean", [record.mean for record in row.records])
    out |= spread("normalised", [record.summary["test"].normalised for record in row.records])
    out |= {f"error_{task}": float(np.mean([error[task] for error in errors])) for task in tests[0]}
    out["error"] = float(np.mean([list(error.values()) for error in errors]))
    out["task_parameters"] = float(np.mean([list(r.storage.task_parameters.values()) for r in row.records]))
    out["task_bytes"] = _task_bytes(row)
    out["parameters"] = float(np.mean([record.storage.parameters for record in row.records]))
    return out | {"seeds": len(row.records)}


def _task_bytes(row: Row) -> float:
    return float(np.mean([list(record.storage.task_bytes.values()) for record in row.records]))


def _errors(record: Record) -> dict[str, float]:
    """Return for each task how much of its difference is lost, relative to all of it; NaN where it was not measured."""
    return {task: _error(record.norms[task]) if task in record.norms else np.nan for task in record.test}


def _error(norms: Norms) -> float:
    if not norms.dropped:
        return 0.0
    return norms.dropped / norms.to_pretrained if norms.to_pretrained else np.inf


def at_equal_bytes(records: Iterable[Record]) -> pd.DataFrame:
    """Compare every low-rank row with the sparse row of each method that is nearest in bytes.

    Args:
        records: Finished runs of one suite, backbone and recipe.

    Returns:
        One row per low-rank row and sparse method: ``method``, ``rank``, ``task_bytes``, ``mean``; ``sparse``,
        ``density``, ``sparse_bytes``, ``sparse_mean``; ``difference`` of the means with ``difference_std`` over seeds,
        and ``lower`` and ``upper``, all NaN where the sizes are more than `TOLERANCE` apart.
    """
    found, sparse = named(records), {}
    for name, row in found:
        if family(row) in SPARSE:
            sparse.setdefault(name, []).append(row)
    low = [(name, row) for name, row in found if family(row) in LOW_RANK]
    return pd.DataFrame([_beside(*one, *other) for one in low for other in sparse.items()])


def _beside(name: str, row: Row, sparse: str, others: Sequence[Row]) -> dict[str, Any]:
    size = _task_bytes(row)
    other = min(others, key=lambda each: abs(_task_bytes(each) - size))
    theirs = _task_bytes(other)
    same = abs(theirs - size) <= TOLERANCE * size
    mine = {"method": name, "rank": _rank(row), "task_bytes": size, "mean": _average(row)}
    found = {"sparse": sparse, "density": other.density, "sparse_bytes": theirs, "sparse_mean": _average(other)}
    return mine | found | (difference(row, other) if same else NO_DIFFERENCE)


def _average(row: Row) -> float:
    return float(np.mean([record.mean for record in row.records]))


def difference(row: Row, other: Row) -> dict[str, float]:
    """Compare two rows over the seeds that both have, paired over test examples.

    Args:
        row: Runs of one setting.
        other: Runs of another, on the same test examples.

    Returns:
        ``difference``, `row` less `other`, with ``difference_std`` over seeds; ``lower`` and ``upper`` of its 95 %
        interval over examples, as fractions; ``pairs``, the number of seeds. NaN without a seed in common.
    """
    theirs = {record.choices.seed: record for record in other.records}
    seeds = [(record, record.choices.seed) for record in row.records]
    pairs = [(record, theirs[seed]) for record, seed in seeds if seed in theirs]
    if not pairs:
        return NO_DIFFERENCE
    lower, upper = gain_interval([(one.test, two.test) for one, two in pairs])
    apart = spread("difference", [one.mean - two.mean for one, two in pairs])
    return apart | {"lower": lower, "upper": upper, "pairs": len(pairs)}


def recipes(records: Mapping[str, Sequence[Record]]) -> pd.DataFrame:
    """Return the single-task models of every recipe, LoRA beside what stores as many values.

    Args:
        records: Recipe, of `RECIPES`, to its finished runs; all of one suite and backbone.

    Returns:
        One row per recipe: ``recipe``, ``method``, ``accuracy_<task>``, ``mean``, ``task_parameters``, and
        ``difference``, ``lower``, ``upper`` of the LoRA of equal size less this recipe (NaN without one);
        empty without single-task models.

    Raises:
        ByomError: If tasks or test data differ.
    """
    single = {recipe: _single(records[recipe]) for recipe in RECIPES if recipe in records}
    found = {recipe: row for recipe, row in single.items() if row}
    if not found:
        return pd.DataFrame()
    check_comparable([_any_recipe(record) for row in found.values() for record in row.records])
    return pd.DataFrame([_recipe(recipe, row, found.get(EQUAL.get(recipe, ""))) for recipe, row in found.items()])


def _single(records: Sequence[Record]) -> Row | None:
    return next((row for row in rows(records) if row.variant == "single_task"), None)


def _any_recipe(record: Record) -> Record:
    """Leave out how a model was fine-tuned: that is what the table compares."""
    return replace(record, config={}, choices=replace(record.choices, finetune=None))


def _recipe(recipe: str, row: Row, lora: Row | None) -> dict[str, Any]:
    apart = difference(lora, row) if lora else NO_DIFFERENCE
    numbers = _numbers(name_recipe(row.records[0]), row)
    kept = {name: value for name, value in numbers.items() if name not in ("family", "merge", "rank", "density")}
    return {"recipe": recipe} | kept | apart


def name_recipe(record: Record) -> str:
    """Return how tables write a recipe of fine-tuning: its name and its size."""
    recipe = record.config["finetune"]
    kind = record.choices.finetune
    if kind == "lora":
        return f"LoRA, rank {recipe['rank']} ({', '.join(recipe['targets'])})"
    if kind == "bottleneck":
        return f"Bottleneck, width {recipe['width']}"
    return {"full": "Full fine-tuning", "ia3": "IA3"}.get(str(kind)) or str(kind)

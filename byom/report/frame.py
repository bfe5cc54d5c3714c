"""Rows to numbers: runs of several seeds become a mean and a spread, and the best of each kind is marked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from byom.errors import ByomError
from byom.report.bootstrap import mean_interval
from byom.report.rows import KILOBYTES, Row, flatten, full, told_apart
from byom.report.stored import stored_of

HEADS = {
    "mean": "Mean", "normalised": "Normalised mean", "parameters": "Parameters (M)", "bytes": "Bytes (MB)",
    "chosen": "λ / searched", "seeds": "Seeds",
}  # fmt: skip
DRAWN = ("kind", "base", "one_model", "given", "models", "curve", "along", "task_bytes", "test_lower", "test_upper")
"""Columns for figures alone, which no file holds."""
BY_BYTES = ("task_bytes", "test_lower", "test_upper")
MISSING = "—"


def numbers(rows: Iterable[Row]) -> pd.DataFrame:
    """Return every row at full precision: fractions, counts and sample standard deviations over seeds.

    Args:
        rows: Rows of one suite and backbone.

    Returns:
        One row per method and density. Task columns are ``accuracy_<task>`` and ``accuracy_<task>_std``, whatever
        the task's metric; the columns of `DRAWN` are for figures alone. ``models`` is the size in models' worth of
        parameters, and ``curve`` the name that rows share which differ in nothing but the setting ``along``, a size.
        Where that is a number of kilobytes, ``task_bytes`` is what a task takes beside one model, and ``test_lower``
        and ``test_upper`` are the interval over test examples of rows of one seed; otherwise they are NaN.
    """
    every = list(rows)
    sized = [row for row in every if row.along]
    alike = zip(sized, told_apart([row.sizeless for row in sized]), strict=True)
    curves = {id(row): {"curve": one.label, "base": one.base, "along": row.along} for row, one in alike}
    by_bytes = any(row.along == KILOBYTES for row in every)
    stored = [_by_bytes(row, every) if by_bytes else dict.fromkeys(BY_BYTES, np.nan) for row in every]
    made = [_numbers(row) | curves.get(id(row), {"curve": "", "along": ""}) for row in every]
    return pd.DataFrame([one | two for one, two in zip(made, stored, strict=True)])


def _by_bytes(row: Row, rows: Sequence[Row]) -> dict[str, float]:
    """Return bytes and intervals, which take a while, for the figure against bytes alone."""
    try:
        beside = stored_of(row, rows).beside(len(row.records[0].test))
    except ByomError:  # one of the oldest records, which do not say it: such a figure leaves it out
        beside = np.nan
    test = row.records[0].test
    known = len(row.records) == 1 and all(one.hits or one.points or one.predictions for one in test.values())
    ends = mean_interval([test]) if known else (np.nan, np.nan)
    return dict(zip(BY_BYTES, (beside, *ends), strict=True))


def _numbers(row: Row) -> dict[str, Any]:
    records = row.records
    out: dict[str, Any] = {"method": row.label, "merge": row.merge, "variant": row.variant, "density": row.density}
    for task in records[0].test:
        out |= spread(f"accuracy_{task}", [record.test[task].value for record in records])
    out |= spread("mean", [record.mean for record in records])
    out |= spread("normalised", [record.summary["test"].normalised for record in records])
    validated = all("validation" in record.summary for record in records)
    chosen = [record.summary["validation"].absolute for record in records] if validated else [np.nan]
    out["validation"] = float(np.mean(chosen))
    out["parameters"] = float(np.mean([record.storage.parameters for record in records]))
    out["bytes"] = float(np.mean([record.storage.bytes for record in records]))
    stored = [record.storage for record in records]
    out["models"] = float(np.mean([one.parameters / (one.model_parameters or np.nan) for one in stored]))
    out |= {"chosen": _chosen(row), "searched": max(record.tuning.searched for record in records)}
    return out | {"seeds": len(records), "kind": row.kind, "base": row.base, "one_model": row.one_model}


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Return the mean of some values and their sample standard deviation, NaN where there are too few."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else np.nan
    return {name: float(np.mean(values)) if len(values) else np.nan, f"{name}_std": std}


def csv(frame: pd.DataFrame) -> str:
    """Return a frame of this package as CSV at full precision, without the columns of `DRAWN`."""
    return frame.drop(columns=[name for name in DRAWN if name in frame]).to_csv(index=False, lineterminator="\n")


def _chosen(row: Row) -> str:
    """Write what validation data chose, one entry for each different outcome over the seeds."""
    written = [chosen_text(record.tuning.chosen) for record in row.records if record.tuning.chosen]
    if not written and row.settings.get("merge.scale") is not None and row.merge != "pretrained":
        return f"{row.settings['merge.scale']:g} fixed"
    return ", ".join(dict.fromkeys(sorted(written)))


def chosen_text(chosen: Mapping[str, Any]) -> str:
    """Return chosen hyperparameters as tables write them, a scale alone as its number."""
    pick = dict(flatten(chosen))
    if {full(name) for name in pick} == {"merge.scale"}:
        return f"{next(iter(pick.values())):g}"
    return " ".join(f"{name}={value}" for name, value in sorted(pick.items()))


def task_names(frame: pd.DataFrame) -> list[str]:
    """Return the tasks of a frame made by `numbers`, in its order."""
    stems = [c.removeprefix("accuracy_") for c in frame.columns if c.startswith("accuracy_")]
    return [s for s in stems if f"accuracy_{s}_std" in frame.columns]


def display(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the printed form of a frame made by `numbers`."""
    out = pd.DataFrame({"Method": frame["method"], "m %": [percent(m) for m in frame["density"]]})
    for task in task_names(frame):
        out[task] = _cells(frame, f"accuracy_{task}")
    for name in ("mean", "normalised"):
        out[HEADS[name]] = _cells(frame, name)
    for name in ("parameters", "bytes"):
        out[HEADS[name]] = [f"{value / 1e6:.1f}" for value in frame[name]]
    searches = zip(frame["chosen"], frame["searched"], strict=True)
    out[HEADS["chosen"]] = [_search_text(*pair) for pair in searches]
    out[HEADS["seeds"]] = frame["seeds"].astype(str)
    return out


def percent(value: float) -> str:
    """Return a fraction as a percentage without needless digits."""
    return MISSING if np.isnan(value) else f"{100 * value:.6g}"


def _cells(frame: pd.DataFrame, name: str) -> list[str]:
    pairs = zip(frame[name], frame[f"{name}_std"], strict=True)
    return [f"{100 * mean:.1f}" + ("" if np.isnan(std) else f" ± {100 * std:.1f}") for mean, std in pairs]


def _search_text(chosen: str, searched: int) -> str:
    if not chosen:
        return MISSING
    return f"{chosen} / {searched}" if searched else chosen


def best(frame: pd.DataFrame) -> pd.DataFrame:
    """Mark the best accuracies among merged models, and among the rows of each density.

    Values that print the same are marked together; a class of one row has no winner.

    Args:
        frame: A frame made by `numbers`.

    Returns:
        True at the winning cells, under the columns and index of `display(frame)`.
    """
    shown = display(frame)
    marks = pd.DataFrame(data=False, index=shown.index, columns=shown.columns)
    for _, group in frame.groupby(_storage_class(frame)):
        for head, name in _accuracies(frame) if len(group) > 1 else ():
            rounded = (100 * group[name]).round(1)
            marks.loc[group.index, head] = rounded == rounded.max()
    return marks


def _accuracies(frame: pd.DataFrame) -> list[tuple[str, str]]:
    tasks = [(task, f"accuracy_{task}") for task in task_names(frame)]
    return [*tasks, *((HEADS[name], name) for name in ("mean", "normalised"))]


def _storage_class(frame: pd.DataFrame) -> pd.Series:
    """Return which rows compete: merged models, and whatever puts back the same density; others are None."""
    classes = [f"density {m!r}" for m in frame["density"]]
    merged = frame["kind"].eq("merged")
    return pd.Series(classes, index=frame.index).where(frame["density"].notna()).mask(merged, "merged")

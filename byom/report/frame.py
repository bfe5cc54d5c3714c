"""Records to rows: repeated runs become a mean and a spread, and the best of each kind is marked."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from byom.errors import ByomError
from byom.functional.metrics import value_of
from byom.report.rows import labels

Record = Mapping[str, Any]

MERGES = {
    "pretrained": "Pre-trained", "average": "Averaging", "task_arithmetic": "Task Arithmetic", "ties": "TIES",
}  # fmt: skip
VARIANTS = {
    "single_task": "Single-task", "post_pruning": "Post-Pruning", "fft": "BYOM-FFT", "lora": "BYOM-LoRA",
}  # fmt: skip
KINDS = ("pretrained", "single_task", "merged", "post_pruning", "fft")
HEADS = {
    "mean": "Mean", "normalised": "Normalised mean", "parameters": "Parameters (M)", "bytes": "Bytes (MB)",
    "chosen": "λ / searched", "seeds": "Seeds",
}  # fmt: skip
MISSING = "—"


def title(name: str, known: Mapping[str, str]) -> str:
    """Return how a table writes an option's name, title-casing the ones `known` does not list."""
    return known.get(name, name.replace("_", " ").title())


def kind(merge: str, variant: str) -> str:
    """Return what a row is: ``pretrained``, ``single_task``, ``merged``, or the variant's own name."""
    if variant != "none":
        return variant
    return "pretrained" if merge == "pretrained" else "merged"


def name_method(merge: str, variant: str, base: str | None = None, put_back: str | None = None) -> str:
    """Return a row's name, such as ``BYOM-FFT on TIES``; how its two parts are written is looked up if not given."""
    base = base or title(merge, MERGES)
    if variant == "none":
        return base
    return (put_back or title(variant, VARIANTS)) + ("" if merge == "pretrained" else f" on {base}")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested mappings under dotted names."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


@dataclass(frozen=True)
class Row:
    """The runs that differ in nothing but their seed."""

    settings: Mapping[str, Any]
    records: tuple[Record, ...]

    @property
    def merge(self) -> str:
        """The merge method's name."""
        return self.records[0]["choices"]["merge"]

    @property
    def variant(self) -> str:
        """The BYOM variant's name."""
        return self.records[0]["choices"]["byom"]

    @property
    def name(self) -> str:
        """How tables write the row, before the settings that tell it from others are added."""
        titles = self.records[0].get("titles") or {}
        base = titles.get("merge", title(self.merge, MERGES))
        name = name_method(self.merge, self.variant, base, titles.get("byom"))
        return f"{name}, {titles['router']}" if titles.get("router") else name

    @property
    def density(self) -> float:
        """The fraction put back for each task, or NaN where nothing is chosen by a fraction."""
        return float(self.settings.get("byom.density", np.nan)) if self.variant != "none" else np.nan

    @property
    def order(self) -> tuple[int, int, str, str, float]:
        """Where the row stands in the table."""
        known, what = [*MERGES], kind(self.merge, self.variant)
        place = known.index(self.merge) if self.merge in known else len(known)
        rank = KINDS.index(what) if what in KINDS else len(KINDS)
        rest = {name: _sortable(value) for name, value in self.settings.items() if name != "byom.density"}
        name = f"{self.variant} {self.merge}"
        return rank, place, name, json.dumps(rest, sort_keys=True), float(np.nan_to_num(self.density))


def _sortable(value: Any) -> Any:
    """Return a value whose text sorts as its number does: rank 2 before rank 16."""
    return f"{value:020.9f}" if isinstance(value, int | float) and not isinstance(value, bool) else value


def settings(record: Record) -> dict[str, Any]:
    """Return what identifies a row: choices and hyperparameters, less seeds and tuned values."""
    tuned = {_full(name) for name, _ in flatten((record.get("tuning") or {}).get("chosen") or {})}
    every = {**record["choices"], **dict(flatten(record["hyperparameters"]))}
    return {k: v for k, v in every.items() if k not in tuned and k.rpartition(".")[2] != "seed"}


def _full(name: str) -> str:
    return name if name.startswith(("merge.", "byom.")) else f"merge.{name}"


def rows(records: Iterable[Record]) -> list[Row]:
    """Group runs that differ only in their seed, in table order.

    Args:
        records: Finished runs of one suite and backbone.

    Returns:
        Pre-trained, single-task, merges alone, post-pruning by density, then BYOM on each merge by density.

    Raises:
        ByomError: If two records have the same settings and the same seed.
    """
    found: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda r: (r["choices"]["seed"], r["signature"])):
        found.setdefault(json.dumps(settings(record), sort_keys=True), []).append(record)
    for group in found.values():
        _refuse_twins(group)
    made = [Row(settings(group[0]), tuple(group)) for group in found.values()]
    return sorted(made, key=lambda row: row.order)


def _refuse_twins(group: Sequence[Record]) -> None:
    for one, two in pairwise(group):
        if one["choices"]["seed"] == two["choices"]["seed"]:
            raise ByomError(
                f"records {one['signature']} and {two['signature']} hold the same settings and the same seed "
                f"({one['choices']['seed']}); move the one that is not meant out of results/runs"
            )


def numbers(records: Iterable[Record]) -> pd.DataFrame:
    """Return every row at full precision: fractions, counts and sample standard deviations over seeds.

    Args:
        records: Finished runs of one suite and backbone.

    Returns:
        One row a method and density. Task columns are ``accuracy_<task>`` and ``accuracy_<task>_std``.
    """
    found = rows(records)
    return pd.DataFrame([_numbers(row, label) for row, label in zip(found, labels(found), strict=True)])


def _numbers(row: Row, label: str) -> dict[str, Any]:
    test = [record["scores"]["test"] for record in row.records]
    out: dict[str, Any] = {"method": label, "merge": row.merge, "variant": row.variant}
    out["density"] = row.density
    for task in test[0]:
        out |= _spread(f"accuracy_{task}", [value_of(scores[task]) for scores in test])
    out |= _spread("mean", _summary(row, "test", "absolute"))
    out |= _spread("normalised", _summary(row, "test", "normalised"))
    out["validation"] = _validation(row)
    for name in ("parameters", "bytes"):
        out[name] = float(np.mean([record["storage"][name] for record in row.records]))
    return out | {"chosen": _chosen(row), "searched": _searched(row), "seeds": len(row.records)}


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    std = float(np.std(values, ddof=1)) if len(values) > 1 else np.nan
    return {name: float(np.mean(values)), f"{name}_std": std}


def _summary(row: Row, split: str, what: str) -> list[float]:
    return [record["summary"][split][what] for record in row.records]


def _validation(row: Row) -> float:
    measured = all("validation" in record["summary"] for record in row.records)
    return float(np.mean(_summary(row, "validation", "absolute"))) if measured else np.nan


def _searched(row: Row) -> int:
    return max(int((record.get("tuning") or {}).get("searched") or 0) for record in row.records)


def _chosen(row: Row) -> str:
    """Write what validation data chose, one entry for each different outcome over the seeds."""
    picks = [dict(flatten((record.get("tuning") or {}).get("chosen") or {})) for record in row.records]
    written = [_settings_text(pick) for pick in picks if pick]
    if not written and "merge.scale" in row.settings and row.merge != "pretrained":
        return f"{row.settings['merge.scale']:g} fixed"
    return ", ".join(dict.fromkeys(sorted(written)))


def _settings_text(pick: Mapping[str, Any]) -> str:
    if {_full(name) for name in pick} == {"merge.scale"}:
        return f"{next(iter(pick.values())):g}"
    return " ".join(f"{name}={value}" for name, value in sorted(pick.items()))


def task_names(frame: pd.DataFrame) -> list[str]:
    """Return the tasks of a frame made by `numbers`, in its order."""
    stems = [c.removeprefix("accuracy_") for c in frame.columns if c.startswith("accuracy_")]
    return [s for s in stems if f"accuracy_{s}_std" in frame.columns]


def table(records: Iterable[Record]) -> pd.DataFrame:
    """Return the table as it is printed: accuracies in per cent, one decimal, with the spread over seeds.

    Args:
        records: Finished runs of one suite and backbone.

    Returns:
        Text cells under the columns Method, m %, one a task, Mean, Normalised mean, Parameters (M),
        Bytes (MB), λ / searched and Seeds.
    """
    return display(numbers(records))


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
    kinds = [kind(*pair) for pair in zip(frame["merge"], frame["variant"], strict=True)]
    classes = [f"density {m!r}" for m in frame["density"]]
    merged = pd.Series(kinds, index=frame.index).eq("merged")
    return pd.Series(classes, index=frame.index).where(frame["density"].notna()).mask(merged, "merged")

"""The needs, storage and cost of every method alongside what it reaches: one row per method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from byom.errors import ByomError
from byom.report.frame import MISSING, percent, spread
from byom.report.rows import Row
from byom.storage.parts import Cost
from byom.storage.record import Record

NOTES = (
    "Needs: what a method is given besides theta_0. Test inputs are looked at without their labels, which is "
    "transductive: such a row is not comparable with one that sees weights alone.",
    "Stored per task: floating-point values kept for each task, in millions. MB: everything that serves all tasks, "
    "shared models, values, positions, masks and router.",
    "Seconds: statistics of all tasks; merging, which includes adaptation and training; what the variant adds. "
    "Memory: peak resident memory of merging and packing above what the process held before, in MiB. Measured when "
    "a result was first made, on the machine that its record names.",
    "Price: points of mean accuracy lost against the same row with the task known. Right: examples that were sent "
    "to their own task's model.",
)


def methods(rows: Iterable[Row]) -> pd.DataFrame:
    """Return one row per method: needs, accuracy, storage, cost.

    Args:
        rows: Rows of one suite and backbone, of records that say what a method cost.

    Returns:
        Columns ``method``, ``needs``, ``sees_test``, ``by_batch``, ``mean``, ``mean_std``, ``normalised``,
        ``task_parameters``, ``bytes``, ``statistics_seconds``, ``merge_seconds``, ``variant_seconds``,
        ``extra_mib``, ``right`` and ``price`` (NaN where the task is known), ``seeds``; accuracies are fractions. The
        columns of `byom.report.frame.DRAWN` are for figures alone.
    """
    every = list(rows)
    frame = pd.DataFrame([_numbers(row) for row in every])
    return frame.assign(price=[_price(row, every) for row in every]) if len(frame) else frame


def _numbers(row: Row) -> dict[str, Any]:
    return {
        "method": row.label,
        "merge": row.merge,
        "variant": row.variant,
        "density": row.density,
        "needs": row.needs.words,
        "sees_test": any(record.needs.sees_test for record in row.records),
        "by_batch": any(record.routed is not None and record.routed.mix == "batch" for record in row.records),
        **spread("mean", [record.mean for record in row.records]),
        "normalised": _mean(row, lambda r: r.summary["test"].normalised),
        "task_parameters": _mean(row, lambda r: np.mean(list(r.storage.task_parameters.values()))),
        "bytes": _mean(row, lambda r: r.storage.bytes + r.storage.router_bytes),
        "statistics_seconds": _mean(row, lambda r: _cost(r).statistics.seconds),
        "merge_seconds": _mean(row, lambda r: _cost(r).merge.seconds),
        "variant_seconds": _mean(row, lambda r: _cost(r).variant.seconds),
        "extra_mib": _mean(row, lambda r: max(stage.extra_mib for stage in (_cost(r).merge, _cost(r).variant))),
        "right": _mean(row, _right),
        "seeds": len(row.records),
        "kind": row.kind,
        "given": row.given,
        "one_model": row.one_model,
    }


def _mean(row: Row, read: Callable[[Record], Any]) -> float:
    return float(np.mean([float(read(record)) for record in row.records]))


def _cost(record: Record) -> Cost:
    if record.cost is None:
        raise ByomError(f"record {record.signature} does not say what its method cost; leave it out")
    return record.cost


def _right(record: Record) -> float:
    routed = record.routed.accuracy.get("test") if record.routed else None
    return float(np.mean(list(routed.values()))) if routed else np.nan


def _price(row: Row, rows: Sequence[Row]) -> float:
    """Return what not knowing the task costs, over the seeds that both rows have."""
    known = with_known_task(row, rows)
    means = {record.choices.seed: record.mean for record in known.records} if known else {}
    pairs = [(means[record.choices.seed], record.mean) for record in row.records if record.choices.seed in means]
    return float(np.mean([a - b for a, b in pairs])) if pairs else np.nan


def with_known_task(row: Row, rows: Iterable[Row]) -> Row | None:
    """Return the row that differs from a routed one in nothing but that the task is known; None if it is not routed."""
    if "router" not in row.settings:
        return None
    own = {k: v for k, v in row.settings.items() if not k.startswith("router")}
    return next((other for other in rows if dict(other.settings) == own), None)


def display_methods(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the printed form of `methods`."""
    flags = zip(frame["needs"], frame["sees_test"], frame["by_batch"], strict=True)
    marked = [need + " †" * bool(sees) + " ‡" * bool(batch) for need, sees, batch in flags]
    out = pd.DataFrame({"Method": frame["method"], "m %": [percent(m) for m in frame["density"]], "Needs": marked})
    out["Mean"] = [_accuracy(*pair) for pair in zip(frame["mean"], frame["mean_std"], strict=True)]
    out["Normalised"] = [f"{100 * value:.1f}" for value in frame["normalised"]]
    out["Stored per task (M)"] = [f"{value / 1e6:.2f}" for value in frame["task_parameters"]]
    out["MB"] = [f"{value / 1e6:.0f}" for value in frame["bytes"]]
    for head, name in (("Statistics s", "statistics"), ("Merge s", "merge"), ("Variant s", "variant")):
        out[head] = [f"{value:.1f}" if value else MISSING for value in frame[f"{name}_seconds"]]
    out["Memory MiB"] = [f"{value:.0f}" for value in frame["extra_mib"]]
    if bool(frame["right"].notna().any()):
        out["Right %"] = [MISSING if np.isnan(value) else f"{100 * value:.1f}" for value in frame["right"]]
        out["Price"] = [MISSING if np.isnan(value) else f"{100 * value:.1f}" for value in frame["price"]]
    out["Seeds"] = frame["seeds"].astype(str)
    return out


def _accuracy(mean: float, std: float) -> str:
    return f"{100 * mean:.1f}" + ("" if np.isnan(std) else f" ± {100 * std:.1f}")

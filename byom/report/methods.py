"""What every method needs, stores and costs beside what it reaches: one row a method."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from byom.report.frame import MISSING, Record, Row, percent, rows
from byom.report.rows import labels

NOTES = (
    "Needs: what a method is given besides theta_0. Test inputs are looked at without their labels, which is "
    "transductive: such a row is not comparable with one that sees weights alone.",
    "Stored a task: floating-point values kept for each task, in millions. MB: everything that serves all tasks, "
    "shared models, values, positions, masks and router.",
    "Seconds: statistics of all tasks; merging, which includes adaptation and training; what the variant adds. "
    "Memory: peak resident memory of merging and packing above what the process held before, in MiB. Measured when "
    "a result was first made, on the machine that its record names.",
    "Price: points of mean accuracy lost against the same row with the task known. Right: examples that were sent "
    "to their own task's model.",
)


def costed(records: Iterable[Record]) -> list[Record]:
    """Return the records that say what a method cost."""
    return [record for record in records if record.get("cost")]


def methods(records: Iterable[Record]) -> pd.DataFrame:
    """Return one row a method: needs, accuracy, storage, cost.

    Args:
        records: Finished runs of one suite and backbone.

    Returns:
        Columns ``method``, ``needs``, ``sees_test``, ``by_batch``, ``mean``, ``mean_std``, ``normalised``,
        ``task_parameters``, ``bytes``, ``statistics_seconds``, ``merge_seconds``, ``variant_seconds``,
        ``extra_mib``, ``right`` and ``price`` (NaN where the task is known), ``seeds``. Accuracies are fractions.
    """
    found = rows(costed(records))
    frame = pd.DataFrame([_numbers(row, label) for row, label in zip(found, labels(found), strict=True)])
    return frame.assign(price=[_price(row, found) for row in found]) if len(frame) else frame


def _numbers(row: Row, label: str) -> dict[str, Any]:
    means = _each(row, lambda r: r["summary"]["test"]["absolute"])
    needs = [record["needs"] for record in row.records]
    return {
        "method": label,
        "merge": row.merge,
        "variant": row.variant,
        "density": row.density,
        "needs": needs[0]["words"],
        "sees_test": any(need["sees_test"] for need in needs),
        "by_batch": any((record.get("routed") or {}).get("mix") == "batch" for record in row.records),
        "mean": np.mean(means),
        "mean_std": np.std(means, ddof=1) if len(means) > 1 else np.nan,
        "normalised": np.mean(_each(row, lambda r: r["summary"]["test"]["normalised"])),
        "task_parameters": np.mean(_each(row, _per_task)),
        "bytes": np.mean(_each(row, lambda r: r["storage"]["bytes"] + r["storage"].get("router_bytes", 0))),
        "statistics_seconds": np.mean(_each(row, lambda r: r["cost"].get("statistics", {}).get("seconds", 0.0))),
        "merge_seconds": np.mean(_each(row, lambda r: r["cost"]["merge"]["seconds"])),
        "variant_seconds": np.mean(_each(row, lambda r: r["cost"]["variant"]["seconds"])),
        "extra_mib": np.mean(_each(row, lambda r: max(r["cost"][s]["extra_mib"] for s in ("merge", "variant")))),
        "right": np.mean(_each(row, _right)),
        "seeds": len(row.records),
    }


def _each(row: Row, read: Any) -> list[float]:
    return [float(read(record)) for record in row.records]


def _per_task(record: Record) -> float:
    return float(np.mean(list(record["storage"]["task_parameters"].values())))


def _right(record: Record) -> float:
    routed = (record.get("routed") or {}).get("accuracy", {}).get("test", {})
    return float(np.mean(list(routed.values()))) if routed else np.nan


def _price(row: Row, found: Sequence[Row]) -> float:
    """Return what not knowing the task costs, over the seeds that both rows have."""
    if "router" not in row.settings:
        return np.nan
    own = {k: v for k, v in row.settings.items() if not k.startswith("router")}
    known = next((other for other in found if dict(other.settings) == own), None)
    told = {r["choices"]["seed"]: r["summary"]["test"]["absolute"] for r in known.records} if known else {}
    pairs = [(told[s], r["summary"]["test"]["absolute"]) for r in row.records if (s := r["choices"]["seed"]) in told]
    return float(np.mean([a - b for a, b in pairs])) if pairs else np.nan


def display_methods(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the printed form of `methods`."""
    flags = zip(frame["needs"], frame["sees_test"], frame["by_batch"], strict=True)
    marked = [need + " †" * bool(sees) + " ‡" * bool(batch) for need, sees, batch in flags]
    out = pd.DataFrame({"Method": frame["method"], "m %": [percent(m) for m in frame["density"]], "Needs": marked})
    out["Mean"] = [_accuracy(*pair) for pair in zip(frame["mean"], frame["mean_std"], strict=True)]
    out["Normalised"] = [f"{100 * value:.1f}" for value in frame["normalised"]]
    out["Stored a task (M)"] = [f"{value / 1e6:.2f}" for value in frame["task_parameters"]]
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

"""Merge-then-prune against pruning alone: distances, what is dropped, and who wins by how much."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd

from byom.report.bootstrap import gain_interval
from byom.report.frame import MISSING, percent, spread
from byom.report.rows import Row
from byom.storage.record import Record

COLUMNS = (
    "method", "density", "distance", "distance_std", "residual", "residual_std",
    "difference", "difference_std", "lower", "upper", "seeds",
)  # fmt: skip


def against_post_pruning(rows: Iterable[Row]) -> pd.DataFrame:
    """Compare BYOM-FFT with post-pruning at each density, paired over seeds and test examples.

    Args:
        rows: Rows of one suite and backbone.

    Returns:
        One row per BYOM-FFT row of the main table, as fractions. ``distance`` is the mean over tasks of
        ‖θₜ − θ*‖ / ‖θₜ − θ₀‖; ``residual`` the same ratio of what is left out after putting back;
        ``difference`` BYOM-FFT less post-pruning; ``lower`` and ``upper`` its interval over examples. A
        quantity without its partner is NaN.
    """
    every = list(rows)
    compared = [
        {"method": row.label, "density": row.density, **_compare(row, partner(row, every))}
        for row in every
        if row.variant == "fft"
    ]
    return pd.DataFrame(compared, columns=list(COLUMNS))


def partner(row: Row, rows: Iterable[Row]) -> Row | None:
    """Return the post-pruning row chosen in the same way: every BYOM setting the two share is equal."""
    pruned = (other for other in rows if other.variant == "post_pruning")
    return next((other for other in pruned if _same_choice(row.settings, other.settings)), None)


def _same_choice(one: Mapping, two: Mapping) -> bool:
    shared = [name for name in one.keys() & two.keys() if name.startswith("byom.")]
    return "byom.density" in shared and all(one[name] == two[name] for name in shared)


def _compare(row: Row, other: Row | None) -> dict[str, float]:
    distance = [float(np.mean(_distances(record))) for record in row.records if record.norms]
    pairs = _paired(row, other)
    measured = [pair for pair in pairs if all(record.norms for record in pair)]
    residual = [float(np.mean(_residuals(*pair))) for pair in measured]
    difference = [one.mean - two.mean for one, two in pairs]
    out = spread("distance", distance) | spread("residual", residual) | spread("difference", difference)
    lower, upper = gain_interval([(one.test, two.test) for one, two in pairs]) if pairs else (np.nan, np.nan)
    return out | {"lower": lower, "upper": upper, "seeds": len(pairs)}


def _paired(row: Row, pruned: Row | None) -> list[tuple[Record, Record]]:
    other = {record.choices.seed: record for record in pruned.records} if pruned else {}
    seeds = [(record, record.choices.seed) for record in row.records]
    return [(record, other[seed]) for record, seed in seeds if seed in other]


def _distances(record: Record) -> list[float]:
    return [_ratio(norms.to_merged, norms.to_pretrained) for norms in record.norms.values()]


def _residuals(one: Record, two: Record) -> list[float]:
    return [_ratio(norms.dropped, two.norms[task].dropped) for task, norms in one.norms.items()]


def _ratio(one: float, two: float) -> float:
    """Return the ratio of two norms; 1 where both are 0, as at density 1 where nothing is dropped."""
    if one == two:
        return 1.0
    return one / two if two else np.inf


def display_comparison(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the printed form of `against_post_pruning`: ratios, and differences in points."""
    out = pd.DataFrame({"Method": frame["method"], "m %": [percent(m) for m in frame["density"]]})
    out["Distance ratio"] = _ratios(frame, "distance")
    out["Dropped ratio"] = _ratios(frame, "residual")
    pairs = zip(frame["difference"], frame["difference_std"], strict=True)
    out["Difference (points)"] = [_plus_minus(100 * a, 100 * s, "+.1f", ".1f") for a, s in pairs]
    ends = zip(frame["lower"], frame["upper"], strict=True)
    out["95 % interval"] = [MISSING if np.isnan(a) else f"[{100 * a:+.1f}, {100 * b:+.1f}]" for a, b in ends]
    out["Seeds"] = frame["seeds"].astype(str)
    return out


def _ratios(frame: pd.DataFrame, name: str) -> list[str]:
    pairs = zip(frame[name], frame[f"{name}_std"], strict=True)
    return [_plus_minus(value, std, ".3f", ".3f") for value, std in pairs]


def _plus_minus(value: float, std: float, form: str, spread: str) -> str:
    if np.isnan(value):
        return MISSING
    return f"{value:{form}}" + ("" if np.isnan(std) else f" ± {std:{spread}}")

"""Parts of a report's numbers that figures draw: curves, merged models alone and the Pareto front."""

from __future__ import annotations

from typing import Any

import pandas as pd

SAME_SIZE = 0.02
FEWEST = 3  # sizes of a curve


def where(frame: pd.DataFrame, mask: Any) -> pd.DataFrame:
    """Return the rows of a frame at which a mask is true."""
    return pd.DataFrame(frame.loc[mask])


def curves_along(frame: pd.DataFrame, setting: str, size: str) -> dict[str, pd.DataFrame]:
    """Return the rows that differ in one setting alone, by name.

    Args:
        frame: A frame made by `byom.report.frame.numbers`.
        setting: The setting, as the column ``along`` has it.
        size: The column that each curve is sorted by; one of fewer than `FEWEST` sizes is left out.
    """
    sized = where(frame, frame["along"].eq(setting) & frame[size].notna())
    parts = {str(name): part.sort_values(by=size) for name, part in sized.groupby("curve", sort=False)}
    return {name: part for name, part in parts.items() if len(set(part[size])) >= FEWEST}


def alone(frame: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Return the row of the model that a curve starts from: the merged one, or the pre-trained one.

    Args:
        frame: A frame made by `byom.report.frame.numbers`.
        rows: The rows of the curve.
    """
    merged = where(frame, (frame["variant"] == "none") & (frame["merge"] == rows["merge"].iloc[0]))
    named = where(merged, merged["method"] == rows["base"].iloc[0])
    return named if len(named) else merged.head(1)


def pareto_front(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that no other row beats in mean accuracy at the same or a smaller size, smallest first.

    Sizes within 2 % count as the same: encoded positions differ a little in length.
    """
    sizes, means = frame["bytes"].to_numpy(float), frame["mean"].to_numpy(float)
    margin = (1 + SAME_SIZE) * sizes[:, None]
    better = (sizes[None, :] <= margin) & (means[None, :] > means[:, None])
    cheaper = (sizes[None, :] * (1 + SAME_SIZE) < sizes[:, None]) & (means[None, :] >= means[:, None])
    beaten = (better | cheaper).any(axis=1)
    return where(frame, pd.Series(~beaten, index=frame.index)).sort_values(by="bytes")

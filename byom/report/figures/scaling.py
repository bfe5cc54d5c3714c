"""Accuracy against the number of tasks."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from byom.report.figures.style import blank, legend, looks, styled
from byom.report.frame import percent


@styled
def accuracy_by_tasks(frame: pd.DataFrame) -> Figure:
    """Draw normalised accuracy against the number of tasks, one line per method; bars are one deviation over subsets.

    Args:
        frame: What `byom.report.scaling.summarised` returned.
    """
    parts = [part for _, part in frame.groupby(["method", "density"], sort=False, dropna=False)]
    groups = {_name(part.iloc[0]): part for part in parts}
    families = {name: _family(part.iloc[0]) for name, part in groups.items()}
    figure, axes = blank(2.3, groups)
    chosen = looks(families)
    for place, (name, part) in enumerate(groups.items()):
        look = chosen[name] if part.iloc[0]["variant"] != "none" else chosen[name].hollow
        shift = 0.06 * (place - (len(groups) - 1) / 2)  # bars of one size stand side by side
        spread = 100 * part["normalised_std"].fillna(0)
        axes.errorbar(
            part["tasks"] + shift, 100 * part["normalised"], yerr=spread, label=name, elinewidth=0.7, **look.line
        )
    axes.xaxis.set_major_locator(FixedLocator(sorted(set(frame["tasks"]))))
    axes.set_xlabel("Number of tasks")
    axes.set_ylabel("Normalised accuracy (%)")
    legend(figure, axes)
    return figure


def _name(row: pd.Series) -> str:
    density = float(row.at["density"])
    return str(row["method"]) if np.isnan(density) else f"{row.at['method']}, {percent(density)} %"


def _family(row: pd.Series) -> str:
    kind = str(row.at["kind"])
    return kind if kind in ("pretrained", "single_task", "post_pruning") else str(row["merge"])

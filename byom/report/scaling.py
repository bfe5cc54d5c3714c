"""Methods by number of tasks: records of subsets of a suite become one table and one figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from byom.report import render
from byom.report.frame import MISSING, csv, percent
from byom.report.report import Runs, Tables, read_runs
from byom.storage.atomic import write_text

NOTES = (
    "Normalised: the mean over tasks of the accuracy divided by that of the task's own model, in per cent; mean ± "
    "sample standard deviation over random subsets of that size (and seeds).",
    "A suite has only one subset of all its tasks, so the last column has no spread.",
)


def generate(results: Path, backbone: str, suites: Sequence[str], name: str) -> tuple[str, list[Path]]:
    """Write the table and figure of several subsets of one suite.

    Args:
        results: The folder that holds ``runs``.
        backbone: The backbone's name.
        suites: Names of the subsets.
        name: What files and titles call them all.

    Returns:
        The table as text, and the paths of all files.
    """
    every = [read_runs(results, suite, backbone) for suite in suites]
    frame = summarised(every)
    stem, shown = f"{name}--{backbone}--number-of-tasks", display(frame)
    lines = list(dict.fromkeys(line for runs in every for line in runs.header if line.startswith("**")))
    notes = "".join(f"- {note}\n" for note in [*NOTES, _subsets(every)])
    top = f"# {name}, {backbone}: by number of tasks\n\n" + "".join(f"{line}\n\n" for line in lines)
    texts = {
        f"{stem}.md": f"{top}{render.markdown(shown)}\n{notes}",
        f"{stem}.csv": csv(frame),
        f"{stem}.tex": render.latex(shown),
    }
    files = [write_text(results / "tables" / file, text) for file, text in texts.items()]
    from byom.report.figures.scaling import accuracy_by_tasks
    from byom.report.figures.style import save

    files += save(accuracy_by_tasks(frame), results / "figures" / stem)
    return f"{top.lstrip('# ')}{render.text(shown)}", files


def summarised(every: Sequence[Runs]) -> pd.DataFrame:
    """Return means and spreads over subsets of a size.

    Args:
        every: Finished runs, one entry per subset.

    Returns:
        One row per method, density and number of tasks, as fractions: ``normalised``, ``mean`` (absolute), both with
        ``_std``, and ``subsets``.
    """
    frame = pd.concat([_of(runs) for runs in every], ignore_index=True)
    keys = ["method", "merge", "variant", "density", "kind", "tasks"]
    grouped = frame.groupby(keys, sort=False, dropna=False)
    out = grouped.agg(
        normalised=("normalised", "mean"), normalised_std=("normalised", "std"),
        mean=("mean", "mean"), mean_std=("mean", "std"), subsets=("mean", "size"),
    )  # fmt: skip
    return out.reset_index()


def _of(runs: Runs) -> pd.DataFrame:
    columns = ["method", "merge", "variant", "density", "kind", "normalised", "mean"]
    return pd.DataFrame(Tables(runs).frame[columns]).assign(tasks=len(runs.tasks))


def display(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the printed form of `summarised`: one column per number of tasks."""
    rows = []
    for _, part in frame.groupby(["method", "density"], sort=False, dropna=False):
        by_size, method, density = part.set_index("tasks"), part["method"].iloc[0], part["density"].iloc[0]
        cells = {f"{size} tasks": _cell(by_size, size) for size in sorted(set(frame["tasks"]))}
        rows.append({"Method": method, "m %": percent(float(density)), **cells})
    return pd.DataFrame(rows)


def _cell(by_size: pd.DataFrame, size: int) -> str:
    if size not in by_size.index:
        return MISSING
    mean, std = (float(by_size.loc[size, name]) for name in ("normalised", "normalised_std"))  # pyright: ignore
    return f"{100 * mean:.1f}" + ("" if np.isnan(std) else f" ± {100 * std:.1f}")


def _subsets(every: Sequence[Runs]) -> str:
    counts: dict[int, int] = {}
    for runs in every:
        size = len(runs.tasks)
        counts[size] = counts.get(size, 0) + 1
    return "Subsets: " + ", ".join(f"{count} of {size} tasks" for size, count in sorted(counts.items())) + "."

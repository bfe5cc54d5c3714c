"""Our numbers for an option, from the committed tables of records."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pandas as pd

from experiments.pages.options import ROOT, Option

SUITES = {"vision8_offline--vit_small_dinov2": "images, ViT-S/14", "text8_offline--minilm": "texts, MiniLM-L6"}
NOTE = (
    "Mean test accuracy of the eight tasks of each offline suite, the same relative to the single-task models, and the "
    "storage for all eight tasks. The suites are small (see [data](../../data.md)): they show how methods compare and "
    "are not the papers' benchmarks.\n"
)


def section(option: Option) -> str:
    """Return the results of an option as Markdown, empty without a record.

    Args:
        option: A merge method, a variant or a router.
    """
    sweep, seeded = _sweep(option), _seeded(option)
    if not (sweep or seeded):
        return ""
    parts = ["## Our numbers\n", NOTE]
    if seeded:
        parts.append(f"Seeds {_seeds(ROOT / 'results' / 'tables')} ([all rows](../../results.md)):\n\n{seeded}")
    if sweep:
        parts.append(f"Seed {_seeds(ROOT / 'results' / 'methods' / 'tables')}, every method in one sweep:\n\n{sweep}")
    return "\n".join(parts)


def _sweep(option: Option) -> str:
    frames = {name: _rows(_read("results/methods/tables", f"{name}--methods.csv"), option) for name in SUITES}
    head = [f"{SUITES[name]}: accuracy | relative | stored | seconds" for name in frames]
    return _table(head, 4, frames, _costs)


def _costs(row: pd.Series) -> str:
    seconds = row["statistics_seconds"] + row["merge_seconds"] + row["variant_seconds"]
    return f"{_accuracy(row)} | {seconds:.1f}"


def _seeded(option: Option) -> str:
    frames = {name: _rows(_read("results/tables", f"{name}.csv"), option) for name in SUITES}
    if option.group == "router" or not any(len(frame) for frame in frames.values()):
        return ""
    head = [f"{SUITES[name]}: accuracy | relative | stored" for name in frames]
    return _table(head, 3, frames, _accuracy)


def _accuracy(row: pd.Series) -> str:
    spread = "" if pd.isna(row["mean_std"]) else f" ± {100 * row['mean_std']:.1f}"
    return f"{100 * row['mean']:.1f}{spread} | {100 * row['normalised']:.1f} % | {row['bytes'] / 1e6:.0f} MB"


def _table(head: list[str], columns: int, frames: dict[str, pd.DataFrame], make: Callable[[pd.Series], str]) -> str:
    names = list(dict.fromkeys(name for frame in frames.values() for name in frame.index))
    if not names:
        return ""
    lines = [f"| | {' | '.join(head)} |", "|---|" + "--:|" * columns * len(frames)]
    for name in names:
        cells = [make(frame.loc[name]) if name in frame.index else " | " * (columns - 1) for frame in frames.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _rows(frame: pd.DataFrame, option: Option) -> pd.DataFrame:
    """Return an option's rows by label; the label has the density where there are several."""
    routed = frame["method"].str.contains("-routed")
    if option.group == "router":
        found = frame[frame["method"].str.contains(option.title, regex=False)] if option.instance.title else frame[:0]
    elif option.group == "merge":
        found = frame[(frame["merge"] == option.name) & (frame["variant"] == "none") & ~routed]
    else:
        found = frame[(frame["variant"] == option.name) & ~routed]
        found = found if option.name != "none" else found[:0]
    labels = [
        method if pd.isna(density) else f"{method}, {100 * density:g} %"
        for method, density in zip(found["method"], found["density"], strict=True)
    ]
    return found.assign(label=labels).set_index("label")


@cache
def _read(folder: str, name: str) -> pd.DataFrame:
    file = ROOT / folder / name
    return pd.read_csv(file) if file.is_file() else pd.DataFrame(columns=["method", "merge", "variant", "density"])


def _seeds(folder: Path) -> str:
    """Return the seeds that the tables of a folder say they are made of."""
    for name in SUITES:
        for file in (folder / f"{name}.md", folder / f"{name}--methods.md"):
            if file.is_file() and (found := re.search(r"Seeds: ([\d, ]+)\.", file.read_text(encoding="utf-8"))):
                return found[1]
    return "unknown"

"""Our rows beside published ones: a table for every source, and a figure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from byom import render
from byom.published import CONFIDENCE, UNCHECKED, Line, Published, every
from byom.report import Runs, read_runs, write
from byom.table import MISSING, Row, numbers, percent, rows

DAGGER = "†"
OURS, THEIRS, GAP = "ours", "published", "difference"


@dataclass(frozen=True)
class Pair:
    """A published row, and ours with the same settings.

    Args:
        line: The published row.
        row: Ours; None if there is none.
        values: Ours in per cent, by task.
        mean: Our average over the published tasks, in per cent; NaN if we have other tasks.
        label: How our tables write the row.
    """

    line: Line
    row: Row | None
    values: dict[str, float]
    mean: float
    label: str = ""


def generate(results: Path, suite: str, backbone: str, names: Sequence[str]) -> tuple[str, list[Path]]:
    """Write our rows beside published ones.

    Args:
        results: The folder that holds ``runs``; tables and figures are written beside it.
        suite: The suite's name.
        backbone: The backbone's name.
        names: Published tables, in order.

    Returns:
        The tables as text, and the paths of all files.
    """
    runs = read_runs(results, suite, backbone)
    compared = [(table, pairs(runs, table)) for table in every(names)]
    stem = f"{suite}--{backbone}--published"
    frame = pd.concat([_full(table, found) for table, found in compared], ignore_index=True)
    texts = {
        f"{stem}.md": as_markdown(runs, compared),
        f"{stem}.csv": frame.to_csv(index=False, lineterminator="\n"),
        f"{stem}.tex": "\n".join(render.latex(_cells(table, found)) for table, found in compared),
    }
    files = [write(results / "tables" / name, text) for name, text in texts.items()]
    from byom.figure_style import save
    from byom.published_figure import ours_against_published

    if any(not np.isnan(pair.mean) for _, found in compared for pair in found):
        files += save(ours_against_published(compared), results / "figures" / stem)
    return as_text(runs, compared), files


def pairs(runs: Runs, table: Published) -> list[Pair]:
    """Match a published table with our runs.

    Args:
        runs: Ours.
        table: The published one.

    Returns:
        Published rows in order, one pair for each of ours that has the same settings, or one without.
    """
    frame, found = numbers(runs.done), rows(runs.done)
    out: list[Pair] = []
    for line in table.rows:
        same = [place for place, row in enumerate(found) if line.fits(row)]
        out += [_pair(line, found[place], frame.iloc[place], table) for place in same]
        out += [Pair(line, None, {}, np.nan)] * (not same)
    return out


def _pair(line: Line, row: Row, measured: pd.Series, table: Published) -> Pair:
    values = {t: 100 * float(measured.at[f"accuracy_{t}"]) for t in table.tasks if f"accuracy_{t}" in measured}
    if not line.values:
        mean = 100 * float(measured.at["normalised"]) if len(values) == len(table.tasks) else np.nan
        return Pair(line, row, {}, mean, str(measured["method"]))
    mean = float(np.mean(list(values.values()))) if len(values) == len(table.tasks) else np.nan
    return Pair(line, row, values, mean, str(measured["method"]))


def same_family(runs: Runs, table: Published) -> bool:
    """Say whether our experts are the checkpoints that the published numbers were measured on."""
    return runs.done[0].get("family", "trained") == table.family


def _full(table: Published, found: Sequence[Pair]) -> pd.DataFrame:
    """Return every number at full precision."""
    made = [
        {
            "published": table.name, "label": pair.line.label, "ours": pair.label, "task": task,
            "our_value": ours, "published_value": theirs, "difference": ours - theirs,
        }
        for pair in found
        for task, ours, theirs in _values(table, pair)
    ]  # fmt: skip
    return pd.DataFrame(made)


def _values(table: Published, pair: Pair) -> Iterator[tuple[str, float, float]]:
    for place, task in enumerate(table.tasks if pair.line.values else ()):
        yield task, pair.values.get(task, np.nan), pair.line.values[place]
    yield "mean", pair.mean, pair.line.mean


def _cells(table: Published, found: Sequence[Pair]) -> pd.DataFrame:
    """Return the printed table: three lines a row that both have, one line where only the source has it."""
    lines = [line for pair in found for line in _lines(table, pair)]
    return pd.DataFrame(lines, columns=["Method", "", *table.tasks, "Mean", "Parameters"])


def _lines(table: Published, pair: Pair) -> Iterator[list[str]]:
    line, mark = pair.line, DAGGER * table.dagger
    theirs = [f"{value:g}" for value in line.values] or [MISSING] * len(table.tasks)
    if pair.row is None:
        yield [line.label + mark, THEIRS, *theirs, f"{line.mean:g}", line.parameters or MISSING]
        return
    ours = [pair.values.get(task, np.nan) for task in table.tasks]
    gaps = [a - b for a, b in zip(ours, line.values, strict=True)] if line.values else [np.nan] * len(ours)
    yield [_named(pair), OURS, *map(_plain, ours), _plain(pair.mean), _millions(pair.row)]
    yield [line.label + mark, THEIRS, *theirs, f"{line.mean:g}", line.parameters or MISSING]
    yield ["", GAP, *map(_signed, gaps), _signed(pair.mean - line.mean), ""]


def _named(pair: Pair) -> str:
    density = pair.row.density if pair.row else np.nan
    return pair.label if np.isnan(density) else f"{pair.label}, {percent(density)} %"


def _millions(row: Row) -> str:
    stored = row.records[0]["storage"]
    count = stored.get("with_frozen", stored)["parameters"]
    return f"{count / 1e6:.0f}M"


def _plain(value: float) -> str:
    return MISSING if np.isnan(value) else f"{value:.1f}"


def _signed(value: float) -> str:
    return MISSING if np.isnan(value) else f"{value:+.1f}"


def notes(runs: Runs, table: Published) -> list[str]:
    """Return what a reader must know of a published table, and of ours beside it."""
    family = runs.done[0].get("family", "trained")
    said = [
        f"Published: {table.source} ({table.url}), {CONFIDENCE[table.confidence]}. Values: {table.what}, in per cent."
    ]
    said += [f"{DAGGER} {UNCHECKED}."] * table.dagger
    if not same_family(runs, table):
        said.append(
            f"Our experts are of the family '{family}', the published numbers of '{table.family}': other "
            "checkpoints, so that differences say little about methods."
        )
    said += [table.note] * bool(table.note)
    said += [f"{line.label}: {line.odd}." for line in table.rows if line.odd]
    return said


def as_markdown(runs: Runs, compared: Sequence[tuple[Published, list[Pair]]]) -> str:
    """Return all tables as Markdown."""
    parts = [
        f"# {runs.suite}, {runs.backbone}: ours beside published numbers\n\n",
        *(f"**{n}**\n\n" for n in _marks(runs)),
    ]
    for table, found in compared:
        parts += [f"## {table.title}\n\n", render.markdown(_cells(table, found)), "\n"]
        parts += [*(f"- {note}\n" for note in notes(runs, table)), "\n"]
    return "".join(parts).rstrip("\n") + "\n"


def as_text(runs: Runs, compared: Sequence[tuple[Published, list[Pair]]]) -> str:
    """Return the tables for a terminal: averages, as tasks are in the files."""
    lines = [f"{runs.suite}, {runs.backbone}: ours beside published numbers", *_marks(runs)]
    for table, found in compared:
        lines += ["", table.title, *notes(runs, table), ""]
        shown = [_short(table, pair) for pair in found]
        lines.append(render.text(pd.DataFrame(shown, columns=["Method", "Ours", "Published", "Difference"]), []))
    return "\n".join(lines)


def _short(table: Published, pair: Pair) -> list[str]:
    gap = _signed(pair.mean - pair.line.mean)
    return [pair.line.label + DAGGER * table.dagger, _plain(pair.mean), f"{pair.line.mean:g}", gap]


def _marks(runs: Runs) -> list[str]:
    return sorted({record["note"] for record in runs.done if record.get("note")})

"""Our rows next to published ones: a table for every source, and a figure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from byom.report import render
from byom.report.frame import MISSING, csv, percent
from byom.report.published import CONFIDENCE, DAGGER, UNCHECKED, Pair, Published, pairs, same_family, same_tasks
from byom.report.report import Runs, Tables, read_runs
from byom.report.rows import Row
from byom.storage.atomic import write_text

OURS, THEIRS, GAP = "ours", "published", "difference"


def generate(results: Path, suite: str, backbone: str, tables: Sequence[Published]) -> tuple[str, list[Path]]:
    """Write our rows next to published ones.

    Args:
        results: The folder that holds ``runs``; tables and figures are written next to it.
        suite: The suite's name.
        backbone: The backbone's name.
        tables: Published tables, in order.

    Returns:
        The tables as text, and the paths of all files.
    """
    runs = read_runs(results, suite, backbone)
    ours = Tables(runs)
    compared = [(table, pairs(ours, table)) for table in tables]
    stem = f"{suite}--{backbone}--published"
    frame = pd.concat([_full(table, matches) for table, matches in compared], ignore_index=True)
    texts = {
        f"{stem}.md": as_markdown(runs, compared),
        f"{stem}.csv": csv(frame),
        f"{stem}.tex": as_latex(runs, compared),
    }
    files = [write_text(results / "tables" / name, text) for name, text in texts.items()]
    from byom.report.figures.published import ours_against_published
    from byom.report.figures.style import save

    if any(not np.isnan(pair.mean) for _, matches in compared for pair in matches):
        files += save(ours_against_published(compared, runs.notes), results / "figures" / stem)
    return as_text(runs, compared), files


def _full(table: Published, matches: Sequence[Pair]) -> pd.DataFrame:
    """Return every number at full precision."""
    numbers = [
        {
            "published": table.name, "label": pair.line.label, "ours": pair.label, "task": task,
            "our_value": ours, "published_value": theirs, "difference": np.nan if pair.apart else ours - theirs,
            "apart": pair.apart,
        }
        for pair in matches
        for task, ours, theirs in _values(table, pair)
    ]  # fmt: skip
    return pd.DataFrame(numbers)


def _values(table: Published, pair: Pair) -> Iterator[tuple[str, float, float]]:
    for place, task in enumerate(table.tasks if pair.line.values else ()):
        yield task, pair.values.get(task, np.nan), pair.line.values[place]
    yield "mean", pair.mean, pair.line.mean


def _cells(table: Published, matches: Sequence[Pair]) -> pd.DataFrame:
    """Return the printed table: first rows that both have, then those that only the source has."""
    ordered = sorted(matches, key=lambda pair: pair.row is None)
    lines = [line for pair in ordered for line in _lines(table, pair)]
    return pd.DataFrame(lines, columns=["Method", "", *table.tasks, "Mean", "Parameters"])


def _lines(table: Published, pair: Pair) -> Iterator[list[str]]:
    line, (digits, of_mean) = pair.line, pair.line.decimals
    theirs = line.values or [np.nan] * len(table.tasks)
    ours = [pair.values.get(task, np.nan) for task in table.tasks]
    if pair.row:
        yield [_named(pair), OURS, *_plain(ours, digits), *_plain([pair.mean], of_mean), _millions(pair.row)]
    yield [
        table.name_of(line),
        THEIRS,
        *_plain(theirs, digits),
        *_plain([line.mean], of_mean),
        line.parameters or MISSING,
    ]
    if pair.row and not pair.apart:
        gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
        yield ["", GAP, *_plain(gaps, digits, "+"), *_plain([pair.gap], of_mean, "+"), ""]


def _named(pair: Pair) -> str:
    density = pair.row.density if pair.row else np.nan
    return pair.label if np.isnan(density) else f"{pair.label}, {percent(density)} %"


def _millions(row: Row) -> str:
    stored = row.records[0].storage
    count = stored.parameters if stored.with_frozen is None else stored.with_frozen
    return f"{count / 1e6:.0f}M"


def _plain(values: Iterable[float], digits: int, sign: str = "") -> list[str]:
    return [MISSING if np.isnan(value) else f"{value:{sign}.{digits}f}" for value in values]


def notes(runs: Runs, table: Published) -> list[str]:
    """Return what a reader must know of a published table, and of ours next to it."""
    remarks = [
        f"Published: {table.source} ({table.url}), {CONFIDENCE[table.confidence]}. Values: {table.what}, in per cent. "
        "Differences are ours less published, in percentage points, with the decimals of the source."
    ]
    remarks += [f"{DAGGER} {UNCHECKED}."] * table.dagger
    remarks += [_checkpoints(runs, table), *_merged(runs, table), *[table.note] * bool(table.note)]
    return remarks + [text for line in table.rows for text in line.remarks]


def _checkpoints(runs: Runs, table: Published) -> str:
    if same_family(runs, table):
        return f"Checkpoints: '{table.family}', ours and published. Numbers of other families are not comparable."
    return (
        f"Our experts are of the family '{runs.family}', the published numbers of '{table.family}': other "
        "checkpoints, not comparable, so no differences are printed."
    )


def _merged(runs: Runs, table: Published) -> list[str]:
    if same_tasks(runs, table):
        return []
    ours = len(runs.tasks)
    return [f"We merge {ours} tasks, the source {len(table.tasks)}: no differences of merged models are printed."]


def as_markdown(runs: Runs, compared: Sequence[tuple[Published, list[Pair]]]) -> str:
    """Return all tables as Markdown."""
    parts = [
        f"# {runs.suite}, {runs.backbone}: ours beside published numbers\n\n",
        *(f"**{n}**\n\n" for n in runs.notes),
    ]
    for table, matches in compared:
        parts += [f"## {table.title}\n\n", render.markdown(_cells(table, matches)), "\n"]
        parts += [*(f"- {note}\n" for note in notes(runs, table)), "\n"]
    return "".join(parts).rstrip("\n") + "\n"


def as_latex(runs: Runs, compared: Sequence[tuple[Published, list[Pair]]]) -> str:
    """Return all tables as LaTeX, each above what a reader must know of it."""
    parts = [rf"\textbf{{{render.escape_latex(mark)}}}\par" "\n" for mark in runs.notes]
    for table, matches in compared:
        remarks = " ".join(render.escape_latex(note) for note in notes(runs, table))
        parts.append(f"{render.latex(_cells(table, matches))}\\par{{\\footnotesize {remarks}\\par}}\n\n")
    return "".join(parts)


def as_text(runs: Runs, compared: Sequence[tuple[Published, list[Pair]]]) -> str:
    """Return the tables for a terminal: averages, as tasks are in the files."""
    lines = [f"{runs.suite}, {runs.backbone}: ours beside published numbers", *runs.notes]
    for table, matches in compared:
        lines += ["", table.title, *notes(runs, table), ""]
        shown = [_short(table, pair) for pair in matches]
        lines.append(render.text(pd.DataFrame(shown, columns=["Method", "Ours", "Published", "Difference"]), []))
    return "\n".join(lines)


def _short(table: Published, pair: Pair) -> list[str]:
    digits = pair.line.decimals[1]
    cells = [*_plain([pair.mean, pair.line.mean], digits), *_plain([pair.gap], digits, "+")]
    return [table.name_of(pair.line), *cells]

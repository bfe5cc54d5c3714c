"""What the tests of published experiments share: one run of an experiment on tiny data, and what it must leave."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import yaml

from byom.__main__ import main
from byom.cli import config, sweeps
from byom.report.figures import style
from tests.hub import visit
from tests.published_models import LAYERS
from tests.tiny_clip import tiny_clip

NOTE = "NOT A RESULT: tiny data in the hubs' own schema"
SHORTER = {
    "merge=adamerging": "merge.steps=2",
    "merge=adarank": "merge.steps=2",
    "merge=wudi": "merge.steps=3",
    "byom=surgery": "byom.steps=2",
}
PLACES = ("backbone", "experts", "results")
SWEEPS = ("density_sweep", "rank_sweep")
Cells = list[list[str]]


@cache
def plan(name: str) -> dict:
    """Return an experiment as its yaml has it."""
    return yaml.safe_load((config.folder() / "experiment" / f"{name}.yaml").read_text())


def chosen(name: str, group: str) -> str | None:
    """Return the option of a group that is common to an experiment's cells."""
    return next((o.partition("=")[2] for o in plan(name)["common"] if o.startswith(f"{group}=")), None)


def cells(name: str) -> Cells:
    """Return the overrides of an experiment's cells."""
    return sweeps.cells(plan(name)["rows"], plan(name)["common"])


def kind(cell: list[str]) -> tuple[str, ...]:
    """Return a cell without its numbers and without the names of its backbone, experts and results."""
    return tuple(sorted(re.sub(r"=[\d.]+$", "=#", o) for o in cell if o.partition("=")[0] not in PLACES))


def thinned(name: str, every: Cells) -> Cells:
    """Return the first cell of each kind, and the last as well where an experiment is about its numbers.

    Cells of one kind run the same code with other numbers.
    """
    first = {kind(cell): cell for cell in reversed(every)}
    last = {kind(cell): cell for cell in every} if name in SWEEPS else {}
    return [cell for cell in every if cell in (first[kind(cell)], last.get(kind(cell)))]


def run(
    name: str, home: Path, patch, *extra: str, select: Callable[[Cells], Cells] = lambda every: every
) -> tuple[int, Path]:
    """Run an experiment on tiny data: training methods cut to a few steps, sweeps of numbers `thinned`.

    Returns:
        The exit status, and the results folder.
    """
    expand = sweeps.cells

    def shorter(rows, common):
        return [[*c, *(v for k, v in SHORTER.items() if k in c)] for c in thinned(name, select(expand(rows, common)))]

    folder = home / "made" / chosen(name, "results")
    results = folder / "results" / "scratch"
    overrides = [f"results={results}", f"cache={home}/cache", f'note="{NOTE}"', "device=cpu", *extra]
    if (chosen(name, "backbone") or "clip").startswith("clip") and chosen(name, "suite").startswith("vision"):
        overrides += [f"backbone.model={tiny_clip(LAYERS)}", "backbone.pretrained=random"]
    with visit(home, patch), patch.context() as undo:
        undo.setattr("byom.cli.sweeps.cells", shorter)
        undo.setattr(style, "_save", png_alone(style._save))
        undo.setenv("BYOM_SWEEP", "tiny")  # one name for all experiments, or each composes its configurations anew
        return main(["table", name, *overrides]), results


def png_alone(save: Callable[..., Path]) -> Callable[..., Path]:
    """Draw each figure once: that any set of rows can be drawn is tested here, its files are in tests of figures."""
    return lambda figure, stem, ending, stamp: save(figure, stem, ending, stamp) if ending == "png" else stem


def check(name: str, results: Path) -> None:
    """Check that an experiment left a record a cell, a table that says what it is, and published columns."""
    records = list(results.glob("runs/*/*/*.json"))
    assert records and not list(results.glob("runs/*/*/*.failed.json"))
    published = plan(name).get("published", [])
    tables = list(results.glob("tables/*--published.md")) if published else list(results.glob("tables/*.md"))
    assert tables
    for table in tables:
        text = table.read_text()
        assert f"**{NOTE}**" in text, table
        if published:
            assert "| ours |" in text and "| published |" in text
            repaired = (chosen(name, "experts") or "").startswith("tall_")  # published tables have the first set
            assert ("| difference |" in text) != repaired
        assert ("†" in text) == any(each.startswith("byom_") for each in published) or not published

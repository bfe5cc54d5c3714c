"""What the tests of published experiments share: a hub of tiny data and models, and one run of an experiment."""

from __future__ import annotations

from pathlib import Path

import yaml

from byom.__main__ import main
from byom.cli import config, sweeps
from tests.hub import build, tasks, visit
from tests.published_models import add_experts
from tests.tiny_clip import tiny_clip

NOTE = "NOT A RESULT: tiny data in the hubs' own schema"
SHORTER = {"adamerging": "merge.steps=2", "wudi": "merge.steps=3"}


def plan(name: str) -> dict:
    """Return an experiment as its yaml has it."""
    return yaml.safe_load((config.folder() / "experiment" / f"{name}.yaml").read_text())


def chosen(name: str, group: str) -> str | None:
    """Return the option of a group that is common to an experiment's cells."""
    return next((o.partition("=")[2] for o in plan(name)["common"] if o.startswith(f"{group}=")), None)


IMAGES = [n for n in config.options("experiment") if chosen(n, "experts") and chosen(n, "suite").startswith("vision")]


def add_images(home: Path, names: list[str]) -> Path:
    """Make a folder the hub of some experiments on images: their data sets and experts."""
    wanted = {(chosen(name, "experts"), chosen(name, "suite")) for name in names}
    build(home, sorted({suite for _, suite in wanted}))
    for option in sorted({option for option, _ in wanted if not option.startswith("task_vectors")}):
        largest = max((suite for each, suite in wanted if each == option), key=lambda suite: len(tasks(suite)))
        add_experts(home, option, largest, home / "work")
    return home


def run(name: str, home: Path, patch, *extra: str) -> tuple[int, Path]:
    """Run an experiment on tiny data, training methods cut to a few steps, numbers of tasks to the first and last two.

    Returns:
        The exit status, and the results folder.
    """
    expand = sweeps.cells

    def shorter(rows, common):
        cells = [c for c in expand(rows, common) if not {"suite.size=4", "suite.size=8", "suite.size=12"} & set(c)]
        return [[*c, *(v for k, v in SHORTER.items() if f"merge={k}" in c)] for c in cells]

    folder = home / "made" / chosen(name, "results")
    results = folder / "results" / "scratch"
    overrides = [f"results={results}", f"cache={folder}/cache", f'note="{NOTE}"', "device=cpu", *extra]
    if (chosen(name, "backbone") or "clip").startswith("clip") and chosen(name, "suite").startswith("vision"):
        overrides += [f"backbone.model={tiny_clip()}", "backbone.pretrained=random"]
    with visit(home, patch), patch.context() as undo:
        undo.setattr("byom.cli.sweeps.cells", shorter)
        return main(["table", name, *overrides]), results


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
            assert "| ours |" in text and "| published |" in text and "| difference |" in text
        assert ("†" in text) == any(each.startswith("byom_") for each in published) or not published

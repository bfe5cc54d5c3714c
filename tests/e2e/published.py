"""What the tests of published experiments share: a hub of tiny data and models, and one run of an experiment."""

from __future__ import annotations

from pathlib import Path

import yaml

from byom import config
from byom.__main__ import main
from tests.hub import visit
from tests.tiny_clip import tiny_clip

NOTE = "NOT A RESULT: tiny data in the hubs' own schema"
SHORTER = {"adamerging": "merge.steps=2", "wudi": "merge.steps=3"}


def plan(name: str) -> dict:
    """Return an experiment as its yaml has it."""
    return yaml.safe_load((config.folder() / "experiment" / f"{name}.yaml").read_text())


def chosen(name: str, group: str) -> str | None:
    """Return the option of a group that is common to an experiment's cells."""
    return next((o.partition("=")[2] for o in plan(name)["common"] if o.startswith(f"{group}=")), None)


def run(name: str, home: Path, folder: Path, patch, *extra: str) -> tuple[int, Path]:
    """Run an experiment on tiny data, training methods cut to a few steps.

    Returns:
        The exit status, and the results folder.
    """
    expand = config.cells

    def shorter(rows, common):
        cells = expand(rows, common)
        return [[*c, *(v for k, v in SHORTER.items() if f"merge={k}" in c)] for c in cells]

    results = folder / "results" / "scratch"
    overrides = [f"results={results}", f"cache={folder}/cache", f'note="{NOTE}"', "device=cpu", *extra]
    if (chosen(name, "backbone") or "clip").startswith("clip") and chosen(name, "suite").startswith("vision"):
        overrides += [f"backbone.model={tiny_clip()}", "backbone.pretrained=random"]
    with visit(home, patch), patch.context() as undo:
        undo.setattr("byom.config.cells", shorter)
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

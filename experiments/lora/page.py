"""Tables and figures of the LoRA experiments, from records alone: python -m experiments.lora.

Reads results/lora/RECIPE/runs and results/lora/spectra as far as they exist; writes results/lora/tables,
results/lora/figures and what stands between the markers of docs/lora_results.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from byom.report import render
from byom.report.figures.style import save
from byom.report.report import read_runs
from byom.storage.atomic import write_text
from byom.storage.record import Record
from experiments import peft_combinations, spectra
from experiments.lora import display as rank_display
from experiments.lora import figures as rank_figures
from experiments.lora import tables as rank_table

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results" / "lora"
PAGE = ROOT / "docs" / "lora_results.md"
SUITES = {"vision": ("vision8_offline", "vit_small_dinov2"), "text": ("text8_offline", "minilm")}
TITLES = {"adapters": "LoRA experts, rank 64", "full": "Full fine-tunes"}


@dataclass(frozen=True)
class Found:
    """The records, spectra and notes of one suite.

    Args:
        suite: Its name.
        backbone: The encoder's name.
        records: Recipe to finished runs, for those that have any.
        spectra: Recipe to what ``experiments.spectra`` wrote.
        notes: Recipe to what a reader must know before its numbers.
        combined: What ``experiments.peft_combinations`` wrote.
    """

    suite: str
    backbone: str
    records: dict[str, Sequence[Record]] = field(default_factory=dict)
    spectra: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    combined: list[dict[str, Any]] = field(default_factory=list)

    @property
    def stem(self) -> str:
        """The start of the names of its files."""
        return f"{self.suite}--{self.backbone}"

    def ranked(self) -> dict[str, pd.DataFrame]:
        """Return the rows of each compressed recipe by its title."""
        return {TITLES[name]: rank_table.ranked(self.records[name]) for name in TITLES if name in self.records}

    def beside(self) -> dict[str, pd.DataFrame]:
        """Return the comparisons at equal bytes by the recipe's title, where there are any."""
        made = {TITLES[name]: rank_table.at_equal_bytes(self.records[name]) for name in TITLES if name in self.records}
        return {title: frame for title, frame in made.items() if len(frame)}


def find(results: Path, suite: str, backbone: str) -> Found:
    """Read the records of a suite.

    Args:
        results: The folder that holds one folder per recipe.
        suite: Its name.
        backbone: The encoder's name.
    """
    found = Found(suite, backbone)
    for recipe in rank_table.RECIPES:
        folder = results / recipe / "runs" / suite / backbone
        if any(not path.name.endswith(".failed.json") for path in folder.glob("*.json")):
            runs = read_runs(results / recipe, suite, backbone)
            found.records[recipe], found.notes[recipe] = runs.done, runs.header
    for recipe in TITLES:
        file = results / "spectra" / f"{found.stem}--{recipe}.json"
        if file.is_file():
            found.spectra[recipe] = json.loads(file.read_text())
    file = results / "peft_combinations" / f"{suite}.json"
    found.combined.extend(json.loads(file.read_text())["rows"] if file.is_file() else [])
    return found


def rank(found: Found, by_task: bool = False) -> str:
    """Return the rank tables of a suite as Markdown, one per recipe."""
    shown = {title: rank_display.display_ranks(frame, by_task) for title, frame in found.ranked().items()}
    return _titled(shown)


def equal_bytes(found: Found) -> str:
    """Return low-rank beside sparse as Markdown, one table per recipe."""
    return _titled({title: rank_display.display_bytes(frame) for title, frame in found.beside().items()})


def recipes(found: Found, by_task: bool = False) -> str:
    """Return the parameter-efficient recipes of a suite as Markdown."""
    frame = rank_table.recipes(found.records)
    return render.markdown(rank_display.display_recipes(frame, by_task)) if len(frame) else ""


def laws(found: Found) -> str:
    """Return how well an exponential and a power law fit the singular values, as Markdown, one table per recipe."""
    return _join(
        {TITLES[name]: spectra.table(one["kinds"] | {"all": one["all"]}) for name, one in found.spectra.items()}
    )


def combinations(found: Found) -> str:
    """Return what becomes of combined adapters, as Markdown."""
    return peft_combinations.table(found.combined) if found.combined else ""


def _titled(frames: Mapping[str, pd.DataFrame]) -> str:
    return _join({title: render.markdown(frame) for title, frame in frames.items()})


def _join(tables: Mapping[str, str]) -> str:
    return "\n".join(f"{title}:\n\n{text}" for title, text in tables.items())


PARTS = {"rank": rank, "bytes": equal_bytes, "recipes": recipes, "spectra": laws, "combinations": combinations}


def fill(text: str, results: Path = RESULTS) -> str:
    """Replace what stands between the markers of the page; of suites without records nothing stands there.

    Args:
        text: The page.
        results: The folder that holds one folder per recipe.
    """
    for suite, names in SUITES.items():
        found = find(results, *names)
        for part, make in PARTS.items():
            pattern = rf"(<!-- {part}:{suite} -->\n).*?(<!-- /{part}:{suite} -->)"
            made = make(found)
            text = re.sub(pattern, lambda at, made=made: f"{at[1]}{made}{at[2]}", text, flags=re.S)
    return text


def tables(found: Found, folder: Path) -> list[Path]:
    """Write the tables of a suite, accuracies by task included.

    Args:
        found: What there is of it.
        folder: Where the files go.
    """
    frame = rank_table.recipes(found.records)
    parts = {
        "rank": (found.ranked(), rank(found, by_task=True), rank_display.RANK_NOTES),
        "bytes": (found.beside(), equal_bytes(found), rank_display.BYTES_NOTES),
        "recipes": ({"": frame} if len(frame) else {}, recipes(found, by_task=True), rank_display.RECIPE_NOTES),
    }
    return [file for part, made in parts.items() if made[0] for file in _write(found, folder, part, *made)]


def _write(
    found: Found, folder: Path, part: str, frames: Mapping[str, pd.DataFrame], text: str, notes: Sequence[str]
) -> list[Path]:
    stem = f"{found.stem}--{part}"
    runs = [f"{recipe}: {' '.join(lines)}" for recipe, lines in found.notes.items()]
    page = f"# {found.suite}, {found.backbone}: {part}\n\n{_bullets(runs)}\n{text}\n{_bullets(notes)}"
    titled = [frame.assign(expert=title) if title else frame for title, frame in frames.items()]
    csv = pd.concat(titled).to_csv(index=False, lineterminator="\n")
    return [write_text(folder / f"{stem}.md", page), write_text(folder / f"{stem}.csv", csv)]


def _bullets(lines: Sequence[str]) -> str:
    return "".join(f"- {line}\n" for line in lines)


def figures(found: Found, folder: Path) -> list[Path]:
    """Draw every figure that the records of a suite allow.

    Args:
        found: What there is of it.
        folder: Where the files go.
    """
    frames = found.ranked()
    low = {title: frame for title, frame in frames.items() if list(frame["family"]).count("lora") > 1}
    drawn = {}
    if "adapters" in found.records and TITLES["adapters"] in low:
        drawn["accuracy-by-rank"] = rank_figures.accuracy_by_rank(low[TITLES["adapters"]])
    if low:
        drawn["error-by-rank"] = rank_figures.error_by_rank(low)
        drawn["accuracy-by-bytes"] = rank_figures.accuracy_by_bytes(low)
    if len(frame := rank_table.recipes(found.records)) > 1:
        drawn["recipes"] = rank_figures.recipes(frame)
    if found.spectra:
        titled = {TITLES[name]: one for name, one in found.spectra.items()}
        drawn["singular-values"] = rank_figures.singular_values(titled)
    return [file for name, figure in drawn.items() for file in save(figure, folder / f"{found.stem}--{name}")]


def main(results: Path = RESULTS, page: Path = PAGE) -> None:
    """Write everything.

    Args:
        results: The folder that holds one folder per recipe.
        page: The page whose marked parts are filled.
    """
    for names in SUITES.values():
        found = find(results, *names)
        tables(found, results / "tables")
        figures(found, results / "figures")
    write_text(page, fill(page.read_text(encoding="utf-8"), results))

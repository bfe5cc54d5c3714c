"""Write which cell every committed record is of, when experiments gain records: python -m tests.golden.signatures.

A record whose cell no longer gives its file name is lost: the cell would run again, and stand beside the old record.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from byom.cli import config, sweeps
from byom.storage.atomic import write_json

ROOT = Path(__file__).parents[2]
FILE = Path(__file__).with_name("signatures.json")
SEEDS = ("seed=0,1,2",)
NAMES = [f"{suite}8_{part}" for suite in ("vision", "text") for part in ("offline", "methods", "lora")]
NAMES += ["number_of_tasks_offline", "budget_offline", "budget_choices", "methods_2026", "flexmerge_offline"]


def committed() -> set[str]:
    """Return every committed record, relative to the tree; what commands left in scratch is none of them."""
    every = (path.relative_to(ROOT) for path in (ROOT / "results").rglob("runs/*/*/*.json"))
    return {path.as_posix() for path in every if "scratch" not in path.parts}


def cells(experiment: str, *more: str) -> list[list[str]]:
    """Return the overrides of an experiment's cells."""
    plan = config.resolve([f"experiment={experiment}"], "table").values["experiment"]
    return sweeps.cells(plan["rows"], [*plan["common"], *more])


def record(cell: list[str]) -> str:
    """Return where a cell's record lies or would lie, relative to the tree."""
    settings = config.settings(cell)
    return replace(settings.place(), root=ROOT / settings.results).done.relative_to(ROOT).as_posix()


def located(experiments: list[str]) -> Iterator[tuple[str, str, list[str]]]:
    """Yield experiment, record and cell of every committed record, each once."""
    left = committed()
    for experiment in experiments:
        for cell in cells(experiment, *SEEDS):
            path = record(cell)
            if path in left:
                left.remove(path)
                yield experiment, path, cell
    if left:
        raise SystemExit(f"{len(left)} records belong to no experiment, for example {min(left)}")


def main() -> None:
    """Write the file: experiment to record to overrides."""
    found: dict[str, dict[str, list[str]]] = defaultdict(dict)
    for experiment, path, cell in located(NAMES):
        found[experiment][path] = cell
    write_json(FILE, found)


if __name__ == "__main__":
    main()

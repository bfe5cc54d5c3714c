"""Committed records stay found: today's composition of every cell gives the file name that lies in ``results/``."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest

from byom.cli import config
from byom.data.suite import Suite
from byom.storage.signature import describe, signature
from tests.golden.signatures import FILE, committed, record

GROUPS = ("suite", "backbone", "finetune", "experts", "merge", "byom", "router", "tune", "evaluate")
GIVEN = {
    "experts=files": ["experts.family=f", 'experts.path_of="{task}"'],
    "experts=hub": ["experts.family=f", "experts.repositories={mnist:me/mnist}"],
}
CLASS = re.compile(r"_target_: *([\w.]+)")
FREE = ("Console", "Wandb")  # loggers say nothing of the result
CELLS: dict[str, dict[str, list[str]]] = json.loads(FILE.read_text())


@pytest.fixture(autouse=True)
def any_data(monkeypatch):
    """Names do not depend on what data is here."""
    monkeypatch.setattr(Suite, "available", lambda suite: suite)


def test_every_committed_record_is_pinned():
    assert {path for cells in CELLS.values() for path in cells} == committed()


@pytest.mark.parametrize("experiment", sorted(CELLS))
def test_a_cell_composed_today_finds_its_record(experiment):
    lost = [path for path, cell in CELLS[experiment].items() if record(cell) != path]
    assert not lost, f"{len(lost)} of {len(CELLS[experiment])} records are orphaned, first {lost[0]}"


def choices(value: Any) -> Iterator[Any]:
    """Yield every dataclass in a choice, nested ones included."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield value
        value = [getattr(value, f.name) for f in dataclasses.fields(value)]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for each in value:
            yield from choices(each)


def classes(file: str) -> set[str]:
    """Return the classes that an option's yaml names, those of a suite's tasks included."""
    text = (config.folder() / f"{file}.yaml").read_text(encoding="utf-8")
    tasks = re.findall(r"^ *- /task@[\w.]+: *(\w+)", text, re.M)
    return set(CLASS.findall(text)).union(*(classes(f"task/{task}") for task in tasks))


@cache
def described() -> dict[str, Any]:
    """Return one instance of every class that reaches `describe`, by class name."""
    cells, seen = [], set()
    for group in GROUPS:
        for name in config.options(group):
            written = classes(f"{group}/{name}")
            kept = group != "experts" or f"experts={name}" in (*GIVEN, "experts=trained")  # public sets are hubs
            if kept and not written <= seen:
                cells.append(f"{group}={name}")
                seen |= written
    settings = [config.settings([cell, *GIVEN.get(cell, ())]) for cell in cells]
    values = [getattr(each, field.name) for each in settings for field in dataclasses.fields(each)]
    return {type(each).__name__: each for value in values for each in choices(value) if type(each).__name__ not in FREE}


def grown(option: Any) -> type:
    """Return the class of an option with three further fields that default to "as before"."""
    later = [
        ("later", tuple[str, ...], field(default=())),
        ("factor", float, field(default=1.0)),
        ("place", str, field(default="", metadata={"signature": False})),
    ]
    return dataclasses.make_dataclass(type(option).__name__, later, bases=(type(option),), frozen=True)


def test_the_classes_that_reach_describe_are_known():
    assert {
        "Suite",
        "Task",
        "Vit",
        "Clip",
        "Full",
        "Lora",
        "Trained",
        "Ties",
        "ByomFft",
        "Evaluation",
        "Fisher",
    } <= set(described())
    assert len(described()) > 60


def test_a_later_field_that_defaults_to_before_renames_nothing():
    for name, option in described().items():
        fields = {f.name: getattr(option, f.name) for f in dataclasses.fields(option) if f.init}
        for added in ({}, {"later": []}, {"later": ()}, {"factor": 1}, {"place": "elsewhere"}):
            assert describe(grown(option)(**fields, **added)) == describe(option), (name, added)
        assert describe(grown(option)(**fields, later=["x"])) != describe(option), name
        assert describe(grown(option)(**fields, factor=2.0)) != describe(option), name


@dataclass(frozen=True)
class Inner:
    values: tuple[float, ...] = (0.5, 1.0)
    licence: str = field(default="", metadata={"signature": False})


@dataclass(frozen=True)
class Outer:
    scale: float = 0.3
    inner: Inner = Inner()
    names: tuple[str, ...] = field(default_factory=tuple)


def test_equal_values_have_one_signature():
    assert signature(Outer(1)) == signature(Outer(1.0)) != signature(Outer())
    assert signature(Outer(inner=Inner([0.5, 1]))) == signature(Outer())
    assert signature(Outer(inner=Inner(licence="MIT"))) == signature(Outer())
    assert signature(Outer(names=[])) == signature(Outer()) != signature(Outer(names=["a"]))
    assert signature(Outer(names=["a"])) == signature(Outer(names=("a",)))

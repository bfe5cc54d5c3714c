"""Imports point one way: a package knows only those above it, and only ``cli`` knows Hydra."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import byom

ROOT = Path(byom.__file__).parent
ORDER = (
    "errors", "functional", "storage", "weights", "merge", "variants", "checkpoint", "folders", "data", "backbone",
    "statistics", "experts", "pipeline", "serving", "report", "cli",
)  # fmt: skip
APART = {("report", "pipeline"), ("report", "merge"), ("report", "variants"), ("report", "backbone")}
"""Packages that could see one another by the order, and must not."""
LIBRARIES = {
    "hydra": {"cli"},
    "omegaconf": {"cli"},
    "wandb": {"pipeline"},
    "open_clip": {"backbone", "checkpoint"},
    "transformers": {"storage", "backbone", "checkpoint", "folders", "experts", "serving"},
    "fastapi": {"serving"},
    "uvicorn": {"serving"},
    "prometheus_client": {"serving"},
    "datasets": {"data"},
    "matplotlib": {"report"},
    "numba": {"functional"},
}
FILES = sorted(path for path in ROOT.rglob("*.py") if path.parent != ROOT)


@cache
def imported(path: Path) -> frozenset[str]:
    """Return the modules that a file imports anywhere, ``byom.x.y`` or ``library``."""
    return frozenset(_imported(path))


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_the_rooms_are_these():
    entries = {path.name for path in ROOT.iterdir() if path.name != "__pycache__"}
    assert entries == {"errors.py", *ORDER[1:], "__init__.py", "__main__.py"}


@pytest.mark.parametrize("here", ORDER)
def test_no_import_runs_up(here):
    allowed = set(ORDER[: ORDER.index(here) + 1])
    for path in (p for p in FILES if room(p) == here):
        for name in imported(path):
            if name.startswith("byom."):
                other = name.split(".")[1]
                assert other in allowed and (here, other) not in APART, f"{path.relative_to(ROOT)} imports {name}"


def test_no_two_files_import_each_other():
    modules = {
        ".".join(("byom", *p.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): p for p in FILES
    }
    edges = {
        name: {hit for one in imported(path) for hit in (one, one.rpartition(".")[0]) if hit in modules} - {name}
        for name, path in modules.items()
        if path.name != "__init__.py"
    }
    seen: dict[str, int] = {}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name not in seen:
            for other in sorted(edges.get(name, ())):
                visit(other, (*trail, name))
            seen[name] = 1

    for name in sorted(edges):
        visit(name, ())


@pytest.mark.parametrize("library", sorted(LIBRARIES))
def test_a_library_is_known_where_it_belongs(library):
    for path in FILES:
        if any(name.split(".")[0] == library for name in imported(path)):
            assert room(path) in LIBRARIES[library], f"{path.relative_to(ROOT)} imports {library}"


def test_no_file_is_past_300_lines():
    long = [f"{path.relative_to(ROOT)}: {n}" for path in FILES if (n := len(path.read_text().splitlines())) > 300]
    assert not long

"""Records of results folders as evidence: rows of their tables, each with the options that run it again."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import groupby
from pathlib import Path

from byom.cli import config
from byom.cli.rebuilt import rebuilt
from byom.errors import ByomError, NothingFinished, OptionError
from byom.report.entries import Command, courses, entry
from byom.report.evidence import Course, Entry, Evidence
from byom.report.report import Runs, Tables, read_runs
from byom.report.rows import Row
from byom.variants.base.variant import PackingVariant

REFERENCES = ("pretrained", "single_task")
"""Kinds of rows that others are compared with; records of these alone recommend nothing."""
OF_THE_PLACE = ("suite", "suite.size", "suite.draw", "suite.only", "seed", "results", "evaluate", "evaluate.batch_size")
"""Overrides that say where and on what a row is computed, and not what it is."""
USUAL = ("finetune=full", "experts=trained", "router=oracle", "tune=none")
ORDER = ("merge", "byom", "router", "tune", "+tune", "statistics", "finetune")


def gather(folders: Iterable[Path]) -> Evidence:
    """Read the records of some results folders.

    Args:
        folders: Folders that hold ``runs``.

    Returns:
        One entry per row, of rows that several folders hold the one with the most seeds.

    Raises:
        OptionError: If one of them holds no record of a run.
        ByomError: If one cannot be read, or they cannot stand in one table.
    """
    folders = list(folders)
    entries: list[Entry] = []
    found: list[Course] = []
    signatures: set[tuple[str, str]] = set()
    notes: set[str] = set()
    for folder in folders:
        every = list(_runs(folder))
        if not every:
            raise OptionError(
                f"{folder} holds no finished record of a run; byom run and byom table write them, and without results= "
                "the records that come with byom are read"
            )
        for whole, runs in every:
            signatures |= {(runs.suite, record.signature) for record in runs.done}
            notes |= set(runs.notes)
            tables = Tables(runs)
            if whole == runs.suite and any(row.kind not in REFERENCES for row in tables.rows):
                entries += [entry(row, tables, folder.as_posix(), _command(row)) for row in tables.rows]
        found += _courses(every, folder.as_posix())
    return Evidence(tuple(_distinct(entries)), tuple(found), len(signatures), digest(folders), tuple(sorted(notes)))


def digest(folders: Iterable[Path]) -> str:
    """Return the SHA-256 of the files of all records in some results folders, their names included."""
    found = hashlib.sha256()
    for folder in folders:
        for path in sorted((folder / "runs").glob("*/*/*.json")):
            found.update(f"{path.relative_to(folder).as_posix()}\0".encode() + path.read_bytes())
    return found.hexdigest()


def _runs(folder: Path) -> Iterator[tuple[str, Runs]]:
    """Yield the runs of every suite and backbone that a folder has records of, with the whole suite's name."""
    for place in sorted({path.parent for path in (folder / "runs").glob("*/*/*.json")}):
        for finetune in config.options("finetune"):
            try:
                runs = read_runs(folder, place.parent.name, place.name, finetune=finetune)
            except NothingFinished:
                continue
            yield (runs.done[0].config.get("suite") or {}).get("name", runs.suite), runs


def _courses(every: Sequence[tuple[str, Runs]], folder: str) -> Iterator[Course]:
    """Yield methods by number of tasks, of the subsets of each suite, backbone and recipe of fine-tuning."""

    def subset_of(pair: tuple[str, Runs]) -> tuple[str, str, str]:
        return pair[0], pair[1].backbone, pair[1].done[0].choices.finetune or ""

    parts = sorted((pair for pair in every if pair[0] != pair[1].suite), key=subset_of)
    for (whole, *_), group in groupby(parts, subset_of):
        yield from courses([runs for _, runs in group], folder, whole)


def _distinct(entries: Sequence[Entry]) -> list[Entry]:
    """Keep one entry of those that are run in the same way: most seeds, and then the name that says most."""
    best: dict[tuple, Entry] = {}
    for one in entries:
        key = (one.suite, one.backbone, one.options)
        other = best.get(key)
        if other is None or (len(one.seeds), len(one.row)) > (len(other.seeds), len(other.row)):
            best[key] = one
    return list(best.values())


def _command(row: Row) -> Command:
    return Command(options_of(row), *_variant(row.variant))


def options_of(row: Row) -> tuple[str, ...]:
    """Return the overrides that run a row, as few as there are: what differs from today's defaults."""
    record = row.records[0]
    try:
        every = rebuilt(replace(record, overrides=()), Path("results"))
        usual = {*USUAL, f"backbone={_backbone(record.choices.suite, record.config)}"}
    except ByomError:  # an option that is gone: what was typed then
        every, usual = [*record.overrides], {*USUAL}
    usual |= set() if any(record.tuning.searched for record in row.records) else {"tune=validation"}
    usual |= {"merge=pretrained"} if row.variant != "none" else set()
    kept = [
        one for one in every if one not in usual and _says_something(one.partition("=")[0], record.needs.statistics)
    ]
    return tuple(sorted(kept, key=_place))


def _says_something(name: str, statistics: Collection[str]) -> bool:
    """Say whether an override can change a row that needs some statistics."""
    group, _, rest = name.partition(".")
    return name not in OF_THE_PLACE and (group != "statistics" or rest.partition(".")[0] in statistics)


def _place(override: str) -> tuple[int, bool]:
    """Return where an override stands: by group, the choice of an option before its values."""
    name = override.partition("=")[0]
    group = name.partition("@")[0].partition(".")[0]
    return ORDER.index(group) if group in ORDER else len(ORDER), name != group


def _backbone(suite: str, values: object) -> str:
    own = values.get("suite") if isinstance(values, dict) else None
    return _backbone_of((own or {}).get("name", suite))


@cache
def _backbone_of(suite: str) -> str:
    return config.resolve([f"suite={suite}"]).names["backbone"]


@cache
def _variant(name: str) -> tuple[str, bool]:
    """Return what a variant stores for each task, in words, and whether it packs each for itself.

    Of one that is gone nothing is known.
    """
    try:
        variant = config.option("byom", name)
    except ByomError:
        return "", False
    return variant.stores, isinstance(variant, PackingVariant) and type(variant).suited is PackingVariant.suited

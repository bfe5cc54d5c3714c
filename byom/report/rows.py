"""Records to rows: runs that differ in nothing but their seed, in the order of the table, and how tables name them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations, pairwise
from typing import Any

import numpy as np

from byom.errors import ByomError
from byom.storage.parts import Needs
from byom.storage.record import Record

MERGES = ("pretrained", "average", "task_arithmetic", "ties")  # first in the table; all others follow by name
SIZE, KILOBYTES = "byom.size", "byom.kilobytes"  # what curves run along: models' worth, or 1000 bytes for a task
KINDS = ("pretrained", "single_task", "merged", "post_pruning", "fft")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested mappings under dotted names."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


@dataclass(frozen=True)
class Row:
    """The runs that differ in nothing but their seed.

    Args:
        settings: Choices and hyperparameters, less seeds and tuned values.
        records: The runs, by seed.
        apart: The settings that tell it from rows of the same name, as in ``(density 0.1)``.
    """

    settings: Mapping[str, Any]
    records: tuple[Record, ...]
    apart: str = ""

    @property
    def merge(self) -> str:
        """The merge method's name."""
        return self.records[0].choices.merge

    @property
    def variant(self) -> str:
        """The BYOM variant's name."""
        return self.records[0].choices.byom

    @property
    def kind(self) -> str:
        """The sort of model: ``pretrained``, ``single_task``, ``merged``, or the variant's own name."""
        if self.variant != "none":
            return self.variant
        return "pretrained" if self.merge == "pretrained" else "merged"

    @property
    def name(self) -> str:
        """The row as tables write it, such as ``BYOM-FFT on TIES``, before the settings that tell it from others."""
        return name_of(self.records[0])

    @property
    def label(self) -> str:
        """The row's name in full; two rows of one table that share it differ in their density."""
        kilobytes = self.settings.get(KILOBYTES)
        return self.name + self.apart + ("" if kilobytes is None else f", {kilobytes:.15g} kB")

    @property
    def named(self) -> str:
        """The label with the density, which no other row of the table has: what ``byom why`` is asked for."""
        return self.label if np.isnan(self.density) else f"{self.label}, {100 * self.density:.6g} %"

    @property
    def base(self) -> str:
        """The label of the merged model that the variant starts from; the row's own where it has none."""
        if self.variant == "none" or self.merge == "pretrained":
            return self.label
        return _routed(self.records[0], self.records[0].titles.merge) + self.apart

    @property
    def density(self) -> float:
        """The fraction put back for each task, or NaN where nothing is chosen by a fraction."""
        return float(self.settings.get("byom.density", np.nan)) if self.variant != "none" else np.nan

    @property
    def along(self) -> str:
        """The setting along which a curve of such rows runs, `SIZE` or `KILOBYTES`; empty where there is none."""
        return next((name for name in (SIZE, KILOBYTES) if self.settings.get(name) is not None), "")

    @property
    def sizeless(self) -> Row:
        """The row as one of those that differ in nothing but the setting of `along`."""
        return replace(self, settings={name: value for name, value in self.settings.items() if name != self.along})

    @property
    def one_model(self) -> bool:
        """True where the row stores nothing for its tasks, so that one merged model serves them all."""
        stored = [record.storage for record in self.records]
        return not any(sum(one.task_parameters.values()) + sum(one.task_bytes.values()) for one in stored)

    @property
    def needs(self) -> Needs:
        """The needs of the methods besides theta_0; the same for every seed."""
        return self.records[0].needs

    @property
    def given(self) -> str:
        """The dearest of the needs: another model, test inputs, labelled inputs, unlabelled inputs, or weights."""
        if self.needs.joint or self.kind == "single_task":
            return "another model"
        if any(record.needs.sees_test for record in self.records):
            return "test inputs"
        return f"{'' if self.needs.labels else 'un'}labelled inputs" if self.needs.inputs else "weights"

    @cached_property
    def order(self) -> tuple[int, int, str, str, float]:
        """The row's place in the table, as a key to sort by."""
        place = MERGES.index(self.merge) if self.merge in MERGES else len(MERGES)
        rank = KINDS.index(self.kind) if self.kind in KINDS else len(KINDS)
        rest = {name: _sortable(value) for name, value in self.settings.items() if name != "byom.density"}
        name = f"{self.variant} {self.merge}"
        return rank, place, name, json.dumps(rest, sort_keys=True), float(np.nan_to_num(self.density))


def name_of(record: Record) -> str:
    """Return the name of a run, such as ``BYOM-FFT on TIES`` or ``BYOM-FFT (int4, coded positions) on TIES``."""
    choices, titles = record.choices, record.titles
    if choices.byom == "none":
        return _routed(record, titles.merge)
    name = titles.byom + _bits(record.hyperparameters.get("byom") or {})
    return _routed(record, name + ("" if choices.merge == "pretrained" else f" on {titles.merge}"))


def _bits(options: Mapping[str, Any]) -> str:
    """Say in how many bits a variant stores values and positions, which records hold where it is not as they are."""
    words = [options["values"]] if options.get("values", "native") != "native" else []
    words += ["coded positions"] if options.get("positions") == "entropy" else []
    return f" ({', '.join(words)})" if words else ""


def _routed(record: Record, name: str) -> str:
    return f"{name}, {record.titles.router}" if record.titles.router else name


def _sortable(value: Any) -> Any:
    """Return a value whose text sorts as its number does: rank 2 before rank 16."""
    return f"{value:020.9f}" if isinstance(value, int | float) and not isinstance(value, bool) else value


def settings(record: Record) -> dict[str, Any]:
    """Return what identifies a row: choices and hyperparameters, less seeds and tuned values."""
    tuned = {full(name) for name, _ in flatten(record.tuning.chosen)}
    every = {**record.choices.named, **dict(flatten(record.hyperparameters))}
    return {k: v for k, v in every.items() if k not in tuned and k.rpartition(".")[2] != "seed" and not _alike(k, v)}


def _alike(name: str, value: Any) -> bool:
    """Say whether a hyperparameter gives all tasks the same weight or density; records older than these lack them."""
    return name.rpartition(".")[2] in ("weights", "densities") and not value


def full(name: str) -> str:
    """Return a tuned hyperparameter's name with its group, which is ``merge`` where none is named."""
    return name if name.startswith(("merge.", "byom.")) else f"merge.{name}"


def rows(records: Iterable[Record]) -> list[Row]:
    """Group runs that differ only in their seed, in table order, and name the groups.

    Args:
        records: Finished runs of one suite and backbone.

    Returns:
        Pre-trained, single-task, merges alone, post-pruning by density, then BYOM on each merge by density.

    Raises:
        ByomError: If two records have the same settings and the same seed.
    """
    groups: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda r: (r.choices.seed, r.signature)):
        groups.setdefault(json.dumps(settings(record), sort_keys=True), []).append(record)
    for group in groups.values():
        _refuse_twins(group)
    unnamed = sorted((Row(settings(group[0]), tuple(group)) for group in groups.values()), key=lambda row: row.order)
    return told_apart(unnamed)


def _refuse_twins(group: Sequence[Record]) -> None:
    for one, two in pairwise(group):
        if one.choices.seed == two.choices.seed:
            raise ByomError(
                f"records {one.signature} and {two.signature} hold the same settings and the same seed "
                f"({one.choices.seed}); move the one that is not meant out of results/runs"
            )


def told_apart(rows: Sequence[Row]) -> list[Row]:
    """Add the settings in which rows differ to their labels, so that no two with the same density read the same."""
    twins: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        twins.setdefault((row.name, repr(row.density)), []).append(row)
    return [replace(row, apart=_difference(row, twins[row.name, repr(row.density)])) for row in rows]


def _difference(row: Row, others: Sequence[Row]) -> str:
    words = [_word(name, row.settings.get(name)) for name in _telling(_unsaid(others))]
    spelled = [text for text in words if text]
    return f" ({', '.join(spelled)})" if spelled else ""


def _unsaid(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the different settings of some rows, less the kilobytes, which every label says."""
    every = [{name: value for name, value in row.settings.items() if name != KILOBYTES} for row in rows]
    return list({repr(sorted(one.items())): one for one in every}.values())


def _telling(settings: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the fewest names of settings that tell these apart, words before numbers."""
    every = {name for one in settings for name in one}
    apart = [n for n in sorted(every) if len({repr(one.get(n)) for one in settings}) > 1]
    apart.sort(key=lambda n: any(isinstance(one.get(n), int | float) for one in settings))
    sets = (some for size in range(len(apart)) for some in combinations(apart, size))
    return next((some for some in sets if _distinct(settings, some)), tuple(apart))


def _distinct(settings: Sequence[Mapping[str, Any]], names: Sequence[str]) -> bool:
    return len({repr([one.get(n) for n in names]) for one in settings}) == len(settings)


def _word(name: str, value: Any) -> str:
    word = name.rpartition(".")[2].replace("_", " ")
    if isinstance(value, bool):
        return word if value else ""
    return "" if value is None else f"{word} {str(value).replace('_', ' ')}"

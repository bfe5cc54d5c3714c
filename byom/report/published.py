"""Published numbers: what a source printed, how sure that is, and which of our rows it is the same experiment as."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from byom.errors import OptionError
from byom.report.report import Runs, Tables
from byom.report.rows import Row

CONFIDENCE = {
    "exact": "copied from the source",
    "secondary": "from somebody's notes on the source",
    "derived": "computed from the source's own figures",
    "unverified": "not checked against the paper's PDF",
}
DAGGER = "†"
UNCHECKED = "not checked against the paper's PDF"
RELATIVE = 2e-3  # densities are printed with few digits
ROUNDING = {1: 0.06, 2: 0.011}  # of an average, by the decimals of what it is an average of
MEASURES = ("absolute", "normalised")


@dataclass(frozen=True)
class Line:
    """One published row.

    Args:
        label: As the source names it.
        match: Our settings that it corresponds to, such as ``{merge: ties, byom: none}``; None if we have none.
        values: Per cent, one per task; empty where the average alone is published.
        mean: The published average.
        parameters: The published parameter count.
        odd: What does not fit in the source itself, such as an average that is not that of the values.
        confirmed: The independent source that has the whole row; it has no dagger in an unchecked table.
        remark: What else a reader must know of the row, such as which of its values another source has.
    """

    label: str
    match: Mapping[str, Any] | None
    values: tuple[float, ...]
    mean: float
    parameters: str = ""
    odd: str = ""
    confirmed: str = ""
    remark: str = ""

    def fits(self, row: Row) -> bool:
        """Say whether one of our rows has the settings of this one."""
        return self.match is not None and all(_alike(row.settings.get(k), v) for k, v in self.match.items())

    @property
    def alone(self) -> bool:
        """True where it does not depend on which tasks are merged."""
        match = self.match or {}
        return match.get("byom") == "single_task" or match == {"merge": "pretrained", "byom": "none"}

    @property
    def decimals(self) -> tuple[int, int]:
        """With how many decimals the values and the average are printed."""
        of_values = decimals(self.values or [self.mean])
        return of_values, max(of_values, decimals([self.mean]))

    @property
    def remarks(self) -> list[str]:
        """What a reader must know of the row."""
        confirmed = f"{self.label} is confirmed: {self.confirmed}." if self.confirmed else ""
        return [text for text in (confirmed, *(f"{self.label}: {x}." for x in (self.odd, self.remark) if x)) if text]


@dataclass(frozen=True)
class Published:
    """A published table.

    Args:
        name: Its file in ``conf/published``.
        title: What was measured.
        source: Where it is printed.
        url: Of the source.
        confidence: One of `CONFIDENCE`.
        family: Whose checkpoints; numbers of two families are not interchangeable.
        what: What the values are.
        measure: What the averages are: ``absolute``, or ``normalised`` by each task's own model.
        tasks: Our names, in the order of the values.
        note: What a reader must know.
        dagger: Whether every row without a confirmation of its own must carry a dagger.
        rows: The rows.

    Raises:
        OptionError: If a row does not hold one value per task, if its average is not that of its values and nothing
            says what is odd, or if an unchecked table does not have a dagger.
    """

    name: str
    title: str
    source: str
    url: str
    confidence: str
    family: str
    what: str
    measure: str
    tasks: tuple[str, ...]
    note: str
    dagger: bool
    rows: tuple[Line, ...] = field(repr=False)

    def name_of(self, line: Line) -> str:
        """Return a row's name as printed: with a dagger if nobody checked it."""
        return line.label + DAGGER * (self.dagger and not line.confirmed)

    def __post_init__(self) -> None:
        if self.confidence not in CONFIDENCE or (self.confidence == "unverified") != self.dagger:
            raise OptionError(f"published table {self.name}: confidence {self.confidence!r}, dagger {self.dagger}")
        if self.measure not in MEASURES or (self.measure == "normalised" and any(row.values for row in self.rows)):
            raise OptionError(f"published table {self.name}: values of measure {self.measure!r} cannot be compared")
        for row in self.rows:
            self._check(row)

    def _check(self, row: Line) -> None:
        if not row.values:
            return
        if len(row.values) != len(self.tasks):
            raise OptionError(f"published table {self.name}: '{row.label}' has {len(row.values)} values")
        average = sum(row.values) / len(row.values)
        if not row.odd and abs(average - row.mean) > ROUNDING[min(2, row.decimals[0])]:
            raise OptionError(
                f"published table {self.name}: the values of '{row.label}' average {average:.3f}, not {row.mean}; "
                "correct it, or say what is odd"
            )


def decimals(values: Iterable[float]) -> int:
    """Return how many decimals the numbers were written with, at least one."""
    return max(len(repr(value).partition(".")[2]) for value in values)


def read(file: Path) -> Published:
    """Return a published table.

    Args:
        file: A yaml of ``conf/published``.

    Raises:
        OptionError: If it contradicts itself.
    """
    import yaml

    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    lines = tuple(_line(row) for row in values.pop("rows"))
    return Published(name=file.stem, **{**values, "tasks": tuple(values["tasks"])}, rows=lines)


def _line(row: Mapping[str, Any]) -> Line:
    return Line(**{**row, "values": tuple(map(float, row["values"])), "mean": float(row["mean"])})


def _alike(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, float | int) and isinstance(theirs, float | int) and not isinstance(ours, bool):
        return abs(ours - theirs) <= RELATIVE * max(abs(theirs), 1e-12)
    return ours == theirs


@dataclass(frozen=True)
class Pair:
    """A published row, and ours with the same settings.

    Args:
        line: The published row.
        row: Ours; None if we have none.
        values: Ours in per cent, by task.
        mean: Our average over the published tasks, in per cent; NaN if we have other tasks.
        label: How our tables write the row.
        apart: Why the two cannot be subtracted; empty if they can.
    """

    line: Line
    row: Row | None
    values: dict[str, float]
    mean: float
    label: str = ""
    apart: str = ""

    @property
    def gap(self) -> float:
        """Ours less the published average, in points; NaN where the two cannot be subtracted."""
        return np.nan if self.apart else self.mean - self.line.mean


def pairs(ours: Tables, table: Published) -> list[Pair]:
    """Match a published table with our runs.

    Args:
        ours: Ours.
        table: The published one.

    Returns:
        Published rows in order, one pair for each of ours that has the same settings, or one without.
    """
    out: list[Pair] = []
    for line in table.rows:
        same, apart = [n for n, row in enumerate(ours.rows) if line.fits(row)], _apart(ours.runs, table, line)
        out += [_pair(line, ours.rows[n], ours.frame.iloc[n], table, apart) for n in same]
        out += [Pair(line, None, {}, np.nan)] * (not same)
    return out


def _pair(line: Line, row: Row, measured: pd.Series, table: Published, apart: str) -> Pair:
    values = {t: 100 * float(measured.at[f"accuracy_{t}"]) for t in table.tasks if f"accuracy_{t}" in measured}
    mean = float(np.mean(list(values.values()))) if len(values) == len(table.tasks) else np.nan
    if table.measure == "normalised" and not np.isnan(mean):
        mean = 100 * float(measured.at["normalised"])
    return Pair(line, row, values if line.values else {}, mean, str(measured["method"]), apart)


def _apart(runs: Runs, table: Published, line: Line) -> str:
    if not same_family(runs, table):
        return "other checkpoints"
    return "" if line.alone or same_tasks(runs, table) else "other tasks merged"


def same_family(runs: Runs, table: Published) -> bool:
    """Say whether our experts are the checkpoints that the published numbers were measured on."""
    return runs.family == table.family


def same_tasks(runs: Runs, table: Published) -> bool:
    """Say whether we merged the tasks that the published numbers were measured on."""
    return set(runs.tasks) == set(table.tasks)

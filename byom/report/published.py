"""Published numbers: what a source printed, how sure that is, and which of our rows it is the same experiment as."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from byom.cli.config import folder, options
from byom.errors import OptionError, suggest
from byom.report.frame import Row

CONFIDENCE = {
    "exact": "copied from the source",
    "secondary": "from somebody's notes on the source",
    "derived": "computed from the source's own figures",
    "unverified": "not checked against the paper's PDF",
}
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
        values: Per cent, one a task; empty where the average alone is published.
        mean: The published average.
        parameters: The published parameter count.
        odd: What does not fit in the source itself, such as an average that is not that of the values.
    """

    label: str
    match: Mapping[str, Any] | None
    values: tuple[float, ...]
    mean: float
    parameters: str = ""
    odd: str = ""

    def fits(self, row: Row) -> bool:
        """Say whether one of our rows has the settings of this one."""
        return self.match is not None and all(_alike(row.settings.get(k), v) for k, v in self.match.items())

    @property
    def alone(self) -> bool:
        """Whether it does not depend on which tasks are merged."""
        match = self.match or {}
        return match.get("byom") == "single_task" or match == {"merge": "pretrained", "byom": "none"}

    @property
    def decimals(self) -> tuple[int, int]:
        """With how many decimals the values and the average are printed."""
        of_values = decimals(self.values or [self.mean])
        return of_values, max(of_values, decimals([self.mean]))


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
        dagger: Whether every row must carry a dagger.
        rows: The rows.

    Raises:
        OptionError: If a row does not hold one value a task, if its average is not that of its values and nothing says
            what is odd, or if a table that nobody checked has no dagger.
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


def read(name: str) -> Published:
    """Return a published table.

    Args:
        name: A file of ``conf/published``, without its ending.

    Raises:
        OptionError: If there is none of that name, or it contradicts itself.
    """
    import yaml

    if name not in options("published"):
        raise OptionError(f"there is no published table '{name}'; {suggest(name, options('published'))}")
    given = yaml.safe_load((folder() / "published" / f"{name}.yaml").read_text(encoding="utf-8"))
    lines = tuple(_line(row) for row in given.pop("rows"))
    return Published(name=name, **{**given, "tasks": tuple(given["tasks"])}, rows=lines)


def _line(given: Mapping[str, Any]) -> Line:
    return Line(**{**given, "values": tuple(map(float, given["values"])), "mean": float(given["mean"])})


def every(names: Iterable[str]) -> list[Published]:
    """Return some published tables, in order."""
    return [read(name) for name in names]


def _alike(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, float | int) and isinstance(theirs, float | int) and not isinstance(ours, bool):
        return abs(ours - theirs) <= RELATIVE * max(abs(theirs), 1e-12)
    return ours == theirs

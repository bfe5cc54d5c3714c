"""Published numbers: what a source printed, how sure that is, and which of our rows it is the same experiment as."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from byom.config import folder, options
from byom.errors import OptionError, suggest
from byom.table import Row

CONFIDENCE = {
    "exact": "copied from the source",
    "secondary": "from somebody's notes on the source",
    "derived": "computed from the source's own figures",
    "unverified": "not checked against the paper's PDF",
}
UNCHECKED = "not checked against the paper's PDF"
RELATIVE = 2e-3  # densities are printed with few digits


@dataclass(frozen=True)
class Line:
    """One published row.

    Args:
        label: As the source names it.
        match: Our settings that it corresponds to, such as ``{merge: ties, byom: none}``; None if we have none.
        values: Per cent, one a task; empty where the average alone is published.
        mean: The published average.
        parameters: The published parameter count.
        odd: What does not fit in the source itself.
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
        tasks: Our names, in the order of the values.
        note: What a reader must know.
        dagger: Whether every row must carry a dagger.
        rows: The rows.

    Raises:
        OptionError: If a row does not hold one value a task, or its average is not that of its values.
    """

    name: str
    title: str
    source: str
    url: str
    confidence: str
    family: str
    what: str
    tasks: tuple[str, ...]
    note: str
    dagger: bool
    rows: tuple[Line, ...] = field(repr=False)

    def __post_init__(self) -> None:
        if self.confidence not in CONFIDENCE or (self.confidence == "unverified") != self.dagger:
            raise OptionError(f"published table {self.name}: confidence {self.confidence!r}, dagger {self.dagger}")
        for row in self.rows:
            if row.values and len(row.values) != len(self.tasks):
                raise OptionError(f"published table {self.name}: '{row.label}' has {len(row.values)} values")
            if row.values and not row.odd and abs(sum(row.values) / len(row.values) - row.mean) > self._rounding:
                raise OptionError(
                    f"published table {self.name}: the values of '{row.label}' average "
                    f"{sum(row.values) / len(row.values):.3f}, not {row.mean}; correct it, or say what is odd"
                )

    @property
    def _rounding(self) -> float:
        """How far an average may be from that of the printed values."""
        fine = all(round(value, 1) != value for row in self.rows[:1] for value in row.values)
        return 0.011 if fine else 0.11


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
    lines = tuple(Line(**{**row, "values": tuple(map(float, row["values"]))}) for row in given.pop("rows"))
    return Published(name=name, **{**given, "tasks": tuple(given["tasks"])}, rows=lines)


def every(names: Iterable[str]) -> list[Published]:
    """Return some published tables, in order."""
    return [read(name) for name in names]


def _alike(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, float | int) and isinstance(theirs, float | int) and not isinstance(ours, bool):
        return abs(ours - theirs) <= RELATIVE * max(abs(theirs), 1e-12)
    return ours == theirs

"""Names of rows: what a reader must know to tell one from another, and no more."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from byom.report.frame import Row


def labels(found: Sequence[Row]) -> list[str]:
    """Name rows so that no two with the same density read the same, adding the settings they differ in."""
    names = [row.name for row in found]
    twins: dict[tuple[str, str], list[Row]] = {}
    for name, row in zip(names, found, strict=True):
        twins.setdefault((name, repr(row.density)), []).append(row)
    alike = [twins[name, repr(row.density)] for name, row in zip(names, found, strict=True)]
    return [name + _difference(row, same) for name, row, same in zip(names, found, alike, strict=True)]


def _difference(row: Row, others: Sequence[Row]) -> str:
    told = [_told(name, row.settings.get(name)) for name in _telling(others)]
    said = [text for text in told if text]
    return f" ({', '.join(said)})" if said else ""


def _telling(found: Sequence[Row]) -> tuple[str, ...]:
    """Return the fewest settings that tell rows apart, words before numbers."""
    every = {name for row in found for name in row.settings}
    apart = [n for n in sorted(every) if len({repr(row.settings.get(n)) for row in found}) > 1]
    apart.sort(key=lambda n: any(isinstance(row.settings.get(n), int | float) for row in found))
    sets = (some for size in range(len(apart)) for some in combinations(apart, size))
    return next((some for some in sets if _distinct(found, some)), tuple(apart))


def _distinct(found: Sequence[Row], names: Sequence[str]) -> bool:
    return len({repr([row.settings.get(n) for n in names]) for row in found}) == len(found)


def _told(name: str, value: Any) -> str:
    word = name.rpartition(".")[2].replace("_", " ")
    if isinstance(value, bool):
        return word if value else ""
    return "" if value is None else f"{word} {str(value).replace('_', ' ')}"

"""The order of a sweep's cells: what they share is made once, and early enough that the others find it."""

from __future__ import annotations

from collections.abc import Sequence

from byom.pipeline.settings import Settings
from byom.storage.signature import signature

Path = tuple[str, ...]
"""What a cell shares with others, from what takes longest to what takes least."""


def neighbours(cells: Sequence[Settings | None]) -> list[int]:
    """Return the order in which one process runs cells, so that those that share much follow one another.

    Experts come first: cells of one backbone, recipe and seed use the same. Then come the suite, whose data and encoder
    are in memory, the merged model, and the variant. Otherwise cells stay in the order in which they were given.

    Args:
        cells: The runs; None for one whose options are refused, which shares nothing.

    Returns:
        Places in `cells`.
    """
    paths = _paths(cells)
    first: dict[Path, int] = {}
    for place, path in enumerate(paths):
        for start in _starts(path):
            first.setdefault(start, place)
    return sorted(range(len(paths)), key=lambda place: [first[start] for start in _starts(paths[place])])


def spread(cells: Sequence[Settings | None]) -> list[int]:
    """Return the order in which several processes take cells, so that few wait for what another one makes.

    The first cell of every merged model comes before the further cells of any.

    Args:
        cells: See `neighbours`.

    Returns:
        Places in `cells`.
    """
    order, paths = neighbours(cells), _paths(cells)
    seen: set[Path] = set()
    makes = {place for place in order if not (paths[place][:3] in seen or seen.add(paths[place][:3]))}
    return [*(place for place in order if place in makes), *(place for place in order if place not in makes)]


def _starts(path: Path) -> list[Path]:
    return [path[:end] for end in range(1, len(path) + 1)]


def _paths(cells: Sequence[Settings | None]) -> list[Path]:
    return [_path(cell) if cell else (f"refused {place}",) for place, cell in enumerate(cells)]


def _path(cell: Settings) -> Path:
    method, tuner = cell.effective()
    experts = signature(cell.backbone, cell.finetune, cell.experts, cell.seed, cell.cache)
    merged = signature(method, tuner, cell.byom.before if cell.merges else None)
    return experts, signature(cell.suite), merged, type(cell.byom).__name__

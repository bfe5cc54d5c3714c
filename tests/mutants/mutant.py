"""One planted fault, and the line of the package that it changes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

AREAS = ("functional", "merge", "variants", "storage", "weights", "report")


class Misplaced(Exception):
    """Some mutants cannot be planted: their text is gone, or stands in more than one place."""


@dataclass(frozen=True)
class Mutant:
    """A fault that a person might make.

    Args:
        name: What is wrong then.
        area: The part of the package it is in, one of `AREAS`.
        old: A piece of source, whitespace exact, that occurs once in the whole package, wherever its file lies.
        new: What stands there instead.
        tests: Targets of pytest that are nearest, each a path that ``-k`` and an expression may follow; they come
            first, so that most mutants are found in seconds.
    """

    name: str
    area: str
    old: str
    new: str
    tests: tuple[str, ...]

    def planted(self, source: str) -> str:
        """Return the source of a file with the fault in it."""
        return source.replace(self.old, self.new)


def locate(mutants: Sequence[Mutant], package: Path) -> dict[str, Path]:
    """Find the file of every mutant.

    Args:
        mutants: The mutants.
        package: Folder of the package's sources.

    Returns:
        Name of a mutant -> file, relative to the folder above the package.

    Raises:
        Misplaced: Naming every mutant whose text does not occur exactly once.
    """
    sources = {path: path.read_text(encoding="utf-8") for path in sorted(package.rglob("*.py"))}
    found, wrong = {}, []
    for mutant in mutants:
        places = [path for path, source in sources.items() for _ in range(source.count(mutant.old))]
        if len(places) == 1:
            found[mutant.name] = places[0].relative_to(package.parent)
        else:
            wrong.append(f"{mutant.name}: its text occurs {len(places)} times{_listed(places, package)}")
    if wrong:
        raise Misplaced("\n".join(wrong))
    return found


def _listed(places: Iterable[Path], package: Path) -> str:
    names = sorted({str(path.relative_to(package.parent)) for path in places})
    return f" ({', '.join(names)})" if names else ""

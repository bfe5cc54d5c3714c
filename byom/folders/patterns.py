"""Choices of tensors by their names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from byom.errors import OptionError, listed, suggest

T = TypeVar("T")


def matches(pattern: str, name: str) -> bool:
    """Say whether a pattern means a tensor.

    Args:
        pattern: A shell-style pattern of the whole name (``*.mlp.*``), or one or more parts of it between dots
            (``lm_head``, ``layers.0``).
        name: The tensor's name.
    """
    return fnmatchcase(name, pattern) if set("*?[") & set(pattern) else f".{pattern}." in f".{name}."


def chosen(option: str, patterns: Iterable[str], names: Sequence[str]) -> list[str]:
    """Return the names that any of some patterns means.

    Args:
        option: The option that the patterns are of, for the message.
        patterns: The patterns.
        names: The names there are.

    Raises:
        OptionError: If a pattern means none of them.
    """
    patterns = list(patterns)
    for pattern in patterns:
        if not any(matches(pattern, name) for name in names):
            parts = {part for name in names for part in name.split(".") if not part.isdigit()}
            raise OptionError(f"{option}: no tensor is called '{pattern}'; {suggest(pattern, parts)}")
    return [name for name in names if any(matches(pattern, name) for pattern in patterns)]


def valued(option: str, values: Mapping[str, T], names: Sequence[str]) -> dict[str, T]:
    """Return name to the value of the first pattern that means it; names that none means are left out.

    Raises:
        OptionError: If a pattern means no name, or only names that an earlier one has taken.
    """
    found: dict[str, T] = {}
    for pattern, value in values.items():
        new = [name for name in chosen(option, [pattern], names) if name not in found]
        if not new:
            earlier = [other for other in values if other != pattern]
            raise OptionError(
                f"{option}: all that '{pattern}' means is taken by one before it ({listed(earlier)}); put it first"
            )
        found |= dict.fromkeys(new, value)
    return found


def require_whole(option: str, names: Iterable[str], ties: Mapping[str, str]) -> None:
    """Refuse a choice of one of several names of a tensor, of which the others would follow.

    Args:
        option: The option, for the message.
        names: The chosen names.
        ties: Alias to canonical name.

    Raises:
        OptionError: Naming the tied names.
    """
    given = set(names)
    for alias, name in ties.items():
        if (alias in given) != (name in given):
            raise OptionError(
                f"{option}: {alias} and {name} are one tensor of the base (tied), so both or none can be chosen"
            )

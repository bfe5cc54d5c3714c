"""Parameters that the methods for matrices treat as matrices: all with two axes, but for those named."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from byom.errors import OptionError


def patterns(name: str, given: Iterable[str]) -> tuple[str, ...]:
    """Check parameter-name patterns.

    Args:
        name: The option's name, for the message.
        given: Shell-style patterns such as ``*text_projection*``.

    Returns:
        The patterns as a tuple, so that what holds them stays hashable.

    Raises:
        OptionError: If it is one string, or holds something that is not a string.
    """
    if isinstance(given, str) or not all(isinstance(pattern, str) for pattern in given):
        raise OptionError(f"{name}={given} is not a list of patterns; write {name}=['*text_projection*']")
    return tuple(given)


def is_matrix(name: str, shape: Sequence[int], exclude: Sequence[str] = ()) -> bool:
    """Say whether the methods for matrices treat a parameter as one.

    Args:
        name: The parameter's name.
        shape: Its shape.
        exclude: Shell-style patterns (`fnmatch.fnmatchcase`) of names that are not.

    Returns:
        Whether it has two axes, both longer than 1, and its name matches no pattern.
    """
    return len(shape) == 2 and min(shape) > 1 and not any(fnmatchcase(name, pattern) for pattern in exclude)

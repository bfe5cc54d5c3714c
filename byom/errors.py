"""The one family of errors a user is meant to read: what was given, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class ByomError(Exception):
    """Base of every error whose message is a sentence for the user; the CLI prints it without a traceback."""


class OptionError(ByomError, ValueError):
    """An option or hyperparameter is unknown or out of range."""


class NothingFinished(OptionError):
    """A table was asked for, and no cell of it has finished."""


class DataError(ByomError):
    """A data set or data package is missing, altered or malformed."""


class CheckpointError(ByomError):
    """A checkpoint is missing, corrupt, or holds values that cannot be merged."""


class WeightsMismatch(CheckpointError):
    """Two sets of weights differ in names or shapes."""


def suggest(given: str, known: Iterable[str]) -> str:
    """Say which known names are nearest to `given`, and list all of them.

    Args:
        given: The name that was not found.
        known: The names that exist.

    Returns:
        A sentence fragment such as ``did you mean 'ties'? Known: average, ties``.
    """
    names = sorted(known)
    near = get_close_matches(given, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return f"{hint}Known: {', '.join(names) or 'none'}"


def fraction(name: str, value: float) -> float:
    """Return `value` if it lies in [0, 1].

    Args:
        name: The option's name, for the message.
        value: A fraction, never a percentage.

    Returns:
        The value as given.

    Raises:
        OptionError: If it lies outside [0, 1] or is not a number.
    """
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise OptionError(f"{name}={value} is not a fraction in [0, 1]; write 10 % as {name}=0.1")
    return value


def listed(names: Iterable[str], limit: int = 5) -> str:
    """Join names for a message, the first `limit` of them, and say how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) + more) or "none"

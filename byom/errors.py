"""Errors that a user is meant to read: what was given, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from math import inf
from typing import TypeVar

T = TypeVar("T")


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


def one_of(option: str, value: T, known: Iterable[T]) -> T:
    """Return `value` if it is one of the known ones.

    Args:
        option: The option's name, for the message, with its group: ``merge.scope``.
        value: What was chosen.
        known: The choices, in the order in which the message lists them.

    Returns:
        The value as given.

    Raises:
        OptionError: Listing the choices.
    """
    choices = list(known)
    if value not in choices:
        *most, last = map(str, choices)
        raise OptionError(f"{option}={value} is not known; use {', '.join(most)}{' or ' if most else ''}{last}")
    return value


def fraction(option: str, value: float, below: float | None = None) -> float:
    """Return `value` if it lies in [0, 1].

    Args:
        option: The option's name, for the message.
        value: A fraction, never a percentage.
        below: An upper bound that the value must stay under, in place of 1.

    Returns:
        The value as given.

    Raises:
        OptionError: If it lies outside [0, 1], or outside [0, below), or is not a number.
    """
    if not isinstance(value, int | float) or not 0 <= value <= 1 or (below is not None and value >= below):
        interval = "[0, 1]" if below is None else f"[0, {below})"
        raise OptionError(f"{option}={value} is not a fraction in {interval}; write 10 % as {option}=0.1")
    return value


def positive(option: str, value: float, example: str) -> float:
    """Return `value` if it is above 0 and finite.

    Args:
        option: The option's name, for the message.
        value: A number.
        example: A usual value, for the message.

    Returns:
        The value as given.

    Raises:
        OptionError: If it is 0, negative, infinite or not a number.
    """
    if not isinstance(value, int | float) or not 0 < value < inf:
        raise OptionError(f"{option}={value} is not a positive number; use for example {example}")
    return value


def at_least(option: str, value: float, least: float, example: str) -> float:
    """Return `value` if it is finite and not below `least`.

    Args:
        option: The option's name, for the message.
        value: A number.
        least: The smallest value allowed.
        example: A usual value, for the message.

    Returns:
        The value as given.

    Raises:
        OptionError: If it is smaller, infinite or not a number.
    """
    if not isinstance(value, int | float) or not least <= value < inf:
        raise OptionError(f"{option}={value} must be {least} or more, and finite; use for example {example}")
    return value


def whole(option: str, value: int, least: int) -> int:
    """Return `value` if it is an integer not below `least`.

    Args:
        option: The option's name, for the message.
        value: A number of things: steps, examples, tasks.
        least: The smallest value allowed.

    Returns:
        The value as given.

    Raises:
        OptionError: If it is smaller or not an integer.
    """
    if not isinstance(value, int) or value < least:
        raise OptionError(f"{option}={value} must be a whole number, {least} or more")
    return value


def listed(names: Iterable[str], limit: int = 5) -> str:
    """Join names for a message, the first `limit` of them, and say how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) + more) or "none"

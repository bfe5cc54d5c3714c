"""Content signatures: the name of a result is the hash of the choices that made it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SCALARS = (str, int, float, bool, type(None))
ADDED = {"added": True}
"""Metadata of a field that an option got after records of it were made; its default is what the option did before."""


def describe(value: Any) -> Any:
    """Reduce a choice to JSON: a dataclass becomes its class name and the fields that differ from the defaults.

    Fields declared with ``metadata={"signature": False}`` (places, not choices) are left out, so that moving a
    cache or adding an option that defaults to the old behaviour renames no result.

    Args:
        value: A frozen dataclass, a container of them, or a JSON scalar.

    Returns:
        A JSON value that is equal for equal choices.

    Raises:
        TypeError: If something in it has no stable description.
    """
    if type(value) in SCALARS:  # most values are, and the questions below take longer
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {"class": type(value).__name__} | {
            f.name: describe(_typed(f, value)) for f in dataclasses.fields(value) if _counts(f, value)
        }
    if isinstance(value, Mapping):
        return {str(k): describe(v) for k, v in sorted(value.items())}
    if isinstance(value, list | tuple):
        return [describe(v) for v in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no stable description; make it a frozen dataclass")


def recorded(option: Any) -> Any:
    """Return every field of an option as records hold it.

    Fields declared with ``metadata=ADDED`` are there only if they differ from the default, so that a run is one row
    with records that were made before the option had them.

    Args:
        option: A frozen dataclass.

    Returns:
        Field name to JSON value.
    """
    every = dataclasses.fields(option)
    return describe({f.name: getattr(option, f.name) for f in every if "added" not in f.metadata or _counts(f, option)})


def _counts(field: dataclasses.Field, owner: Any) -> bool:
    """Return whether a field tells its owner from one made with the defaults.

    Values are compared as they would be described: a list and a tuple of the same entries are one value, and fields of
    a nested choice that the signature ignores do not count here either.
    """
    if not field.metadata.get("signature", True):
        return False
    value = getattr(owner, field.name)
    if field.default is not dataclasses.MISSING:
        return value is not field.default and describe(value) != describe(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return describe(value) != describe(field.default_factory())
    return True


def _typed(field: dataclasses.Field, owner: Any) -> Any:
    """Return a field's value; a whole number in a field of fractions is a fraction, so that 1 and 1.0 are one value."""
    value = getattr(owner, field.name)
    fractions = field.type in (float, "float", "float | None")
    return float(value) if fractions and isinstance(value, int) and not isinstance(value, bool) else value


def signature(*choices: Any, digits: int = 12) -> str:
    """Return the SHA-256 of the described choices, shortened to `digits` hexadecimal digits.

    Args:
        choices: What determines the result, in order.
        digits: Length of the returned string.

    Returns:
        A string that is equal for equal choices on every machine and run.
    """
    text = json.dumps(describe(list(choices)), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:digits]

"""Options as JSON: dataclasses of byom's own by module, class and fields, so that a bundle can name them."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from byom.errors import CheckpointError

PLACES = ("byom.backbone.", "byom.data.source.", "byom.experts.finetune.", "byom.pipeline.router.")
"""Packages whose dataclasses are built; a bundle that names another class is refused, for it may come from anyone."""


def named(value: Any) -> Any:
    """Return a dataclass, the dataclasses in its fields included, as JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: named(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
        return {"module": type(value).__module__, "class": type(value).__name__, "fields": fields}
    if isinstance(value, Mapping):
        return {"mapping": {str(key): named(one) for key, one in value.items()}}
    if isinstance(value, tuple | list):
        return [named(one) for one in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise CheckpointError(f"a {type(value).__name__} among the options cannot be stored in a bundle: {value!r}")


def built(stored: Any, kind: type[Any], file: Any) -> Any:
    """Return the dataclass that `named` made JSON of.

    Args:
        stored: The JSON.
        kind: What it has to be an instance of.
        file: Where it was read, for the message.

    Raises:
        CheckpointError: If it is no dataclass of byom's of that kind, or this version builds it in another way.
    """
    try:
        made = _built(stored)
    except (ImportError, AttributeError, TypeError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{file} names a {kind.__name__.lower()} that this version of byom cannot build ({error}); pack the bundle "
            "again with it, or serve with the version that packed it"
        ) from error
    if not isinstance(made, kind):
        raise CheckpointError(f"{file} is damaged: {type(made).__name__} stands where a {kind.__name__} belongs")
    return made


def _built(stored: Any) -> Any:
    if isinstance(stored, list):
        return [_built(one) for one in stored]
    if not isinstance(stored, dict):
        return stored
    if "mapping" in stored:
        return {key: _built(one) for key, one in stored["mapping"].items()}
    module, name = stored["module"], stored["class"]
    if not str(module).startswith(PLACES):
        raise TypeError(f"{module}.{name} is not a class that a bundle may name")
    found = getattr(importlib.import_module(module), name)
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        raise TypeError(f"{module}.{name} is no dataclass")
    return found(**{key: _built(one) for key, one in stored["fields"].items()})

"""The command that a record came from, also where it does not hold one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from byom.cli import config
from byom.storage.record import Record

PLACES = ("device", "logger", "results", "cache")
"""Parts of a configuration that determine no score."""
WORDS = ("null", "true", "false", "nan", "inf")  # which Hydra does not read as text


def rebuilt(record: Record, results: Path) -> list[str]:
    """Return the overrides that a record was composed of.

    Records that do not hold them say which options were chosen and how all of them were configured; what differs from
    the options' defaults of today is overridden.

    Args:
        record: The record.
        results: Its results folder.
    """
    place = [] if str(results) == "results" else [f"results={results}"]
    if record.overrides:
        return [*(o for o in record.overrides if not o.startswith("results=")), *place]
    options, values = _options(record), record.config
    today = config.resolve(options).values
    differing = [
        override
        for group, value in values.items()
        if group in today and group not in PLACES and _class(value) == _class(today[group])
        for override in _differing(group, value, today[group])
    ]
    return [*options, *differing, *place]


def _options(record: Record) -> list[str]:
    choices, suite = record.choices.named, record.config.get("suite") or {}
    names = {**choices, "suite": suite.get("name", choices["suite"])}
    groups = ("suite", "backbone", "finetune", "experts", "merge", "byom", "router", "tune")
    splits = tuple((record.config.get("evaluate") or {}).get("splits") or ())
    evaluated = (name for name in config.options("evaluate") if _option("evaluate", name).splits == splits)
    options = [f"{group}={names[group]}" for group in groups if group in names]
    return [*options, *(f"evaluate={name}" for name in [*evaluated][:1]), f"seed={choices['seed']}"]


def _class(value: Any) -> str:
    """Return the name of the class that a part of a configuration makes; modules move, classes keep their names."""
    return str(value.get("_target_", "")).rpartition(".")[2] if isinstance(value, Mapping) else ""


def _differing(path: str, value: Any, today: Any) -> Iterator[str]:
    if isinstance(value, Mapping) and isinstance(today, Mapping):
        if _class(value) != _class(today):
            group = path.partition(".")[0]
            names = (name for name in config.options(group) if type(_option(group, name)).__name__ == _class(value))
            yield from (f"{group}@{path}={name}" for name in [*names][:1])
        for name in value:
            if name not in today and not _class(today):  # entries that a run added, such as a grid's
                yield f"+{path}.{name}={_literal(value[name])}"
            elif name != "_target_" and (name in today or _class(value) != _class(today)):
                yield from _differing(f"{path}.{name}", value[name], today.get(name))
    elif value != today:
        yield f"{path}={_literal(value)}"


@cache
def _option(group: str, name: str) -> Any:
    return config.option(group, name)


def _literal(value: Any) -> str:
    """Return a value as Hydra's grammar writes it."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}:{_literal(one)}" for name, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_literal, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = str(value)
    if not isinstance(value, str) or (re.fullmatch(r"[A-Za-z_][\w./-]*", text) and text.lower() not in WORDS):
        return text
    escaped = re.sub(r"(\\*)('|$)", lambda at: 2 * at[1] + ("\\'" if at[2] else ""), text)
    return f"'{escaped}'"

"""Expansion of sweeps: lines of overrides into cells, and sweeps into those in which every field has its option."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

from omegaconf import DictConfig, OmegaConf

from byom.cli.config import GROUPS
from byom.cli.overrides import quoted
from byom.cli.tree import choices, folder, parsed

Fields = Callable[[str, str], set[str] | None]
"""The fields of a group's option; None where the group lacks the option."""


def _split(overrides: list[str], group: str, values: Callable[[str], list[str]], fields: Fields) -> list[list[str]]:
    """Split a sweep over one group's options so that a field of that group reaches only those that have it.

    Args:
        overrides: Overrides of one sweep.
        group: The group.
        values: Lists the values of a swept override, ``merge=average,ties`` or ``merge=choice(average,ties)``.
        fields: See `Fields`; an option that does not exist keeps every field, to be refused by name.

    Returns:
        Overrides of one or more sweeps that together cover it; a field that no option has stays in all.
    """
    named = {o: o.partition("=")[0].removeprefix(f"{group}.") for o in overrides if o.startswith(f"{group}.")}
    swept = next((o for o in overrides if o.startswith(f"{group}=") and "," in o), None)
    if swept is None or not named:
        return [overrides]
    by_fields: dict[tuple[str, ...], list[str]] = {}
    for option in values(swept):
        known = fields(group, option)
        had = (o for o, name in named.items() if known is None or name.partition(".")[0] in known)
        by_fields.setdefault(tuple(had), []).append(option)
    unknown = [o for o in named if not any(o in had for had in by_fields)]
    rest = [o for o in overrides if o not in named and o != swept]
    return [[*rest, f"{group}={','.join(names)}", *had, *unknown] for had, names in by_fields.items()]


def fitting(overrides: Sequence[str]) -> list[list[str]]:
    """Split a sweep so that a field reaches only the options that have it.

    ``byom=none,fft byom.density=0.01,0.1`` means both densities of `fft`, and `none` once: it has no density.

    Args:
        overrides: Overrides of one sweep.

    Returns:
        Overrides of one or more sweeps that together cover it; a field that no option has stays, to be refused.
    """
    parts = [[quoted(override) for override in overrides]]
    for group in GROUPS:
        parts = [part for each in parts for part in _split(each, group, _values, _fields)]
    return parts


def _values(override: str) -> list[str]:
    return [one.partition("=")[2] for [one] in _expand([override])]


def _fields(group: str, name: str) -> set[str] | None:
    """Return an option's fields, those that hold another option included (``/merge@then: ties``)."""
    file = folder() / group / f"{name}.yaml"
    if not file.is_file():
        return None
    option: Any = OmegaConf.load(file)
    nested = [str(key) for entry in option.get("defaults", ()) if isinstance(entry, DictConfig) for key in entry]
    every = {"device"} if group == "merge" else set()
    return {str(key) for key in option} | {key.rpartition("@")[2] for key in nested} | every


def cells(rows: Sequence[str], common: Sequence[str]) -> list[list[str]]:
    """Expand sweep lines into the overrides of single runs.

    Args:
        rows: Lines such as ``merge=average,ties byom=fft byom.density=0.01,0.1``.
        common: Overrides added to every line; they may sweep as well.

    Returns:
        One list of overrides per cell, in order, without repetitions.
    """
    outer = _expand(common)  # outermost, so that neighbouring cells share their seed and its experts
    expanded = [[*shared, *cell] for shared in outer for row in rows for cell in _expand(row.split())]
    return [list(cell) for cell in dict.fromkeys(map(tuple, expanded))]


def _expand(overrides: Sequence[str]) -> list[list[str]]:
    return [list(cell) for cell in product(*map(choices, parsed(overrides)))]

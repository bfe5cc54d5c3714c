"""Sweeps: what can be said and done about their overrides without Hydra."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

Fields = Callable[[str, str], set[str] | None]
"""The fields of a group's option; None where there is no such option."""


def split(overrides: list[str], group: str, options: Callable[[str], list[str]], fields: Fields) -> list[list[str]]:
    """Split a sweep over one group's options so that a field of that group reaches only those that have it.

    Args:
        overrides: Overrides of one sweep.
        group: The group.
        options: Lists the values of a swept override, ``merge=average,ties`` or ``merge=choice(average,ties)``.
        fields: See `Fields`; an option that does not exist keeps every field, to be refused by name.

    Returns:
        Overrides of one or more sweeps that together cover it; a field that no option has stays in all.
    """
    given = {o: o.partition("=")[0].removeprefix(f"{group}.") for o in overrides if o.startswith(f"{group}.")}
    swept = next((o for o in overrides if o.startswith(f"{group}=") and "," in o), None)
    if swept is None or not given:
        return [overrides]
    by_fields: dict[tuple[str, ...], list[str]] = {}
    for option in options(swept):
        known = fields(group, option)
        had = (o for o, name in given.items() if known is None or name.partition(".")[0] in known)
        by_fields.setdefault(tuple(had), []).append(option)
    nobody = [o for o in given if not any(o in had for had in by_fields)]
    rest = [o for o in overrides if o not in given and o != swept]
    return [[*rest, f"{group}={','.join(names)}", *had, *nobody] for had, names in by_fields.items()]


def for_hydra(override: str) -> bool:
    """Return whether an override is Hydra's own, such as ``hydra/launcher=joblib`` or ``hydra.sweeper.n_trials=5``."""
    return bool(re.match(r"[+~]*hydra[./]", override))


def shared(part: int = 0) -> list[str]:
    """Return overrides that give all jobs of a sweep one folder and one name, in whatever process they run.

    Args:
        part: Which of several sweeps that were asked for together.
    """
    name = os.environ.get("BYOM_SWEEP", "unnamed")
    where = f"{name}-{part}" if part else name
    return [
        f"hydra.sweep.dir='${{results}}/scratch/multirun/{where}'",
        f"++hydra.job.env_set.BYOM_SWEEP='{name}'",
    ]


def installed(target: str) -> bool:
    """Return whether the module of a class can be imported, without importing it."""
    try:
        return importlib.util.find_spec(target.rpartition(".")[0]) is not None
    except ModuleNotFoundError:
        return False


@contextmanager
def arguments(given: Sequence[str]) -> Iterator[None]:
    """Give Hydra the command line it insists on reading itself, and let its errors reach us."""
    argv, full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [argv[0], *given]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = argv
        os.environ.pop("HYDRA_FULL_ERROR") if full is None else os.environ.update(HYDRA_FULL_ERROR=full)

"""Hydra's tree of options, overrides of it, and its errors as sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import byom
from byom.cli.overrides import quoted
from byom.cli.overrides import read as _parsed
from byom.errors import ByomError, OptionError, suggest

PLUGINS = ("hydra/launcher", "hydra/sweeper")


def folder() -> Path:
    """Return the Hydra tree: inside this package in a wheel, next to byom in a source tree."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(byom.__file__).parent.parent / "conf"


def options(group: str) -> list[str]:
    """Return the names of a group's options."""
    return sorted(path.stem for path in (folder() / group).glob("*.yaml"))


@contextmanager
def explained(overrides: Sequence[str] = (), primary: str = "run") -> Iterator[None]:
    """Turn Hydra's and OmegaConf's errors into sentences with the nearest names.

    Args:
        overrides: What is composed: a key that does not exist is compared with those of the options chosen there.
        primary: The command's primary configuration.
    """
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ or error.__context__
        if isinstance(cause, ByomError):
            raise cause from error
        raise OptionError(_sentence(error, overrides, primary)) from error


def parsed(overrides: Sequence[str]) -> list[Any]:
    """Return Hydra's view of some overrides; see `quoted`."""
    return [_parsed(quoted(override)) for override in overrides]


def choices(override: Any) -> list[str]:
    """Return the overrides that a parsed one stands for: one for each value that it sweeps over."""
    if not override.is_sweep_override():
        return [override.input_line]
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def _sentence(error: Exception, overrides: Sequence[str], primary: str) -> str:
    text = str(error)
    if match := re.search(r"Could not find '([^']+)'", text):
        group, name = _group_and_name(re.sub(r"@[\w.]+", "", match[1]))
        hint = "; others need a plugin of Hydra's (pip install 'byom[sweeps]' has ours)" if group in PLUGINS else ""
        return f"there is no {group}={name}; {suggest(name, options(group))}{hint}"
    if match := re.search(r"(?:Ambiguous value for argument|Sweep parameters) '(.*?)'(?:\n| requires)", text, re.S):
        return _several(*match[1].split("=", 1))
    if unset := _unset(text + str(error.__cause__ or error.__context__)):
        return unset
    if match := re.search(r"Key '([\w.]+)' is not in struct\s+full_key: (\S+)", text):
        return f"there is no option '{match[2]}'; byom run --cfg prints those that do"
    if match := re.search(r"Could not override '([^']+)'", text):
        return f"there is no option '{match[1]}'; {_nearest(match[1], overrides, primary)}"
    return re.sub(r"\s+", " ", text).strip()


def _unset(text: str) -> str:
    """Return a sentence on a value that is not there yet or of another kind; empty if neither is the cause."""
    if match := re.search(r"Missing mandatory value: \w+\s+full_key: (\S+)", text):
        return f"{match[1]} is not given, and has no default; add {match[1]}=VALUE"
    if match := re.search(r"Could not override '([^']+)'.*full_key: \1\.(\S+)", text, re.S):
        return f"{match[1]} has no {match[2]} yet; what is new in a mapping is added by a plus, +{match[1]}=..."
    if match := re.search(r"Error merging override ([^=]+)=(.*)", text):
        return f"{match[1]} does not take {match[2]}; byom run --cfg prints what it is by default"
    return ""


def _group_and_name(path: str) -> tuple[str, str]:
    """Return the group of a path in the tree, its longest start that has options, and the rest of it."""
    parts = path.split("/")
    ends = range(len(parts) - 1, 0, -1)
    end = next((end for end in ends if options("/".join(parts[:end]))), len(parts) - 1)
    return "/".join(parts[:end]), "/".join(parts[end:])


def _several(key: str, value: str = "") -> str:
    return (
        f"{key}={value} gives several values where one is taken: byom -m runs one cell for each; a text with a comma "
        f"needs quotes within those of the shell, \"{key}='...'\", and a list brackets, '{key}=[...]'"
    )


def _nearest(key: str, overrides: Sequence[str], primary: str) -> str:
    """Suggest keys near one that does not exist: those of the options that were chosen for its group."""
    group, _, name = key.rpartition(".")
    chosen = parsed([o for o in overrides if group and o.partition("=")[0] == group.partition(".")[0]])
    alternatives = [[choice] for override in chosen for choice in choices(override)] or [[]]
    known = {key for each in alternatives for key in _keys(group, each, primary)}
    return suggest(name, known)


def _keys(group: str, overrides: list[str], primary: str) -> set[str]:
    """Return the keys of a group in a composed configuration; none where it does not compose or has no keys."""
    try:
        with hydra.initialize_config_dir(str(folder()), version_base="1.3"):
            config = hydra.compose(primary, overrides)
    except HydraException:
        return set()
    node = OmegaConf.select(config, group) if group else config
    return {str(key) for key in node if not str(key).startswith("_")} if isinstance(node, DictConfig) else set()

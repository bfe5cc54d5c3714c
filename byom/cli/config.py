"""Configuration: composes options with Hydra, and builds plain objects of them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import hydra
from hydra.core.override_parser.types import OverrideType
from omegaconf import DictConfig, OmegaConf

from byom.cli.made import made, shared
from byom.cli.overrides import quoted
from byom.cli.tree import explained, folder, options, parsed
from byom.errors import OptionError
from byom.storage.place import at_home

if TYPE_CHECKING:
    from byom.pipeline.settings import Settings

__all__ = ["build", "compose", "folder", "made", "option", "options", "plain", "resolve", "settings", "shared"]

PLACES = ("results", "cache")
MERGING = "merge_device"  # what plain containers call ``merge.device``, which is no method's own field
ALONE = ("merge", "byom", "router", "tune", "evaluate", "finetune")  # options that depend on no other option


def compose(overrides: Sequence[str], primary: str = "run") -> DictConfig:
    """Compose a configuration.

    Args:
        overrides: Hydra overrides, for example ``merge=ties``.
        primary: The command's primary configuration.

    Returns:
        The configuration, with Hydra's own part (which options were chosen) included.

    Raises:
        OptionError: If a group, option or key does not exist.
    """
    overrides = [quoted(override) for override in overrides]
    with explained(overrides, primary), hydra.initialize_config_dir(str(folder()), version_base="1.3"):
        return hydra.compose(primary, overrides, return_hydra_config=True)


def plain(config: DictConfig) -> dict[str, Any]:
    """Resolve a configuration to plain containers, without Hydra's own part."""
    with explained():
        return _apart({str(key): _contained(config[key]) for key in config if key != "hydra"})


def _apart(values: dict[str, Any]) -> dict[str, Any]:
    """Take ``merge.device`` out of the method's own options."""
    method = values.get("merge")
    if not isinstance(method, dict) or "device" not in method:
        return values
    return values | {"merge": {k: v for k, v in method.items() if k != "device"}, MERGING: method["device"]}


def _contained(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True, throw_on_missing=True) if OmegaConf.is_config(node) else node


class Resolved(NamedTuple):
    """A configuration as plain containers."""

    values: dict[str, Any]
    """Every group and value, without Hydra's own part."""
    names: dict[str, str]
    """Group to the name of its option."""


def resolve(overrides: Sequence[str], primary: str = "run") -> Resolved:
    """Compose and resolve a configuration, reading Hydra's tree once per choice of options.

    Overrides that set a value are applied to a copy of what Hydra composed for the options alone; those that Hydra
    would refuse, or that others are interpolated from, go the whole way through Hydra.

    Args:
        overrides: Hydra overrides, for example ``merge=ties``.
        primary: The command's primary configuration.

    Returns:
        What `plain` gives for what `compose` returns, and the options' names.

    Raises:
        OptionError: If a group, option or key does not exist.
    """
    overridden = parsed(overrides)
    values = [o for o in overridden if _sets_a_value(o)]
    base = _base(tuple(o.input_line for o in overridden if o not in values), primary, folder(), _environment())
    changes = {MERGING if (key := o.key_or_group) == "merge.device" else key: o.value() for o in values}
    inside = any(key.startswith(f"{other}.") for key in changes for other in changes)
    if inside or not all(base.can_set(*change) for change in changes.items()) or not base.missing <= set(changes):
        return Resolved(plain(config := compose(overrides, primary)), _names(config))
    resolved = dict(base.resolved.values)
    for key, value in changes.items():
        _set(resolved, key.split("."), value)
    return Resolved(resolved, dict(base.resolved.names))


def _names(config: DictConfig) -> dict[str, str]:
    return {str(group): name for group, name in config.hydra.runtime.choices.items()}


def _sets_a_value(override: Any) -> bool:
    """Return whether an override changes a value of the composed tree, and nothing in how it is composed."""
    key = override.key_or_group
    simple = override.type is OverrideType.CHANGE and override.package is None and not override.is_sweep_override()
    return simple and "/" not in key and key.partition(".")[0] != "hydra" and not (folder() / key).is_dir()


def _set(values: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Set a value in nested containers, copying those on the way to it."""
    for name in path[:-1]:
        values[name] = dict(values[name])
        values = values[name]
    values[path[-1]] = value


@dataclass(frozen=True)
class _Base:
    """The configuration that Hydra composes for some options, before values are set.

    Args:
        resolved: Its plain containers, shared by all cells that start from them.
        referred: The first names of keys that something is interpolated from.
        missing: Keys that must be given a value.
    """

    resolved: Resolved
    referred: frozenset[str]
    missing: frozenset[str]

    def can_set(self, key: str, value: Any) -> bool:
        """Return whether setting a value here gives what Hydra would: it exists, and nothing refers to it."""
        path, node = key.split("."), self.resolved.values
        for name in path:
            if not isinstance(node, dict) or name not in node:
                return False
            node = node[name]
        scalars = value if isinstance(value, list) else [value]
        if path[0] in self.referred or (isinstance(node, dict) and isinstance(value, list)):
            return False
        return all(type(v) in (int, float, bool) or (type(v) is str and "$" not in v) for v in scalars)


Environment = tuple[tuple[str, str], ...]


def _environment() -> Environment:
    """Return the variables that configurations are interpolated from: with others, they are composed again."""
    return tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("BYOM_")))


@lru_cache(maxsize=256)
def _base(overrides: tuple[str, ...], primary: str, tree: Path, environment: Environment) -> _Base:
    """Return what Hydra composes: an option that nothing else depends on is composed alone and put in place."""
    if not overrides and (text := _whole(tree / f"{primary}.yaml")):
        with explained():
            return _based(OmegaConf.create({primary.partition("/")[0]: OmegaConf.create(text)}), {})
    for number, (group, _, name) in enumerate(o.partition("=") for o in overrides):
        rest = overrides[:number] + overrides[number + 1 :]
        if group in ALONE and name in options(group) and not any(o.lstrip("+~").startswith(group) for o in rest):
            base, leaf = _base(rest, primary, tree, environment), _base((), f"{group}/{name}", tree, environment)
            if group in base.resolved.values and group not in base.referred and not leaf.referred:
                return _put(leaf, group, name, base)
    config = compose(overrides, primary)
    own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    with explained():
        return _based(own, _names(config))


def _whole(file: Path) -> str:
    """Return the text of an option's file if it is all that Hydra would read: no defaults list, no other package."""
    text = file.read_text(encoding="utf-8") if file.parent.name in ALONE and file.is_file() else ""
    return "" if re.search(r"^(defaults:|#\s*@package)", text, re.M) else text


def _based(own: DictConfig, names: dict[str, str]) -> _Base:
    values: Any = _apart(cast("dict[str, Any]", OmegaConf.to_container(own, resolve=True)))
    referred = frozenset(re.findall(r"\$\{\.*(\w+)", json.dumps(OmegaConf.to_container(own))))
    return _Base(Resolved(values, names), referred, frozenset(OmegaConf.missing_keys(own)))


def _put(leaf: _Base, group: str, name: str, base: _Base) -> _Base:
    """Replace the option of a group in a configuration by one that was composed alone."""
    names = {key: one for key, one in base.resolved.names.items() if f"@{group}." not in key} | {group: name}
    names |= {key: one for key, one in leaf.resolved.names.items() if not key.startswith("hydra/")}
    missing = {key for key in base.missing if not key.startswith(f"{group}.")} | leaf.missing
    return _Base(Resolved(base.resolved.values | leaf.resolved.values, names), base.referred, frozenset(missing))


def settings(overrides: Sequence[str], primary: str = "run") -> Settings:
    """Build one run's plain objects from its overrides; below this line no code sees a configuration.

    Args:
        overrides: Hydra overrides, for example ``merge=ties``.
        primary: The command's primary configuration.

    Returns:
        The run's settings.

    Raises:
        OptionError: If an option does not exist, or a value is refused by what it configures.
    """
    return build(*resolve(overrides, primary), overrides)


def build(values: Mapping[str, Any], names: Mapping[str, str], overrides: Sequence[str]) -> Settings:
    """Build one run's plain objects from a resolved configuration.

    Args:
        values: What `resolve` or `plain` returned.
        names: Group to option name.
        overrides: What it was composed of, for the record.

    Returns:
        The run's settings.

    Raises:
        OptionError: If a value is refused by what it configures.
    """
    from byom.pipeline.settings import Settings

    if gone := [name for name in (*BUILT, *PLACES, "seed", "device") if values.get(name, {}) == {}]:
        raise OptionError(f"~{gone[0]} leaves no {gone[0]}, which every run has; give another value instead")
    groups: dict[str, Any] = {group: made(values[group]) for group in BUILT}
    groups["suite"] = groups["suite"].available()
    chosen = {group: names[group] for group in GROUPS if group not in ("logger", "evaluate")}
    places: dict[str, Any] = {key: _place(key, values[key]) for key in PLACES}
    rest = {key: values[key] for key in ("seed", "device")} | {"note": values.get("note", "")}
    rest |= {"precision": values["precision"]} if "precision" in values else {}
    rest |= {MERGING: values.get(MERGING, "auto")}
    resolved = {key: value for key, value in values.items() if key != MERGING}
    return Settings(**groups, **places, **rest, names=chosen, resolved=resolved, overrides=tuple(overrides))


def _place(key: str, value: Any) -> Path:
    if not isinstance(value, str) or not value:
        raise OptionError(f"{key}={'' if value == '' else value} is no folder; write a path, for example {key}=./NAME")
    return at_home(value)


def option(group: str, name: str) -> Any:
    """Build one option with its defaults, nested options included.

    Args:
        group: A group, for example ``merge``.
        name: One of its options.

    Returns:
        What the option configures.
    """
    return made(resolve([f"{group}={name}"]).values[group])


GROUPS = ("suite", "backbone", "finetune", "experts", "merge", "byom", "router", "tune", "evaluate", "logger")
BUILT = (*GROUPS, "statistics")

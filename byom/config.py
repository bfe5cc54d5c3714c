"""Configuration: the only module that knows Hydra. Composes options, builds plain objects, explains mistakes."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from byom.errors import ByomError, OptionError, suggest

PLACES = ("results", "cache")


def folder() -> Path:
    """Return the Hydra tree: inside the package in a wheel, beside it in a source tree."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "conf"


def options(group: str) -> list[str]:
    """Return the names of a group's options."""
    return sorted(path.stem for path in (folder() / group).glob("*.yaml"))


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
    with explained(), hydra.initialize_config_dir(str(folder()), version_base="1.3"):
        return hydra.compose(primary, list(overrides), return_hydra_config=True)


def plain(config: DictConfig) -> dict[str, Any]:
    """Resolve a configuration to plain containers, without Hydra's own part."""
    with explained():
        bare = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
        resolved = OmegaConf.to_container(bare, resolve=True, throw_on_missing=True)
    return dict(resolved)  # pyright: ignore


def build(config: DictConfig, names: Mapping[str, str] | None = None) -> Any:
    """Build one run's plain objects; below this line nobody sees a DictConfig.

    Args:
        config: What `compose` returned, or what Hydra passed to a job.
        names: Group to option name; None reads them from the configuration.

    Returns:
        `byom.run.Settings`.

    Raises:
        OptionError: If a value is refused by what it configures.
    """
    from byom.run import Settings

    with explained():
        names = names or dict(config.hydra.runtime.choices)
        resolved = plain(config)
        groups: dict[str, Any] = {group: instantiate(config[group], _convert_="all") for group in BUILT}
    groups["suite"] = groups["suite"].available()
    chosen = {group: names[group] for group in GROUPS if group not in ("logger", "evaluate")}
    places: dict[str, Any] = {key: Path(resolved[key]).expanduser() for key in PLACES}
    rest = {key: resolved[key] for key in ("seed", "device", "note")}
    return Settings(**groups, **places, **rest, names=chosen, resolved=resolved)


def option(group: str, name: str) -> Any:
    """Build one option with its defaults, nested options included.

    Args:
        group: A group, for example ``merge``.
        name: One of its options.

    Returns:
        What the option configures.
    """
    config = compose([f"{group}={name}"])
    with explained():
        return instantiate(config[group], _convert_="all")


GROUPS = ("suite", "backbone", "finetune", "experts", "merge", "byom", "router", "tune", "evaluate", "logger")
BUILT = (*GROUPS, "statistics")


def multirun(overrides: Sequence[str], job: Callable[[Any], float]) -> None:
    """Run a sweep through Hydra's own sweeper and launcher.

    Args:
        overrides: Hydra overrides with comma-separated or other sweeps.
        job: Runs one cell's settings and returns its metric; a failing job fails the sweep after the others ran.
    """

    def task(config: DictConfig) -> float:
        return job(build(config, HydraConfig.get().runtime.choices))

    for sweep in fitting(overrides):
        with explained(), _arguments(["-m", *sweep]):
            hydra.main(config_path=str(folder()), config_name="run", version_base="1.3")(task)()


def fitting(overrides: Sequence[str]) -> list[list[str]]:
    """Split a sweep so that a field reaches only the options that have it.

    ``byom=none,fft byom.density=0.01,0.1`` means both densities of `fft`, and `none` once: it has no density.

    Args:
        overrides: Overrides of one sweep.

    Returns:
        Overrides of one or more sweeps that together cover it; a field that no option has stays, to be refused.
    """
    sweeps = [list(overrides)]
    for group in GROUPS:
        sweeps = [part for sweep in sweeps for part in _split(sweep, group)]
    return sweeps


def _split(overrides: list[str], group: str) -> list[list[str]]:
    fields = {o: o.partition("=")[0].removeprefix(f"{group}.") for o in overrides if o.startswith(f"{group}.")}
    swept = next((o for o in overrides if o.startswith(f"{group}=") and "," in o), None)
    if swept is None or not fields:
        return [overrides]
    by_fields: dict[tuple[str, ...], list[str]] = {}
    for option in swept.partition("=")[2].split(","):
        by_fields.setdefault(tuple(o for o, name in fields.items() if _has(group, option, name)), []).append(option)
    nobody = [o for o in fields if not any(o in had for had in by_fields)]
    rest = [o for o in overrides if o not in fields and o != swept]
    return [[*rest, f"{group}={','.join(names)}", *had, *nobody] for had, names in by_fields.items()]


def _has(group: str, option: str, name: str) -> bool:
    file = folder() / group / f"{option}.yaml"
    return not file.is_file() or name.split(".", maxsplit=1)[0] in _fields(OmegaConf.load(file))


def _fields(option: Any) -> set[str]:
    """Return an option's fields, those that hold another option included (``/merge@then: ties``)."""
    nested = [str(key) for entry in option.get("defaults", ()) if isinstance(entry, DictConfig) for key in entry]
    return {str(key) for key in option} | {key.rpartition("@")[2] for key in nested}


@contextmanager
def _arguments(arguments: Sequence[str]) -> Iterator[None]:
    """Give Hydra the command line it insists on reading itself, and let its errors reach us."""
    argv, full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [argv[0], *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = argv
        os.environ.pop("HYDRA_FULL_ERROR") if full is None else os.environ.update(HYDRA_FULL_ERROR=full)


def cells(rows: Sequence[str], common: Sequence[str]) -> list[list[str]]:
    """Expand sweep lines into the overrides of single runs.

    Args:
        rows: Lines such as ``merge=average,ties byom=fft byom.density=0.01,0.1``.
        common: Overrides added to every line; they may sweep as well.

    Returns:
        One list of overrides a cell, in order, without repetitions.
    """
    outer = _expand(common)  # outermost, so that neighbouring cells share their seed and its experts
    expanded = [[*shared, *cell] for shared in outer for row in rows for cell in _expand(row.split())]
    return [list(cell) for cell in dict.fromkeys(map(tuple, expanded))]


@contextmanager
def explained() -> Iterator[None]:
    """Turn Hydra's and OmegaConf's errors into sentences with the nearest names."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ or error.__context__
        if isinstance(cause, ByomError):
            raise cause from error
        raise OptionError(_sentence(error)) from error


def _expand(overrides: Sequence[str]) -> list[list[str]]:
    with explained():
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    return [list(cell) for cell in product(*map(_choices, parsed))]


def _choices(override: Any) -> list[str]:
    if not override.is_sweep_override():
        return [override.input_line]
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def _sentence(error: Exception) -> str:
    text = str(error)
    if match := re.search(r"Could not find '([\w@]+)/([^']+)'", text):
        group, given = match.groups()
        return f"there is no {group}={given}; {suggest(given, options(group.split('@')[0]))}"
    if match := re.search(r"Key '([\w.]+)' is not in struct\s+full_key: (\S+)", text):
        return f"there is no option '{match[2]}'; byom run --cfg prints those that do"
    if match := re.search(r"Could not override '([^']+)'", text):
        return f"there is no option '{match[1]}'; {_nearest(match[1])}"
    return re.sub(r"\s+", " ", text).strip()


def _nearest(key: str) -> str:
    """Suggest keys near one that does not exist, from the default configuration."""
    group, _, name = key.rpartition(".")
    with hydra.initialize_config_dir(str(folder()), version_base="1.3"):
        default = hydra.compose("run")
    known = OmegaConf.select(default, group) if group else default
    keys = [str(k) for k in known if not str(k).startswith("_")] if isinstance(known, DictConfig) else GROUPS
    return suggest(name, keys)

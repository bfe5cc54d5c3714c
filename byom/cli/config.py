"""Configuration: the only module that knows Hydra. Composes options, builds plain objects, explains mistakes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import hydra
from hydra._internal.callbacks import Callbacks
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import byom
from byom.cli import sweeps
from byom.errors import ByomError, OptionError, suggest

if TYPE_CHECKING:
    from byom.pipeline.run import Settings

PLACES = ("results", "cache")
HYDRAS_OWN = {"_args_", "_convert_", "_partial_", "_recursive_"}


def folder() -> Path:
    """Return the Hydra tree: inside this package in a wheel, next to byom in a source tree."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(byom.__file__).parent.parent / "conf"


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
        return {str(key): _contained(config[key]) for key in config if key != "hydra"}


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

    Overrides that set a value, such as ``merge.scale=0.3``, are applied to a copy of what Hydra composed for the
    options alone; those that Hydra would refuse, or that others are interpolated from, go the whole way through Hydra.

    Args:
        overrides: Hydra overrides, for example ``merge=ties``.
        primary: The command's primary configuration.

    Returns:
        What `plain` gives for what `compose` returns, and the options' names.

    Raises:
        OptionError: If a group, option or key does not exist.
    """
    parsed = _parsed(overrides)
    values = [o for o in parsed if _sets_a_value(o)]
    base = _base(tuple(o.input_line for o in parsed if o not in values), primary, folder())
    given = {o.key_or_group: o.value() for o in values}
    if not all(base.can_set(key, value) for key, value in given.items()) or not base.missing <= set(given):
        config = compose(overrides, primary)
        return Resolved(plain(config), _names(config))
    resolved = dict(base.resolved.values)
    for key, value in given.items():
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
    """What Hydra composes for some options, before values are set.

    Args:
        resolved: Its plain containers, shared by all cells that start from them.
        referred: The first names of keys that something is interpolated from.
        missing: Keys that must be given a value.
    """

    resolved: Resolved
    referred: frozenset[str]
    missing: frozenset[str]

    def can_set(self, key: str, value: Any) -> bool:
        """Return whether setting a value here gives what Hydra would: it exists, is a leaf, and stands alone."""
        path, node = key.split("."), self.resolved.values
        for name in path:
            if not isinstance(node, dict) or name not in node:
                return False
            node = node[name]
        scalars = value if isinstance(value, list) else [value]
        alone = path[0] not in self.referred and not isinstance(node, dict)
        return alone and all(type(v) in (int, float, bool) or (type(v) is str and "$" not in v) for v in scalars)


@lru_cache(maxsize=64)
def _base(overrides: tuple[str, ...], primary: str, tree: Path) -> _Base:
    del tree  # the key of the cache: another tree is another configuration
    config = compose(overrides, primary)
    own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    with explained():
        values: Any = OmegaConf.to_container(own, resolve=True)
    referred = frozenset(re.findall(r"\$\{\.*(\w+)", json.dumps(OmegaConf.to_container(own))))
    return _Base(Resolved(values, _names(config)), referred, frozenset(OmegaConf.missing_keys(own)))


def settings(overrides: Sequence[str], primary: str = "run") -> Settings:
    """Build one run's plain objects from its overrides; below this line nobody sees a configuration.

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
    from byom.pipeline.run import Settings

    groups: dict[str, Any] = {group: made(values[group]) for group in BUILT}
    groups["suite"] = groups["suite"].available()
    chosen = {group: names[group] for group in GROUPS if group not in ("logger", "evaluate")}
    places: dict[str, Any] = {key: Path(values[key]).expanduser() for key in PLACES}
    rest = {key: values[key] for key in ("seed", "device")} | {"note": values.get("note", "")}
    return Settings(**groups, **places, **rest, names=chosen, resolved=dict(values), overrides=tuple(overrides))


def made(node: Any) -> Any:
    """Build what a resolved configuration configures: a call of each ``_target_``, innermost first.

    Hydra's `instantiate` gives the same and copies every container once per level, which is seconds for a large suite.

    Raises:
        OptionError: If a target cannot be imported or called with these values.
    """
    if isinstance(node, list):
        return [made(value) for value in node]
    if not isinstance(node, dict):
        return node
    if "_target_" not in node:
        return {name: made(value) for name, value in node.items()}
    with explained():
        if HYDRAS_OWN & set(node):
            return instantiate(node, _convert_="all")
        target = get_object(node["_target_"])
    values = {name: made(value) for name, value in node.items() if name != "_target_"}
    try:
        return target(**values)
    except TypeError as error:
        raise OptionError(f"{node['_target_']} cannot be made of {sorted(values)}: {error}") from error


def option(group: str, name: str) -> Any:
    """Build one option with its defaults, nested options included.

    Args:
        group: A group, for example ``merge``.
        name: One of its options.

    Returns:
        What the option configures.
    """
    with explained():
        node = _contained(compose([f"{group}={name}"])[group])
    return made(node)


PLUGINS = ("hydra/launcher", "hydra/sweeper")
GROUPS = ("suite", "backbone", "finetune", "experts", "merge", "byom", "router", "tune", "evaluate", "logger")
BUILT = (*GROUPS, "statistics")


def multirun(overrides: Sequence[str], job: Callable[[Any], float]) -> list[Path]:
    """Run a sweep through Hydra's own sweeper and launcher.

    Args:
        overrides: Hydra overrides with comma-separated or other sweeps.
        job: Runs one cell's settings and returns its metric; a failing job fails the sweep after the others ran.

    Returns:
        The results of every sweeper that searches, such as Optuna; none where all combinations ran.

    Raises:
        OptionError: If a launcher or sweeper is not installed, or one that searches would see the test score.
    """
    _require_plugins(overrides)
    found: list[Path] = []
    for number, sweep in enumerate(fitting(overrides)):
        arguments = [*sweeps.shared(number), *sweep]
        with explained(), sweeps.arguments(["-m", *arguments]):
            hydra.main(config_path=str(folder()), config_name="run", version_base="1.3")(_task(job))()
        found += _searched(arguments)
    return found


def launch(cells: Sequence[Sequence[str]], job: Callable[[Any], float], overrides: Sequence[str]) -> list[Any]:
    """Run cells, which need not have anything in common, through one of Hydra's launchers.

    Args:
        cells: Overrides of single runs.
        job: Runs one cell's settings; other processes must be able to import it.
        overrides: Hydra's own, for example ``hydra/launcher=joblib``.

    Returns:
        What each cell raised, or None.

    Raises:
        OptionError: If the launcher is not installed.
    """
    _require_plugins(overrides)
    # the launcher's logs go below the cells' results; the bars of many processes would write over one another
    own = [*sweeps.shared(), "++hydra.job.env_set.TQDM_DISABLE='1'", *(o for o in cells[0] if o.startswith("results="))]
    with explained(), hydra.initialize_config_dir(str(folder()), version_base="1.3"):
        core: Any = GlobalHydra.instance().hydra
        config = core.compose_config("run", [*own, *overrides], RunMode.MULTIRUN, with_log_configuration=False)
        context = HydraContext(core.config_loader, Callbacks(config))
        launcher = Plugins.instance().instantiate_launcher(context, _task(job), config)
        return [_raised(done) for done in launcher.launch(cells, initial_job_idx=0)]


def _require_plugins(overrides: Sequence[str]) -> None:
    """Refuse a launcher or sweeper that is not installed, and let our presets stand for those that are."""
    Plugins.instance()  # they store their own configurations, which Hydra would mix with presets of the same name
    stored = ConfigStore.instance().repo["hydra"]
    for group in PLUGINS:
        for name in options(group):
            stored[group.partition("/")[2]].pop(f"{name}.yaml", None)
            target = OmegaConf.select(OmegaConf.load(folder() / group / f"{name}.yaml"), "_target_")
            if f"{group}={name}" in overrides and not sweeps.installed(target):
                raise OptionError(f"{group}={name} needs a package that is not installed: pip install 'byom[sweeps]'")


def _task(job: Callable[[Any], float]) -> Callable[[DictConfig], float]:
    def task(config: DictConfig) -> float:
        own = HydraConfig.get()
        choices = own.runtime.choices
        cell = build(plain(config), choices, own.overrides.task)
        if choices["hydra/sweeper"] != "basic" and "validation" not in cell.evaluate.splits:
            raise OptionError("a search must not see the test score: use evaluate=validation (or both)")
        return job(cell)

    return task


def _searched(arguments: Sequence[str]) -> list[Path]:
    asked = compose([o for o in arguments if sweeps.for_hydra(o) or o.startswith("results=")])
    file = Path(asked.hydra.sweep.dir) / "optimization_results.yaml"
    return [file] if asked.hydra.runtime.choices["hydra/sweeper"] != "basic" and file.is_file() else []


def _raised(done: JobReturn) -> Exception | None:
    try:
        done.return_value  # noqa: B018 - raises what the job raised
    except Exception as error:
        return error
    return None


def fitting(overrides: Sequence[str]) -> list[list[str]]:
    """Split a sweep so that a field reaches only the options that have it.

    ``byom=none,fft byom.density=0.01,0.1`` means both densities of `fft`, and `none` once: it has no density.

    Args:
        overrides: Overrides of one sweep.

    Returns:
        Overrides of one or more sweeps that together cover it; a field that no option has stays, to be refused.
    """
    found = [list(overrides)]
    for group in GROUPS:
        parts = [sweeps.split(each, group, _values, _fields) for each in found]
        found = [part for some in parts for part in some]
    return found


def _values(override: str) -> list[str]:
    return [one.partition("=")[2] for [one] in _expand([override])]


def _fields(group: str, name: str) -> set[str] | None:
    """Return an option's fields, those that hold another option included (``/merge@then: ties``)."""
    file = folder() / group / f"{name}.yaml"
    if not file.is_file():
        return None
    option: Any = OmegaConf.load(file)
    nested = [str(key) for entry in option.get("defaults", ()) if isinstance(entry, DictConfig) for key in entry]
    return {str(key) for key in option} | {key.rpartition("@")[2] for key in nested}


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
    return [list(cell) for cell in product(*map(_choices, _parsed(overrides)))]


def _parsed(overrides: Sequence[str]) -> list[Any]:
    with explained():
        return OverridesParser.create().parse_overrides(list(overrides))


def _choices(override: Any) -> list[str]:
    if not override.is_sweep_override():
        return [override.input_line]
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def _sentence(error: Exception) -> str:
    text = str(error)
    if match := re.search(r"Could not find '([\w@/]+)/([^'/]+)'", text):
        group, given = match.groups()
        hint = "; others need a plugin of Hydra's (pip install 'byom[sweeps]' has ours)" if group in PLUGINS else ""
        return f"there is no {group}={given}; {suggest(given, options(group.split('@')[0]))}{hint}"
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

"""Configuration: the only module that knows Hydra. Composes options, builds plain objects, explains mistakes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.callbacks import Callbacks
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from byom import sweeps
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
    rest = {key: resolved[key] for key in ("seed", "device")} | {"note": resolved.get("note", "")}
    return Settings(**groups, **places, **rest, names=chosen, resolved=resolved)


def made(config: DictConfig, group: str) -> Any:
    """Build what one group of a configuration configures, and nothing else of it."""
    with explained():
        return instantiate(config[group], _convert_="all")


def option(group: str, name: str) -> Any:
    """Build one option with its defaults, nested options included.

    Args:
        group: A group, for example ``merge``.
        name: One of its options.

    Returns:
        What the option configures.
    """
    return made(compose([f"{group}={name}"]), group)


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
        choices = HydraConfig.get().runtime.choices
        settings = build(config, choices)
        if choices["hydra/sweeper"] != "basic" and "validation" not in settings.evaluate.splits:
            raise OptionError("a search must not see the test score: use evaluate=validation (or both)")
        return job(settings)

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
    with explained():
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    return [list(cell) for cell in product(*map(_choices, parsed))]


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

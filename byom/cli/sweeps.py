"""Sweeps: experiments of several cells, and cells run through Hydra's launchers and sweepers."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import hydra
from hydra._internal.callbacks import Callbacks
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf

from byom.cli import failures
from byom.cli.config import build, compose, plain, resolve
from byom.cli.expand import cells, fitting
from byom.cli.parent import COMMAND, end_with
from byom.cli.tree import PLUGINS, explained, folder, options
from byom.errors import OptionError, suggest
from byom.storage.place import at_home, require_writable

if TYPE_CHECKING:
    from byom.pipeline.settings import Settings

Job = Callable[["Settings"], float]
"""Runs one cell and returns its metric."""


class Experiment(NamedTuple):
    """An experiment: its cells, and the published tables that stand next to its own."""

    rows: list[str]
    """Sweep lines."""
    common: list[str]
    """Overrides of every line; they may sweep as well."""
    published: list[str]

    def cells(self, extra: Sequence[str] = ()) -> list[list[str]]:
        """Return the overrides of every cell, with further ones for all of them."""
        return cells(self.rows, [*self.common, *extra])


def experiment(name: str) -> Experiment:
    """Read an experiment.

    Args:
        name: An option of ``conf/experiment``.

    Raises:
        OptionError: If it does not exist.
    """
    if name not in (known := options("experiment")):
        raise OptionError(f"there is no experiment={name}; {suggest(name, known)}")
    values = resolve([f"experiment={name}"], "table").values["experiment"]
    return Experiment(list(values["rows"]), list(values["common"]), list(values.get("published") or ()))


def for_hydra(override: str) -> bool:
    """Return whether an override is Hydra's own, such as ``hydra/launcher=joblib`` or ``hydra.sweeper.n_trials=5``."""
    return bool(re.match(r"[+~]*hydra[./]", override))


def combines(overrides: Sequence[str]) -> bool:
    """Return whether the cells of a sweep are all combinations of its options, whatever launcher runs them."""
    own = [override for override in overrides if for_hydra(override)]
    launcher = all(re.match(r"(hydra/launcher=|[+]*hydra\.launcher\.)", override) for override in own)
    return launcher and not any("${hydra:" in override for override in overrides)


def product(overrides: Sequence[str]) -> list[list[str]]:
    """Return the cells of a sweep: all combinations of its options, each field with the options that have it.

    Args:
        overrides: Overrides of one sweep, without Hydra's own.
    """
    every = [cell for part in fitting(overrides) for cell in cells([""], part)]
    return [list(cell) for cell in dict.fromkeys(map(tuple, every))]


def name_sweep() -> None:
    """Give all jobs of this sweep one group name; the environment reaches the launchers' processes."""
    os.environ.setdefault("BYOM_SWEEP", time.strftime("%Y%m%d-%H%M%S"))


def shared(part: int = 0) -> list[str]:
    """Return overrides that give all jobs of a sweep one folder and one name, in whatever process they run.

    Args:
        part: The number of this sweep among several that were given together.
    """
    name = os.environ.get("BYOM_SWEEP", "unnamed")
    where = f"{name}-{part}" if part else name
    return [
        f"hydra.sweep.dir='${{results}}/scratch/multirun/{where}'",
        f"++hydra.job.env_set.BYOM_SWEEP='{name}'",
        f"++hydra.job.env_set.{COMMAND}='{os.getpid()}'",
    ]


def installed(target: str) -> bool:
    """Return whether the module of a class can be imported, without importing it."""
    try:
        return importlib.util.find_spec(target.rpartition(".")[0]) is not None
    except ModuleNotFoundError:
        return False


@contextmanager
def command_line(arguments: Sequence[str]) -> Iterator[None]:
    """Give Hydra the command line it insists on reading itself, and let its errors reach us."""
    argv, full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [argv[0], *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = argv
        os.environ.pop("HYDRA_FULL_ERROR") if full is None else os.environ.update(HYDRA_FULL_ERROR=full)


def multirun(overrides: Sequence[str], job: Job) -> list[Path]:
    """Run a sweep through Hydra's own sweeper and launcher.

    Args:
        overrides: Hydra overrides, with sweeps such as ``merge=average,ties`` or ``choice(...)``.
        job: Runs one cell's settings and returns its metric; failing jobs fail the sweep after the others ran.

    Returns:
        The results of every sweeper that searches, such as Optuna; none where all combinations ran.

    Raises:
        OptionError: If a launcher or sweeper is not installed, or one that searches would see the test score.
        ByomError: If several jobs failed, naming all of them.
    """
    _require_plugins(overrides)
    results: list[Path] = []
    failed: list[tuple[list[str], Exception]] = []
    first: Exception | None = None
    for number, sweep in enumerate(fitting(overrides)):
        arguments = [*shared(number), *map(_at_home, sweep)]
        place = _sweep(arguments)
        require_writable(place, "the sweep", "set results= to a writable folder")
        failures.forget(place)
        try:
            with explained(sweep), command_line(["-m", *arguments]):
                hydra.main(config_path=str(folder()), config_name="run", version_base="1.3")(_task(job))()
        except Exception as error:
            if not (here := failures.kept(place)):  # it is the sweep that cannot be had, not one of its jobs
                raise
            failed, first = failed + here, first or error
            continue
        results += _searched(arguments)
    if first is not None:
        raise (failures.said(failed) if len(failed) > 1 else first) from first
    return results


def launch(
    cells: Sequence[Sequence[str]], job: Job, overrides: Sequence[str], densities: Sequence[float] = ()
) -> list[Exception | None]:
    """Run cells, which need not have anything in common, through one of Hydra's launchers.

    Args:
        cells: Overrides of single runs.
        job: Runs one cell's settings; other processes must be able to import it.
        overrides: Hydra's own, for example ``hydra/launcher=joblib``.
        densities: Those of all cells, whose cuts a job finds in one pass for the others; see `byom.weights.cuts`.

    Returns:
        What each cell raised, or None.

    Raises:
        OptionError: If the launcher is not installed.
    """
    from byom.pipeline.run import DENSITIES

    _require_plugins(overrides)
    # the launcher's logs go below the cells' results; the bars of many processes would write over one another
    own = [
        *shared(),
        "++hydra.job.env_set.TQDM_DISABLE='1'",
        f"++hydra.job.env_set.{DENSITIES}='{' '.join(map(repr, densities))}'",
        *(_at_home(o) for o in cells[0] if o.startswith("results=")),
    ]
    with explained(), hydra.initialize_config_dir(str(folder()), version_base="1.3"):
        core: Any = GlobalHydra.instance().hydra
        config = core.compose_config("run", [*own, *overrides], RunMode.MULTIRUN, with_log_configuration=False)
        context = HydraContext(core.config_loader, Callbacks(config))  # it needs one, and no public name makes any
        launcher = Plugins.instance().instantiate_launcher(context, _task(job), config)
        return [_raised(done) for done in launcher.launch(cells, initial_job_idx=0)]


def _require_plugins(overrides: Sequence[str]) -> None:
    """Refuse a launcher or sweeper that is not installed.

    Raises:
        OptionError: Naming the extra that brings it.
    """
    _prefer_presets()
    for group in PLUGINS:
        for name in options(group):
            target = OmegaConf.select(OmegaConf.load(folder() / group / f"{name}.yaml"), "_target_")
            if f"{group}={name}" in overrides and not installed(target):
                raise OptionError(f"{group}={name} needs a package that is not installed: pip install 'byom[sweeps]'")


@cache
def _prefer_presets() -> None:
    """Let our presets of launchers and sweepers stand for those that the plugins store, once per process.

    Plugins put their configurations into Hydra's store when they are loaded, and Hydra merges a stored configuration
    with a file of the same name; it has no option for one to replace the other, so the stored one is taken out.
    """
    Plugins.instance()
    stored = ConfigStore.instance().repo["hydra"]
    for group in PLUGINS:
        for name in options(group):
            stored[group.partition("/")[2]].pop(f"{name}.yaml", None)


def _task(job: Job) -> Callable[[DictConfig], float]:
    def task(config: DictConfig) -> float:
        own = HydraConfig.get()
        names = own.runtime.choices
        cell = build(plain(config), names, own.overrides.task)
        if names["hydra/sweeper"] != "basic" and "validation" not in cell.evaluate.splits:
            raise OptionError("a search must not see the test score: use evaluate=validation (or both)")
        return job(cell)

    def kept(config: DictConfig) -> float:
        end_with(os.environ.get(COMMAND, ""))
        try:
            return task(config)
        except Exception as error:
            own = HydraConfig.get()
            failures.keep(Path(own.sweep.dir), own.job.num, own.overrides.task, error)
            raise

    return kept


def _at_home(override: str) -> str:
    """Expand ``~`` in where results go: Hydra makes its own folder there, which would be one that is called ``~``."""
    place = re.fullmatch(r"(results=)(['\"]?)(~.*)\2", override)
    return f"{place[1]}{place[2]}{at_home(place[3])}{place[2]}" if place else override


def _sweep(arguments: Sequence[str]) -> Path:
    """Return the folder of a sweep."""
    return Path(_own(arguments).sweep.dir)


def _own(arguments: Sequence[str]) -> Any:
    return compose([o for o in arguments if for_hydra(o) or o.startswith("results=")]).hydra


def _searched(arguments: Sequence[str]) -> list[Path]:
    file = _sweep(arguments) / "optimization_results.yaml"
    return [file] if _own(arguments).runtime.choices["hydra/sweeper"] != "basic" and file.is_file() else []


def _raised(done: JobReturn) -> Exception | None:
    try:
        done.return_value  # noqa: B018 - raises what the job raised
    except Exception as error:
        return error
    return None

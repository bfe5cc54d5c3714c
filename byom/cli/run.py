"""``byom run`` and ``byom -m``: one cell, or a sweep; and one cell from Python, ``byom.run([...])``."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byom.cli import config, sweeps
from byom.experts.finetune.processes import led

if TYPE_CHECKING:
    from byom.pipeline.labs import Labs
    from byom.pipeline.settings import Settings


def run(overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Run one cell, or return its record if it has finished before; calls that agree in their experts share them.

    Args:
        overrides: Options as on the command line, for example ``["merge=ties", "byom=fft", "byom.density=0.1"]``.

    Returns:
        The record, which also lies below ``results=``.

    Raises:
        ByomError: If an option does not exist or is refused, or data or weights cannot be had.
    """
    from byom.pipeline.run import run as run_cell

    return run_cell(config.settings(list(overrides)), keeper())


@led
def command(arguments: Sequence[str]) -> int:
    """Run one cell, or print the configuration that would run (``--cfg``)."""
    overrides = [a for a in arguments if a != "--cfg"]
    if "--cfg" in arguments:
        return print_config(config.resolve(overrides).values)
    with keeper():
        job(config.settings(overrides))
    return 0


@led
def sweep(arguments: Sequence[str]) -> int:
    """Run a Hydra multirun; every job returns its metric to the sweeper."""
    name_sweep()
    with keeper():
        for file in sweeps.multirun(arguments, job):
            _print_best(file)
    return 0


def job(settings: Settings) -> float:
    """Run one cell and return its metric; launchers import this function in their own processes."""
    from byom.pipeline.run import metric
    from byom.pipeline.run import run as run_cell

    return metric(run_cell(settings, keeper()))


@cache
def keeper() -> Labs:
    """Return the keeper of this process's lab, which the commands close when they end.

    It is the only object that outlives a call. A launcher hands jobs to a worker process one by one, each pickled on
    its own, so they can share a lab only through something that belongs to a module.
    """
    from byom.pipeline.labs import Labs

    return Labs()


def name_sweep() -> None:
    """Give all jobs of this sweep one group name; the environment reaches the launchers' processes."""
    os.environ.setdefault("BYOM_SWEEP", time.strftime("%Y%m%d-%H%M%S"))


def print_config(values: Mapping[str, Any]) -> int:
    """Print a resolved configuration as yaml."""
    import yaml

    sys.stdout.write(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True))
    return 0


def _print_best(file: Path) -> None:
    import yaml

    results = yaml.safe_load(file.read_text())
    chosen = " ".join(f"{name}={value}" for name, value in results["best_params"].items())
    sys.stdout.write(f"\nbest on validation: {chosen}  {100 * results['best_value']:.1f} %\n{file}\n")

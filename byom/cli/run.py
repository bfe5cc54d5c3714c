"""``byom run`` and ``byom -m``: one cell, or a sweep; and one cell from Python, ``byom.run([...])``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byom.cli import config, sweeps
from byom.cli.failures import said
from byom.cli.missing import run_missing
from byom.experts.finetune.processes import led

if TYPE_CHECKING:
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
    from byom.pipeline import run as cells

    return cells.run(config.settings(list(overrides)), cells.keeper())


@led
def command(arguments: Sequence[str]) -> int:
    """Run one cell, or print the configuration that would run (``--cfg``)."""
    overrides = [a for a in arguments if a != "--cfg"]
    if "--cfg" in arguments:
        return print_config(config.resolve(overrides).values)
    from byom.pipeline import run as cells

    with cells.keeper():
        cells.job(config.settings(overrides))
    return 0


@led
def sweep(arguments: Sequence[str]) -> int:
    """Run the missing cells of a sweep, or a Hydra multirun where one of its sweepers chooses them."""
    from byom.pipeline import run as cells

    sweeps.name_sweep()
    with cells.keeper(), config.shared():
        if sweeps.combines(arguments):
            _run_cells(arguments)
        else:
            for file in sweeps.multirun(arguments, cells.job):
                _print_best(file)
    return 0


def _run_cells(arguments: Sequence[str]) -> None:
    """Run the missing cells of a sweep, one after another or through a launcher.

    Raises:
        OptionError: Before anything runs, if an option does not exist.
        ByomError: If jobs failed, naming all of them.
    """
    launcher = [a for a in arguments if sweeps.for_hydra(a)]
    every = sweeps.product([a for a in arguments if a not in launcher])
    for cell in every:
        config.resolve(cell)

    @cache
    def composed(*cell: str) -> Settings:
        return config.settings(cell)

    if failed := run_missing(every, composed, launcher):
        first = failed[0][1]
        raise (said(failed) if len(failed) > 1 else first) from first


def print_config(values: Mapping[str, Any]) -> int:
    """Print a resolved configuration as yaml."""
    import yaml

    values = dict(values)
    if config.MERGING in values:
        values["merge"] = {**values["merge"], "device": values.pop(config.MERGING)}
    sys.stdout.write(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    return 0


def _print_best(file: Path) -> None:
    import yaml

    results = yaml.safe_load(file.read_text(encoding="utf-8"))
    chosen = " ".join(f"{name}={value}" for name, value in results["best_params"].items())
    sys.stdout.write(f"\nbest on validation: {chosen}  {100 * results['best_value']:.1f} %\n{file}\n")

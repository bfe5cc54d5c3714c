"""``byom run`` and ``byom -m``: one cell, or a sweep; and one cell from Python, ``byom.run([...])``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from byom.cli import config, sweeps
from byom.experts.finetune.processes import led


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
    """Run a Hydra multirun; every job returns its metric to the sweeper."""
    from byom.pipeline import run as cells

    sweeps.name_sweep()
    with cells.keeper():
        for file in sweeps.multirun(arguments, cells.job):
            _print_best(file)
    return 0


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

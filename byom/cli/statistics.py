"""``byom statistics``: what some merge methods need of each expert, ahead of time."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from byom.cli import config
from byom.errors import OptionError, suggest
from byom.experts.finetune.processes import led

if TYPE_CHECKING:
    from byom.pipeline.settings import Settings
    from byom.statistics.base import Statistic


@led
def statistics(arguments: Sequence[str]) -> int:
    """Fit statistics of every task's expert ahead of time, and print where they are."""
    overrides = [a for a in arguments if "=" in a or a.startswith("~")]
    names = [a for a in arguments if a not in overrides]
    settings = config.settings(overrides)
    for name in names:
        if name not in settings.statistics:
            raise OptionError(f"there is no statistic '{name}'; {suggest(name, settings.statistics)}")
    if not names:
        raise OptionError(f"which statistics? byom statistics NAME ..., of: {', '.join(settings.statistics)}")
    return fit(settings, {name: settings.statistics[name] for name in names})


def fit(settings: Settings, statistics: Mapping[str, Statistic]) -> int:
    """Fit statistics of the experts of a run, and print a line for each task and statistic."""
    from byom.pipeline.labs import laboratory

    lab = laboratory(settings)
    for task in lab.tasks:
        for name, values in lab.statistics(task, statistics).items():
            sys.stdout.write(f"{task:<18} {name:<8} {len(values)} tensors  {values.origin}\n")
    sys.stdout.write(f"{lab.statistics_cost(statistics):.1f} s in all\n")
    return 0

"""``byom list``: the options of every group, and the experts in the cache."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from byom.cli import caches, config
from byom.folders.request import is_weights_alone
from byom.storage.place import at_home

GROUPS = (
    "merge", "byom", "router", "statistic", "suite", "backbone", "finetune", "experts", "tune", "logger", "experiment",
)  # fmt: skip


def list_options(arguments: Sequence[str]) -> int:
    """List the options of every group (or of those named) and the experts in the cache; ``caches``: how large it is.

    Of merge methods and variants that are asked for by name it says which need nothing but the models' weights.
    """
    if "caches" in arguments:
        return caches.sizes([argument for argument in arguments if argument != "caches"])
    named = [argument for argument in arguments if argument in GROUPS]
    for group in named or GROUPS:
        sys.stdout.write(f"{group + '=':<12}{', '.join(config.options(group)) or '(none)'}\n")
        if group in named and group in ("merge", "byom"):
            alone = [name for name in config.options(group) if is_weights_alone(config.option(group, name).needs)]
            sys.stdout.write(f"  from weights alone, so for folders (byom merge, byom pack): {', '.join(alone)}\n")
    cache = at_home(config.resolve([]).values["cache"])
    files = sorted((cache / "experts").glob("*/training.json"))
    rows = [(json.loads(file.read_text(encoding="utf-8")), file.parent.name) for file in files]
    lines = [f"{row['task']:<18} seed {row['seed']}  {row.get('backbone', ''):<10} {name}" for row, name in rows]
    for line in (f"experts in {cache}: {len(lines)}", *sorted(lines)):
        sys.stdout.write(f"  {line}\n")
    return 0

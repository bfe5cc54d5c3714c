"""``byom plan``, ``byom fetch`` and ``byom convert``: costs, downloads and checkpoints, before anything runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from byom.cli import config, sweeps
from byom.errors import CheckpointError, OptionError, one_of, suggest
from byom.weights import Weights

if TYPE_CHECKING:
    from byom.pipeline.settings import Settings


DIRTY = "Records are looked for in {} alone: this source tree has uncommitted changes, and what it gives goes there."


def plan(arguments: Sequence[str]) -> int:
    """Print which cells are finished, and what the others cost, before anything starts."""
    from byom.pipeline import encoded
    from byom.pipeline import plan as plans

    name, cells = _settings(arguments)
    sys.stdout.write(f"{plans.text(name, plans.plan(cells))}\n{encoded.said(cells)}\n")
    scratch = {root for cell in cells if (root := cell.place().root) != cell.results}
    sys.stdout.write("".join(f"\n{DIRTY.format(root)}\n" for root in sorted(scratch)))
    return 0


def fetch(arguments: Sequence[str]) -> int:
    """Bring everything that an experiment needs from hubs, for machines that will have no network."""
    from byom.pipeline import plan as plans

    _, cells = _settings(arguments)
    for line in plans.fetch(cells):
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
    return 0


def _settings(arguments: Sequence[str]) -> tuple[str, list[Settings]]:
    """Return the runs of an experiment, or the one run that overrides alone describe."""
    if arguments and "=" not in arguments[0]:
        name, extra = arguments[0], arguments[1:]
        with config.shared():
            return name, [config.settings(cell) for cell in sweeps.experiment(name).cells(extra)]
    return "run", [config.settings(list(arguments))]


def convert(arguments: Sequence[str]) -> int:
    """Read a checkpoint of any format and write it as safetensors, then print what it was."""
    places = [a for a in arguments if "=" not in a]
    if len(places) != 2:
        raise OptionError(
            "byom convert SOURCE TARGET [like=BACKBONE] [to=safetensors|openclip|huggingface] [dtype=...]"
        )
    from byom.checkpoint import convert as converter

    options = dict(a.split("=", 1) for a in arguments if "=" in a)
    if unknown := sorted(set(options) - {"like", "to", "dtype"}):
        raise OptionError(f"byom convert knows no '{unknown[0]}'; {suggest(unknown[0], ('like', 'to', 'dtype'))}")
    if not Path(places[0]).exists():  # said before a backbone is loaded, or fetched
        raise CheckpointError(f"there is no checkpoint at {places[0]}")
    if (to := options.get("to", "safetensors")) not in converter.NAMES:
        raise OptionError(f"to={to}; {suggest(to, converter.NAMES)}")
    if dtype := options.get("dtype", ""):
        one_of("dtype", dtype, converter.DTYPES)
    base = pretrained(options["like"]) if options.get("like") else None
    for line in converter.convert(Path(places[0]), Path(places[1]), base, to, dtype):
        sys.stdout.write(f"{line}\n")
    return 0


def pretrained(option: str) -> Weights:
    """Return the pre-trained weights of a backbone option, in the names that experts of it have."""
    encoder = config.option("backbone", option).load()
    return Weights.of(encoder.state_dict(), origin=f"backbone={option}")

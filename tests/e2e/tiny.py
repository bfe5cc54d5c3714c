"""A real but tiny cell: two tasks of installed data, an untrained six-layer transformer, seconds in all."""

from __future__ import annotations

import os
from pathlib import Path

from byom.cli import sweeps

DROPPED = ("cifar10", "fashion_mnist", "chest_xray", "molecules", "traffic_lights", "chess")
KEPT = ("mnist", "digits")
COARSE = {"savefig.dpi": 50, "pdf.fonttype": 3}  # cutting a font down to its letters takes longer than the figure


def fewer(patch, *numbers: int) -> None:
    """Leave some of a table's cells; those of the headline table are 13, and five of them have every kind of row."""
    expand = sweeps.cells
    patch.setattr(sweeps, "cells", lambda *lines: [expand(*lines)[n] for n in numbers or (0, 3, 6, 9, 12)])


def overrides(folder: Path, results: str = "results/scratch", own: bool = False) -> list[str]:
    """Overrides of `byom run` that shrink the vision suite and keep everything under `folder`.

    Args:
        folder: For records and cache.
        results: The results folder in it.
        own: Whether experts are trained for it alone; else the experts of all tests of one run are shared.
    """
    experts, common = Path(folder) / "cache" / "experts", os.environ.get("BYOM_TEST_SHARED")
    if common and not own and not experts.exists():
        experts.parent.mkdir(parents=True, exist_ok=True)
        experts.symlink_to(Path(common) / "experts", target_is_directory=True)
    sizes = {"train": 96, "validation": 24, "test": 40, "shots": 2}
    return [
        *(f"~suite.tasks.{task}" for task in DROPPED),
        *(f"suite.tasks.{task}.{key}={value}" for task in KEPT for key, value in sizes.items()),
        "backbone.model=test_vit",
        "backbone.image_size=32",
        "backbone.checkpoint=random",
        "backbone.learning_rate=1e-3",
        "finetune.epochs=8",
        f"results={folder}/{results}",
        f"cache={folder}/cache",
    ]

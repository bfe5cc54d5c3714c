"""A real but tiny cell: two tasks of installed data, an untrained six-layer transformer, seconds in all."""

from __future__ import annotations

from pathlib import Path

DROPPED = ("cifar10", "fashion_mnist", "chest_xray", "molecules", "traffic_lights", "chess")
KEPT = ("mnist", "digits")


def overrides(folder: Path, results: str = "results/scratch") -> list[str]:
    """Overrides of `byom run` that shrink the vision suite and keep everything under `folder`."""
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

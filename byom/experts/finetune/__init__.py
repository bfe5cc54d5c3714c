"""Recipes of fine-tuning: `base.py`, the loop, and one file per recipe."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name != "Full":  # the name by which the first records, and configurations of that time, know it
        raise AttributeError(f"module 'byom.experts.finetune' has no attribute '{name}'")
    from byom.experts.finetune.full import Full

    return Full

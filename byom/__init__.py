"""byom: build your own multi-task model.

The public names are imported when they are first used, so that ``import byom`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from byom.adapter import Adapter
    from byom.bundle import Bundle
    from byom.lowrank import Adapted
    from byom.merge.average import Average
    from byom.merge.base import Problem
    from byom.merge.task_arithmetic import TaskArithmetic
    from byom.merge.ties import Ties
    from byom.packed import Delta
    from byom.variants.fft import ByomFft
    from byom.variants.lora import ByomLora
    from byom.variants.post_pruning import PostPruning
    from byom.weights import Weights

_WHERE = {
    "Adapted": "byom.lowrank",
    "Adapter": "byom.adapter",
    "Average": "byom.merge.average",
    "Bundle": "byom.bundle",
    "ByomFft": "byom.variants.fft",
    "ByomLora": "byom.variants.lora",
    "Delta": "byom.packed",
    "PostPruning": "byom.variants.post_pruning",
    "Problem": "byom.merge.base",
    "TaskArithmetic": "byom.merge.task_arithmetic",
    "Ties": "byom.merge.ties",
    "Weights": "byom.weights",
}

__all__ = [
    "Adapted",
    "Adapter",
    "Average",
    "Bundle",
    "ByomFft",
    "ByomLora",
    "Delta",
    "PostPruning",
    "Problem",
    "TaskArithmetic",
    "Ties",
    "Weights",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'byom' has no attribute '{name}'")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])

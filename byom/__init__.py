"""byom: build your own multi-task model.

The public names are imported when they are first used, so that ``import byom`` costs nothing.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from byom.checkpoint.adapters.adapter import Adapter
    from byom.checkpoint.bundle import Bundle
    from byom.merge.average import Average
    from byom.merge.base import Problem
    from byom.merge.task_arithmetic import TaskArithmetic
    from byom.merge.ties import Ties
    from byom.variants.base.delta import Delta
    from byom.variants.fft import ByomFft
    from byom.variants.lora import ByomLora
    from byom.variants.post_pruning import PostPruning
    from byom.weights import Weights
    from byom.weights.lowrank import Adapted

_WHERE = {
    "Adapted": "byom.weights.lowrank",
    "Adapter": "byom.checkpoint.adapters.adapter",
    "Average": "byom.merge.average",
    "Bundle": "byom.checkpoint.bundle",
    "ByomFft": "byom.variants.fft",
    "ByomLora": "byom.variants.lora",
    "Delta": "byom.variants.base.delta",
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

ALIASES = {
    "byom.adapter": "byom.checkpoint.adapters.adapter",
    "byom.bundle": "byom.checkpoint.bundle",
    "byom.combine": "byom.weights.lowrank",
    "byom.config": "byom.cli.config",
    "byom.finetune": "byom.experts.finetune",
    "byom.fused": "byom.backbone.split_attention",
    "byom.logger": "byom.pipeline.logger",
    "byom.lowrank": "byom.weights.lowrank",
    "byom.needs": "byom.merge.base.needs",
    "byom.packed": "byom.variants.base.delta",
    "byom.probe": "byom.merge.base.probe",
    "byom.router": "byom.pipeline.router",
    "byom.run": "byom.pipeline.run",
    "byom.source": "byom.data.source",
    "byom.suite": "byom.data.suite",
    "byom.tune": "byom.pipeline.tune",
}
"""Modules that documentation, configurations and records of earlier versions name, and where they are; until 1.0."""


class _Moved(MetaPathFinder, Loader):
    """Imports a module under the name that it had, as the same module."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        del path, target
        return ModuleSpec(name, self) if _moved(name) else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(str(_moved(spec.name)))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = module.__spec__ and module.__spec__.loader_state  # the import system has set the alias's


def _moved(name: str) -> str | None:
    old = ".".join(name.split(".")[:2])
    return ALIASES[old] + name[len(old) :] if old in ALIASES else None


sys.meta_path.insert(0, _Moved())


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'byom' has no attribute '{name}'")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])

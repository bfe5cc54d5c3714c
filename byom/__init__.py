"""byom: build your own multi-task model.

The public names are imported when they are first used, so that ``import byom`` costs nothing.
"""

# ruff: noqa: F401, PLE0605 - the imports are for type checkers, and the list of names is that of one dict
from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from byom.backbone.split_attention import split as split_attention
    from byom.checkpoint import Checkpoint
    from byom.checkpoint import read as read_checkpoint
    from byom.checkpoint.adapters.adapter import Adapter
    from byom.checkpoint.bundle import Bundle
    from byom.cli.run import run
    from byom.errors import ByomError
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
    "ByomError": "byom.errors",
    "ByomFft": "byom.variants.fft",
    "ByomLora": "byom.variants.lora",
    "Checkpoint": "byom.checkpoint",
    "Delta": "byom.variants.base.delta",
    "PostPruning": "byom.variants.post_pruning",
    "Problem": "byom.merge.base",
    "TaskArithmetic": "byom.merge.task_arithmetic",
    "Ties": "byom.merge.ties",
    "Weights": "byom.weights",
    "read_checkpoint": "byom.checkpoint:read",
    "run": "byom.cli.run",
    "split_attention": "byom.backbone.split_attention:split",
}
"""Public name to its module, with the name that it has there where that is another."""

__all__ = sorted(_WHERE)  # pyright: ignore[reportUnsupportedDunderAll]
__version__ = "0.1.0"

ALIASES = {
    "byom.adapter": "byom.checkpoint.adapters.adapter",
    "byom.anatomy": "byom.report.anatomy",
    "byom.anatomy_figures": "byom.report.figures.anatomy",
    "byom.bundle": "byom.checkpoint.bundle",
    "byom.combine": "byom.weights.lowrank",
    "byom.config": "byom.cli.config",
    "byom.figure_style": "byom.report.figures.style",
    "byom.finetune": "byom.experts.finetune",
    "byom.fused": "byom.backbone.split_attention",
    "byom.heads": "byom.functional.heads",
    "byom.lab": "byom.pipeline.lab",
    "byom.logger": "byom.pipeline.logger",
    "byom.lowrank": "byom.weights.lowrank",
    "byom.metric": "byom.functional.metrics",
    "byom.needs": "byom.merge.base.needs",
    "byom.packed": "byom.variants.base.delta",
    "byom.probe": "byom.merge.base.probe",
    "byom.record": "byom.storage.record",
    "byom.router": "byom.pipeline.router",
    "byom.run": "byom.pipeline.run",
    "byom.seeding": "byom.functional.seeding",
    "byom.source": "byom.data.source",
    "byom.suite": "byom.data.suite",
    "byom.targets": "byom.experts.finetune.targets",
    "byom.tune": "byom.pipeline.tune",
    "byom.variants.tinting": "byom.variants.symerge",
}
"""Modules that documentation, configurations and records of earlier versions name, and where they are; until 1.0."""


class _Moved(MetaPathFinder, Loader):
    """Imports a module under the name that it had, as the same module."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        del path, target
        return ModuleSpec(name, self) if moved(name) != name else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(moved(spec.name))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = module.__spec__ and module.__spec__.loader_state  # the import system has set the alias's


def moved(name: str) -> str:
    """Return where a module, or an object of one, is that an earlier version had under a dotted name."""
    parts = name.split(".")
    old = next((start for size in (2, 3) if (start := ".".join(parts[:size])) in ALIASES), None)
    return ALIASES[old] + name[len(old) :] if old else name


class _Package(ModuleType):
    """This package: importing a module that shares its name with a public object leaves the object in place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _WHERE and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.meta_path.insert(0, _Moved())
sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'byom' has no attribute '{name}'")
    module, _, attribute = _WHERE[name].partition(":")
    return getattr(import_module(module), attribute or name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])

"""``byom export`` and ``byom pack``: writing the models that serve the tasks."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from byom.cli import config
from byom.errors import OptionError
from byom.experts.finetune.processes import led
from byom.storage.atomic import replacing, require_own
from byom.storage.place import at_home

if TYPE_CHECKING:
    from byom.pipeline.cell import Cell
    from byom.pipeline.settings import Settings
    from byom.serving.suite import Predictor
    from byom.variants.base.delta import Served


@led
def export(arguments: Sequence[str]) -> int:
    """Write every task as a PEFT adapter, then print a line for each."""
    from byom.checkpoint.adapters import export as adapters
    from byom.pipeline.cell import Cell
    from byom.pipeline.checks import require_exportable

    folder, settings = _folder("export", arguments, adapters._exported)
    require_exportable(settings)
    cell = Cell(settings)
    adapters.adapters(
        cell.served,
        folder,
        base_model=settings.backbone.hub_name,
        prefix=settings.backbone.inner,
        module=cell.lab.encoder,
        heads={name: (cell.lab.head(name), task.classes) for name, task in cell.lab.tasks.items()},
        notes={"suite": settings.suite.name, **{k: v for k, v in settings.titles().items() if v}},
    )
    for task, notes in json.loads((folder / "export.json").read_text(encoding="utf-8"))["tasks"].items():
        ranks = "-".join(str(rank) for rank in dict.fromkeys(notes["rank"]))
        size = f"{notes['parameters']:>11,} parameters {notes['bytes']:>12,} bytes"
        sys.stdout.write(f"{task:<18} rank {ranks:<7} {size}  {folder / task}\n")
    return 0


@led
def pack(arguments: Sequence[str]) -> int:
    """Save the shared models, packed differences and what predicts as a bundle, then print a line for each task."""
    from byom.checkpoint.bundle import Bundle
    from byom.pipeline.cell import Cell
    from byom.pipeline.checks import require_routable
    from byom.serving.suite import FILE, require_servable
    from byom.storage.tensor_files import written
    from byom.variants.base.delta import Delta

    own = written("bundle.json", FILE)
    folder, settings = _folder("pack", arguments, own)
    require_routable(settings)
    require_servable(settings)
    cell = Cell(settings)
    served = cell.streamed
    with replacing(folder, own) as partial:
        Bundle(served.reference, served.deltas, served.base).save(partial)
        _predictor(cell, served).save(partial)
    for task in served.deltas:
        delta = Delta.open(folder / f"{task}.safetensors")
        size = f"{delta.stored_parameters:>11,} parameters {delta.nbytes:>12,} bytes"
        sys.stdout.write(f"{task:<18} {size}  {folder / task}.safetensors\n")
    return 0


def _predictor(cell: Cell, served: Served) -> Predictor:
    """Return what answers besides weights: backbone, heads and, where tasks are not given, the fitted router."""
    from byom.serving.suite import Predictor

    settings, lab = cell.settings, cell.lab
    routing = settings.router.fit(cell.problem, served) if settings.routed else None
    return Predictor(
        settings.backbone, settings.finetune, lab.tasks, {task: lab.head(task) for task in lab.tasks}, routing
    )


def _folder(command: str, arguments: Sequence[str], own: Callable[[Path], bool]) -> tuple[Path, Settings]:
    """Return where a command writes, its first argument, and the settings that the others make.

    Whatever these alone forbid is refused here, before any expert is trained.
    """
    from byom.pipeline.checks import require_folder, require_possible

    if not arguments or "=" in arguments[0] or re.match(r"~\w+\.", arguments[0]):
        raise OptionError(f"where to? byom {command} FOLDER [option=value ...]")
    folder = at_home(arguments[0])
    require_own(folder, own)
    require_folder(folder)
    settings = config.settings(list(arguments[1:]))
    require_possible(settings, evaluates=True)
    return folder, settings

"""``byom export`` and ``byom pack``: writing the models that serve the tasks."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from byom.cli import config
from byom.errors import OptionError, one_of
from byom.experts.finetune.processes import led
from byom.storage.atomic import require_own
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

    arguments, server, embeddings = _server(arguments)
    folder, settings = _folder("export", arguments, lambda _: adapters._exported)
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
        server=server,
        embeddings=embeddings,
    )
    for task, notes in json.loads((folder / "export.json").read_text(encoding="utf-8"))["tasks"].items():
        ranks = "-".join(str(rank) for rank in dict.fromkeys(notes["rank"]))
        size = f"{notes['parameters']:>11,} parameters {notes['bytes']:>12,} bytes"
        sys.stdout.write(f"{task:<18} rank {ranks:<7} {size}  {folder / task}\n")
    return 0


@led
def pack(arguments: Sequence[str]) -> int:
    """Save the shared models, packed differences and what predicts as a bundle, then print a line for each task."""
    from byom.checkpoint.bundle import Bundle, own_files
    from byom.pipeline.cell import Cell
    from byom.pipeline.checks import require_routable
    from byom.serving.suite import require_servable
    from byom.variants.base.delta import Delta

    folder, settings = _folder("pack", arguments, own_files)
    require_routable(settings)
    require_servable(settings)
    cell = Cell(settings)
    served = cell.streamed
    predictor = _predictor(cell, served)

    def complete(partial: Path) -> dict[str, str]:
        predictor.save(partial)
        return {"kind": "suite"}

    Bundle(served.reference, served.deltas, served.base).save(folder, complete)
    for task in served.deltas:
        delta = Delta.open(folder / f"{task}.safetensors")
        size = f"{delta.stored_parameters:>11,} parameters {delta.nbytes:>12,} bytes"
        sys.stdout.write(f"{task:<18} {size}  {folder / task}.safetensors\n")
    return 0


def _server(arguments: Sequence[str]) -> tuple[list[str], str | None, bool]:
    """Take out of the arguments what says for which server adapters are written, and whether with embeddings."""
    from byom.checkpoint.adapters.server import require_server

    given = dict(each.split("=", 1) for each in arguments if re.match("(server|embeddings)=", each))
    rest = [each for each in arguments if not re.match("(server|embeddings)=", each)]
    require_server(given.get("server"))
    embeddings = one_of("embeddings", given.get("embeddings", "false").lower(), ("true", "false")) == "true"
    if embeddings and "server" not in given:
        raise OptionError("embeddings=true is for a server; without server= adapters hold all that PEFT can")
    return rest, given.get("server"), embeddings


def _predictor(cell: Cell, served: Served) -> Predictor:
    """Return what answers besides weights: backbone, heads and, where tasks are not given, the fitted router."""
    from byom.serving.suite import Predictor

    settings, lab = cell.settings, cell.lab
    routing = settings.router.fit(cell.problem, served) if settings.routed else None
    return Predictor(
        settings.backbone, settings.finetune, lab.tasks, {task: lab.head(task) for task in lab.tasks}, routing
    )


def _folder(
    command: str, arguments: Sequence[str], own: Callable[[Path], Callable[[Path], bool]]
) -> tuple[Path, Settings]:
    """Return where a command writes, its first argument, and the settings that the others make.

    Whatever these alone forbid is refused here, before any expert is trained.

    Args:
        command: The command, for messages.
        arguments: What was typed after it.
        own: Given the folder, says which files in it the command wrote.
    """
    from byom.pipeline.checks import require_folder, require_possible

    if not arguments or "=" in arguments[0] or re.match(r"~\w+\.", arguments[0]):
        raise OptionError(f"where to? byom {command} FOLDER [option=value ...]")
    folder = at_home(arguments[0])
    require_own(folder, own(folder))
    require_folder(folder)
    settings = config.settings(list(arguments[1:]))
    require_possible(settings, evaluates=True)
    return folder, settings

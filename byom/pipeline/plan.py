"""The cost of an experiment before anything of it starts: cells, downloads, disk, memory, time."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

from byom.data.suite import Task
from byom.pipeline.forecast import OPEN, TRAIN, Forecast, Left, examples
from byom.pipeline.inputs import Names
from byom.pipeline.provenance import same_machine
from byom.pipeline.settings import Settings
from byom.storage.repository import Download

BATCH = 8
WORDS = "a sentence of about ten words, as short texts mostly are"
WORDS_OF_STAGES = {
    "data": "reading data",
    "statistics": "statistics",
    "merge": "merging",
    "variant": "packing",
    "route": "routing",
}
COPIES = 4  # pre-trained, what the encoder holds, merged, and the task's own model


@dataclass(frozen=True)
class Plan:
    """The cost of some runs.

    Args:
        cells: How many cells there are.
        finished: How many of them have a record.
        downloads: What is needed from hubs.
        train: Experts to be fine-tuned here.
        models: Merged models that are not in the cache yet.
        model_bytes: Size of one model, where the backbone's weights are here.
        counted: Whether all tasks of the missing cells say how many examples they have.
        left: Estimated seconds of the missing cells.
        learnt: Finished cells that the estimate rests on: those of a machine like this one.
        pace: Seconds per example in a trial of the backbone on this machine.
    """

    cells: int
    finished: int
    downloads: tuple[Download, ...]
    train: int
    models: int
    model_bytes: int | None
    counted: bool
    left: Left
    learnt: int
    pace: float | None = None

    @property
    def disk(self) -> int | None:
        """Bytes that the downloads and the cached models of the missing cells will take; None where unknown."""
        sizes = [d.bytes for d in self.downloads if not d.local]
        if self.model_bytes is None or any(size is None for size in sizes):
            return None
        return sum(size or 0 for size in sizes) + (self.models + self.train) * self.model_bytes

    @property
    def memory(self) -> int | None:
        """Bytes of memory that models take at once, without examples and activations; None where unknown."""
        return None if self.model_bytes is None else COPIES * self.model_bytes


def plan(cells: Sequence[Settings]) -> Plan:
    """Find out what some runs need; nothing is fetched, and nothing is written.

    Args:
        cells: The runs.

    Returns:
        The plan.
    """
    records = [(cell, cell.place().finished()) for cell in cells]
    missing = [cell for cell, values in records if values is None]
    done = [(cell, values) for cell, values in records if values is not None]
    size, pace = _trial(missing)
    return Plan(
        cells=len(cells),
        finished=len(done),
        downloads=tuple(_downloads(missing)),
        train=len(_untrained(missing)),
        models=len({repr((cell.suite.name, cell.effective(), cell.seed)) for cell in missing if cell.merges}),
        model_bytes=size,
        counted=all(examples(cell) is not None for cell in missing),
        left=_forecast(missing, done, pace).left(),
        learnt=sum(same_machine(values) for _, values in done),
        pace=pace,
    )


def _downloads(cells: Iterable[Settings]) -> Iterator[Download]:
    """Yield every download of some runs once."""
    alike = {repr((cell.backbone, cell.suite, cell.experts)): cell for cell in cells}
    downloads = (each for cell in alike.values() for each in _needed(cell))
    yield from {(each.what, each.place): each for each in downloads}.values()


def _needed(cell: Settings) -> list[Download]:
    """Return what a run needs from hubs."""
    tasks = cell.suite.tasks
    data = [each for task in tasks for each in task.source.downloads(f"data {task.name}")]
    return [*cell.backbone.downloads(), *cell.experts.downloads(tasks), *data]


def _untrained(cells: Sequence[Settings]) -> set[Path]:
    """Return where experts will be kept that are not fine-tuned yet; those of data that is not here are unknown."""
    folders = {
        cell.cache / "experts" / _names(cell).expert(task)
        for cell in cells
        for task in cell.experts.trains(cell.suite.tasks)
    }
    return {folder for folder in folders if not (folder / "training.json").is_file()}


def _names(cell: Settings) -> Names:
    return Names(cell.backbone, cell.experts, cell.finetune, cell.seed, cell.cache, cell.precision)


def _trial(cells: Sequence[Settings]) -> tuple[int | None, float | None]:
    """Return a model's bytes, and the seconds that this machine takes for an example, as far as can be known here."""
    if not cells:
        return None, None
    import torch

    from byom.pipeline.device import resolve

    backbone, device = cells[0].backbone, resolve(cells[0].device)
    here = all(each.local for each in backbone.downloads())
    encoder = backbone.load() if here else backbone.blank()
    if encoder is None:
        return None, None
    encoder = encoder.to(device).eval()
    size = sum(p.numel() * p.element_size() for p in encoder.parameters())
    task = cells[0].suite.tasks[0]
    inputs = backbone.encode([sample(task)] * BATCH, task)
    with torch.inference_mode():
        encoder(**{name: value[:1].to(device) for name, value in inputs.items()})  # the first call sets things up
        start = time.perf_counter()
        encoder(**{name: value.to(device) for name, value in inputs.items()})
        if device.type == "cuda":
            torch.cuda.synchronize()
    return size, (time.perf_counter() - start) / BATCH


def sample(task: Task) -> Any:
    """Return an input of a task's kind."""
    from PIL import Image

    if task.modality == "image":
        return Image.new("RGB", (64, 64))
    columns = [name for _, name, _, _ in Formatter().parse(task.prompt) if name]
    return dict.fromkeys(columns, WORDS) if columns else WORDS


def _forecast(
    missing: Sequence[Settings], done: Sequence[tuple[Settings, Mapping[str, Any]]], pace: float | None
) -> Forecast:
    """Return a forecast of the missing cells, after what this machine's records say; else after the trial."""
    forecast = Forecast(missing, pace)
    for cell, values in done:
        if same_machine(values):
            forecast.earlier(cell, values)
    return forecast


def text(name: str, plan: Plan) -> str:
    """Return a plan as it is printed."""
    missing = plan.cells - plan.finished
    lines = [f"{name}: {plan.cells} cells, {plan.finished} finished, {missing} missing", ""]
    rows = [(d.what, d.place, "here" if d.local else "missing", _size(d.bytes)) for d in plan.downloads]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)] if rows else []
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [""] * bool(rows) + [*_totals(plan)]
    return "\n".join(lines)


def _totals(plan: Plan) -> Iterator[str]:
    absent = [d for d in plan.downloads if not d.local]
    sizes = [d.bytes for d in absent if d.bytes is not None]
    unknown = len(absent) - len(sizes)
    more = f", and {unknown} of a size that no hub could be asked for" if unknown else ""
    yield f"downloads  {_size(sum(sizes))} in {len(sizes)} places{more}"
    if plan.model_bytes and unknown:
        yield f"           a model takes {_size(plan.model_bytes)} in fp32, and so does each expert but adapters"
    models = f"{plan.models} merged models" + (f" and {plan.train} experts" if plan.train else "")
    yield f"disk       {_size(plan.disk)}: downloads, {models} in the cache; encoded examples come on top"
    yield f"memory     {_size(plan.memory)}: {COPIES} models; examples and activations come on top"
    yield f"time       {_time(plan)}"


def _time(plan: Plan) -> str:
    """Return the time in words: what was never measured here is named, and not in the number."""
    if not (missing := plan.cells - plan.finished):
        return "none: nothing is missing"
    if not plan.learnt and plan.pace is None:
        return "unknown until the backbone is here" + _unknown(plan, ", and a cell has run")
    if not plan.learnt and not plan.counted:
        return (
            f"{1000 * (plan.pace or 0.0):.1f} ms per example in a trial on this machine, times {missing} cells; "
            f"how many examples there are is known once the data is here{_unknown(plan, '')}"
        )
    trial = f"{1000 * (plan.pace or 0.0):.1f} ms per example in a trial on this machine"
    basis = f"{plan.learnt} finished cells" if plan.learnt else trial
    return f"about {plan.left.seconds / 60:.0f} min, after {basis}{_unknown(plan, '')}"


def _unknown(plan: Plan, more: str) -> str:
    """Return what is left of which nothing is known on this machine."""
    stages = {stage for stage, _ in plan.left.unmeasured - {TRAIN, OPEN}}
    training = [f"fine-tuning {plan.train} experts"] if TRAIN in plan.left.unmeasured else []
    told = [*training, *(word for stage, word in WORDS_OF_STAGES.items() if stage in stages)]
    return f"{more}; without {', '.join(told)}, which this machine has not timed yet" if told else more


def _size(count: int | None) -> str:
    if count is None:
        return "unknown"
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def fetch(cells: Sequence[Settings]) -> Iterator[str]:
    """Bring everything that some runs need from hubs to this machine, one thing at a time.

    Args:
        cells: The runs.

    Yields:
        A line for each thing that is here now.
    """
    seen: set[str] = set()
    for cell in cells:
        steps = [(repr(cell.backbone), "backbone", cell.backbone.fetch)]
        for task in cell.suite.tasks:
            expert = json.dumps([repr(cell.experts), task.name])
            steps.append((expert, f"expert {task.name}", lambda task=task, cell=cell: cell.experts.fetch(task)))
            steps.append((repr(task.source), f"data {task.name}", task.source.fetch))
        for key, what, bring in steps:
            if key not in seen:
                seen.add(key)
                bring()
                yield f"{what}: here"

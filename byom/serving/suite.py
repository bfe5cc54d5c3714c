"""Bundles of suites: the backbone, the heads and the router that predict, stored next to the weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from byom.backbone.base import Backbone, Reader
from byom.checkpoint.bundle import Bundle
from byom.data.source.base import Pool, Source
from byom.data.suite import Task
from byom.errors import CheckpointError, DataError, OptionError
from byom.experts.finetune.base import Recipe
from byom.functional import heads
from byom.functional.heads import Answers, Readout
from byom.pipeline.device import resolve
from byom.pipeline.router.base import LearnedRouter, Routing
from byom.pipeline.settings import Settings
from byom.serving.model import Answer, Model, Served, classified
from byom.serving.named import built, named
from byom.serving.options import Options
from byom.serving.queue import Key
from byom.storage import tensor_files as storage
from byom.storage.atomic import write_json

FILE, HEADS, ROUTER = "serve.json", "heads", "router.safetensors"


@dataclass(frozen=True)
class Predictor:
    """What predicts besides weights.

    Args:
        backbone: Builds the encoder and feeds it.
        recipe: Makes room in the encoder for what fine-tuning added.
        tasks: Name to task; their data is not needed.
        heads: Task name to head, before a variant changes it.
        routing: A fitted router; None where tasks are given.
    """

    backbone: Backbone
    recipe: Recipe
    tasks: Mapping[str, Task]
    heads: Mapping[str, Readout]
    routing: Routing | None = None

    def save(self, folder: Path) -> None:
        """Write ``serve.json``, ``heads/TASK.safetensors`` and ``router.safetensors`` into a folder.

        Raises:
            OptionError: If the router cannot be stored.
        """
        notes: dict[str, Any] = {"format": 1, "backbone": named(self.backbone), "finetune": named(self.recipe)}
        notes["tasks"] = {name: _told(task) for name, task in self.tasks.items()}
        if self.routing is not None:
            notes["router"] = named(self.routing.router)
            storage.write_file(folder / ROUTER, self.routing.tensors, {"router": True})
        for task, head in self.heads.items():
            storage.write_file(folder / HEADS / f"{task}.safetensors", heads.pack(head), {"task": task})
        write_json(folder / FILE, notes)


def _told(task: Task) -> dict[str, Any]:
    given: dict[str, Any] = {"modality": task.modality, "metric": task.metric, "prompt": task.prompt}
    return given | {"classes": list(task.classes), "columns": _columns(task)}


def _columns(task: Task) -> list[str]:
    """Return the names of a task's texts, where an example has several."""
    given = getattr(task.source, "input", None)
    return list(given) if isinstance(given, list | tuple) else []


def require_servable(settings: Settings) -> None:
    """Refuse to pack a router that a server cannot ask, before any expert is trained.

    Raises:
        OptionError: Naming the option.
    """
    router = settings.router
    if isinstance(router, LearnedRouter) and router.mix != "sample":
        raise OptionError(
            f"router.mix={router.mix} mixes models over batches of one data set, and a server gets single items; use "
            "router.mix=sample"
        )
    if settings.routed and len({tuple(_columns(task)) for task in settings.suite.tasks}) > 1:
        raise OptionError(
            "some tasks read other columns than others, so that no router can read an item before its task is known; "
            "use router=oracle"
        )


class Elsewhere(Source):
    """The data of a task that is served: it stayed where the bundle was packed."""

    def check(self) -> NoReturn:
        """Refuse: there is no data in a bundle."""
        raise DataError("a bundle holds no data of its tasks; evaluate where the suite is")

    def digest(self, cache: Path | None = None) -> NoReturn:
        """Refuse; see `check`."""
        self.check()

    def read(self) -> dict[str, Pool]:
        """Refuse; see `check`."""
        self.check()


class SuiteModel(Model):
    """A suite's encoder with one task's weights at a time.

    Args:
        folder: The bundle.
        bundle: Its weights.
        options: Device and batch.

    Raises:
        CheckpointError: If what predicts is damaged, or names what this machine or version lacks.
    """

    def __init__(self, folder: Path, bundle: Bundle, options: Options) -> None:
        file = folder / FILE
        try:
            notes = json.loads(file.read_text(encoding="utf-8"))
            told = {task: notes["tasks"][task] for task in bundle.deltas}
            self._tasks = {name: _task(name, one) for name, one in told.items()}
            self.tasks = {name: _served(self._tasks[name], one) for name, one in told.items()}
            stored = {name: heads.unpack(load_file(folder / HEADS / f"{name}.safetensors")) for name in told}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{file} is damaged ({error!r}); pack the bundle again") from error
        self.backbone: Backbone = built(notes.get("backbone"), Backbone, file)
        recipe: Recipe = built(notes.get("finetune"), Recipe, file)
        self.device = resolve(options.device)
        self.encoder = recipe.host(self.backbone.load(), self.backbone).eval().to(self.device)
        self._pretrained: nn.Module | None = None
        self._shares: Callable[[Tensor], Tensor] | None = None
        if "router" in notes:
            self._route_by(built(notes["router"], LearnedRouter, file), load_file(folder / ROUTER))
        self._handle = bundle.attach(self.encoder, load=True, heads=False)
        self.heads = {task: bundle.deltas[task].readout(head) for task, head in stored.items()}
        self.reader: Reader = self.backbone.reader()

    @property
    def held(self) -> Key:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The task whose weights the encoder holds."""
        return self._handle.task

    def switch(self, task: Key) -> None:
        """Give the encoder a task's weights; see `Model.switch`."""
        self._handle.switch(task)

    def prepare(self, item: Any) -> Any:
        """Return an image as the encoder's input, a text as it is; see `Model.prepare`."""
        return self.reader.encode([item], None) if self.backbone.modality == "image" else item

    @torch.inference_mode()
    def predict(self, items: Sequence[Any]) -> list[Answer]:
        """Return what the held task's head makes of the items; see `Model.predict`."""
        assert self.held is not None
        task, head = self._tasks[self.held], self.heads[self.held]
        inputs = self._inputs(items, task)
        answers = _answers(head, head(self.encoder(**inputs)).float().cpu(), self.tasks[self.held])
        return [answer | ({"truncated": True} if cut else {}) for answer, cut in zip(
            answers, self._cut(items, inputs, task), strict=True
        )]  # fmt: skip

    @torch.inference_mode()
    def route(self, items: Sequence[Any]) -> list[str]:
        """Return the likeliest task of each item; see `Model.route`."""
        assert self._shares is not None
        encoder, names = self._pretrained or self.encoder, list(self.tasks)
        features = encoder(**self._inputs(items, self._tasks[names[0]])).float().cpu()
        return [names[place] for place in self._shares(features).argmax(1).tolist()]

    def _route_by(self, router: LearnedRouter, tensors: Mapping[str, Tensor]) -> None:
        self._shares, self.routes = router.restored(tensors), True
        if router.features == "pretrained":  # before the encoder gets other weights
            self.routes_on_reference = False
            self._pretrained = self.backbone.load().eval().to(self.device)

    def _inputs(self, items: Sequence[Any], task: Task) -> dict[str, Tensor]:
        if self.backbone.modality == "image":
            rows = {name: torch.cat([item[name] for item in items]) for name in items[0]}
        else:
            rows = _trimmed(self.reader.encode(items, task))
        return {name: values.to(self.device) for name, values in rows.items()}

    def _cut(self, items: Sequence[Any], inputs: Mapping[str, Tensor], task: Task) -> list[bool]:
        """Return which texts were longer than what the encoder reads; those that filled it are counted."""
        tokens = self.reader.tokens
        if tokens is None:
            return [False] * len(items)
        lengths = inputs["attention_mask"].sum(1).tolist()
        limit = self.reader.limit
        return [n >= limit and tokens(item, task) > limit for item, n in zip(items, lengths, strict=True)]


def _trimmed(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return token tensors without the columns at the end in which every text is filled up."""
    mask = inputs["attention_mask"]
    longest = int(mask.any(0).nonzero().max()) + 1 if mask.any() else mask.shape[1]
    return {name: values[:, :longest] if values.shape == mask.shape else values for name, values in inputs.items()}


def _task(name: str, told: Mapping[str, Any]) -> Task:
    classes, options = tuple(told["classes"]), {"prompt": told["prompt"], "metric": told["metric"]}
    return Task(name, Elsewhere(), told["modality"], classes, **options)


def _served(task: Task, told: Mapping[str, Any]) -> Served:
    kind = "regression" if task.regression else "classification"
    modality: Any = task.modality
    return Served(task.name, kind, modality, () if task.regression else task.classes, tuple(told["columns"]))


def _answers(head: Readout, logits: Tensor, task: Served) -> list[Answer]:
    if task.kind == "regression":
        predict: Any = getattr(head, "predict", lambda values: values[:, 0])
        return [{"value": value} for value in predict(logits).tolist()]
    if isinstance(head, Answers) and logits.shape[-1] > len(task.labels):  # generated: a last place for other texts
        places = logits.argmax(-1).tolist()
        return [{"label": task.labels[place] if place < len(task.labels) else None} for place in places]
    return classified(task.labels, logits.softmax(-1))

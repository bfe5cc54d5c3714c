"""A single training loop for every backbone, task and recipe."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from byom.data.feed import feed
from byom.data.splits import Split
from byom.experts.finetune import processes
from byom.experts.finetune.augment import BOXES, boxes
from byom.experts.finetune.base import Recipe
from byom.experts.finetune.step import Step, scaler
from byom.functional.heads import Readout
from byom.functional.precision import DEFAULT, products
from byom.functional.seeding import keyed
from byom.storage import tensor_files as storage


@dataclass(frozen=True)
class Lesson:
    """One task of a training run.

    Args:
        head: The task's frozen head.
        split: Training examples.
        share: How often the task's batches come, relative to once per epoch. A factor on the loss would do
            nothing: clipped gradients and Adam's steps forget it where a batch is of one task.
    """

    head: Readout
    split: Split
    share: float = 1.0


def finetune(
    encoder: nn.Module,
    lessons: Sequence[Lesson],
    recipe: Recipe,
    rate: float,
    seed: int,
    folder: Path,
    label: str,
    precision: str = DEFAULT,
) -> None:
    """Fine-tune an encoder under frozen heads; interrupted training resumes at the last finished epoch.

    With several lessons the batches of all of them are mixed in one order, each batch from one task. The order of
    examples and the dropout of an epoch depend on (seed, epoch) alone, so a resumed run ends in the same bits as an
    uninterrupted one. Under ``accelerate launch`` each batch is divided among the processes, so that the result is the
    same up to rounding, and up to which neurons dropout drops.

    Args:
        encoder: The encoder with pre-trained weights; modified, where its parameters ask for gradients.
        lessons: One task, or several that are learned together.
        recipe: Hyperparameters.
        rate: Peak learning rate.
        seed: Seed.
        folder: Where the state after each epoch is kept until training ends.
        label: Shown next to the progress bar.
        precision: That of the encoder's arithmetic; weights, logits and losses are fp32.

    Raises:
        OptionError: If several processes cannot do it together, or memory does not hold a batch.
    """
    processes.require_device(encoder)
    processes.require_alike(precision, recipe.micro_batch)
    processes.together(_train, folder, encoder, lessons, recipe, rate, seed, folder, label, precision)


def _train(
    encoder: nn.Module,
    lessons: Sequence[Lesson],
    recipe: Recipe,
    rate: float,
    seed: int,
    folder: Path,
    label: str,
    precision: str,
) -> None:
    """Do the work of `finetune`, whose arguments it repeats: every process of a command imports and calls it."""
    team = processes.team()
    optimizer = torch.optim.AdamW(_groups(encoder, recipe.weight_decay), lr=rate, fused=True)
    steps = sum(_turns(lessons, recipe.batch_size))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _warm_cosine(step, steps * recipe.epochs, recipe.warmup)
    )
    device = next(encoder.parameters()).device
    scaling = scaler(precision, device)
    done = _resume(folder, encoder, optimizer, schedule, scaling)
    shared, stepper = team.prepare(encoder, optimizer)
    step = Step(shared, stepper, recipe, precision, scaling)
    with products(precision, device), _bar(steps * recipe.epochs, steps * done, label, team) as bar:
        for epoch in range(done, recipe.epochs):
            for loss in _epoch(step, lessons, recipe, seed, epoch):
                schedule.step()
                if bar.update():  # it was drawn: only then is it worth waiting for the device
                    bar.set_postfix_str(f"loss {float(loss):.3f}")
            if epoch + 1 < recipe.epochs and team.is_main_process:
                _keep(folder, encoder, optimizer, schedule, epoch + 1, scaling)


def _bar(total: int, done: int, label: str, team: Any) -> tqdm:
    hidden = not team.is_main_process
    return tqdm(total=total, initial=done, desc=label, unit="step", leave=False, mininterval=1, disable=hidden)


def _epoch(step: Step, lessons: Sequence[Lesson], recipe: Recipe, seed: int, epoch: int) -> Iterator[Tensor]:
    team = processes.team()
    step.encoder.train()
    torch.manual_seed(keyed(seed, "dropout", epoch, *([team.process_index] if team.process_index else [])))
    with closing(feed(_parts(lessons, recipe, seed, epoch, team), step.device)) as batches:
        for inputs, labels, weight, lesson in batches:
            yield step(lesson.head, inputs, labels, weight)


def _parts(lessons: Sequence[Lesson], recipe: Recipe, seed: int, epoch: int, team: Any) -> Iterator[tuple]:
    for lesson, inputs, labels in _batches(lessons, recipe.batch_size, seed, epoch, recipe.augment):
        yield *_part(inputs, labels, team), lesson


def _part(inputs: dict[str, Tensor], labels: Tensor, team: Any) -> tuple[dict[str, Tensor], Tensor, float]:
    """Return this process's rows of a batch, and the weight that makes the mean over processes that over the batch."""
    if team.num_processes == 1:
        return inputs, labels, 1.0
    rows = torch.arange(len(labels)).tensor_split(team.num_processes)[team.process_index]
    weight = len(rows) * team.num_processes / len(labels)
    rows = rows if len(rows) else torch.tensor([0])  # of weight 0: gradients are exchanged by all or by none
    return {name: value[rows] for name, value in inputs.items()}, labels[rows], weight


def _batches(
    lessons: Sequence[Lesson], size: int, seed: int, epoch: int, augment: str = "none"
) -> Iterator[tuple[Lesson, dict[str, Tensor], Tensor]]:
    """Yield every batch of every lesson as often as its share says; one alone keeps the order of its own examples."""
    streams = [_stream(lesson, size, seed, epoch, augment) for lesson in lessons]
    turns = [place for place, often in enumerate(_turns(lessons, size)) for _ in range(often)]
    if len(lessons) > 1:
        mixed = torch.Generator().manual_seed(keyed(seed, "lessons", epoch))
        turns = [turns[i] for i in torch.randperm(len(turns), generator=mixed)]
    for turn in turns:
        inputs, labels, _ = next(streams[turn])
        yield lessons[turn], inputs, labels


def _turns(lessons: Sequence[Lesson], size: int) -> list[int]:
    """Return how many batches of each lesson an epoch has."""
    return [max(1, round(lesson.share * math.ceil(len(lesson.split) / size))) for lesson in lessons]


def _stream(
    lesson: Lesson, size: int, seed: int, epoch: int, augment: str
) -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor]]:
    """Yield a lesson's batches without end, in a new order and with new crops whenever all have come."""
    split = lesson.split
    for again in count():
        key = (epoch, again) if again else (epoch,)
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(keyed(seed, "order", *key)))
        crops = boxes(len(split), split.inputs, seed, "crop", *key) if augment == "crop" else None
        for inputs, labels, index in split.batches(size, order):
            yield inputs if crops is None else {**inputs, BOXES: crops[index]}, labels, index


def _groups(encoder: nn.Module, decay: float) -> list[dict]:
    matrices = [p for p in encoder.parameters() if p.requires_grad and p.ndim > 1]
    vectors = [p for p in encoder.parameters() if p.requires_grad and p.ndim <= 1]
    return [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]


def _warm_cosine(step: int, total: int, warmup: float) -> float:
    rise = max(1, round(total * warmup))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def _keep(
    folder: Path,
    encoder: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: object,
    epoch: int,
    scaling: torch.amp.GradScaler | None = None,
) -> None:
    """Write the state after an epoch as plain tensors and JSON, replacing the previous one only when complete.

    It takes three times the model (1.05 GB for ViT-B/32), checksummed and on disk before training goes on: seconds an
    epoch, after which a power failure costs no more than the epoch that it fell into.
    """
    state = optimizer.state_dict()
    moments = {f"{i}//{key}": _tensor(v) for i, values in state["state"].items() for key, v in values.items()}
    notes = {"epoch": epoch, "groups": state["param_groups"], "schedule": schedule.state_dict()["last_epoch"]}  # pyright: ignore
    notes |= {"scaler": scaled} if scaling and (scaled := scaling.state_dict()) else {}
    tensors = {f"encoder//{name}": tensor for name, tensor in encoder.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    storage.write_file(
        folder / "state.safetensors",
        tensors | {f"adam//{k}": v for k, v in moments.items()},
        {"training": json.dumps(notes)},
    )


def _resume(
    folder: Path,
    encoder: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
    scaling: torch.amp.GradScaler,
) -> int:
    file = folder / "state.safetensors"
    if not file.is_file():
        return 0
    notes = json.loads(storage.read_notes(file)["training"])
    stored = storage.TensorFiles(file)
    encoder.load_state_dict(
        {n.removeprefix("encoder//"): stored.read(n) for n in stored.specs if n.startswith("encoder//")}
    )
    moments: dict[int, dict[str, Tensor]] = {}
    for name in (n for n in stored.specs if n.startswith("adam//")):
        _, index, key = name.split("//")
        moments.setdefault(int(index), {})[key] = stored.read(name).clone()
    optimizer.load_state_dict({"state": moments, "param_groups": notes["groups"]})
    schedule.last_epoch = notes["schedule"]
    if "scaler" in notes:
        scaling.load_state_dict(notes["scaler"])
    return notes["epoch"]


def _tensor(value: Tensor | float) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value)

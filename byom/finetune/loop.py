"""The one training loop of every backbone, task and recipe."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from byom import storage
from byom.backbone.base import Head
from byom.data import Split
from byom.finetune.base import Recipe
from byom.seeding import keyed


@dataclass(frozen=True)
class Lesson:
    """One task of a training run.

    Args:
        head: The task's frozen head.
        split: Training examples.
        share: How often the task's batches come, relative to once an epoch each. A factor on the loss would do
            nothing: clipped gradients and Adam's steps forget it where a batch is of one task.
    """

    head: Head
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
) -> None:
    """Fine-tune an encoder under frozen heads; interrupted training resumes at the last finished epoch.

    With several lessons the batches of all of them are mixed in one order, each batch from one task. The order of
    examples and the dropout of an epoch depend on (seed, epoch) alone, so a resumed run ends in the same bits as an
    uninterrupted one.

    Args:
        encoder: The encoder with pre-trained weights; modified, where its parameters ask for gradients.
        lessons: One task, or several that are learned together.
        recipe: Hyperparameters.
        rate: Peak learning rate.
        seed: Seed.
        folder: Where the state after each epoch is kept until training ends.
        label: Shown beside the progress bar.
    """
    optimizer = torch.optim.AdamW(_groups(encoder, recipe.weight_decay), lr=rate, fused=True)
    steps = sum(_turns(lessons, recipe.batch_size))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _warm_cosine(step, steps * recipe.epochs, recipe.warmup)
    )
    done = _resume(folder, encoder, optimizer, schedule)
    with tqdm(
        total=steps * recipe.epochs, initial=steps * done, desc=label, unit="step", leave=False, mininterval=1
    ) as bar:
        for epoch in range(done, recipe.epochs):
            for loss in _epoch(encoder, lessons, recipe, optimizer, seed, epoch):
                schedule.step()
                bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
                bar.update()
            if epoch + 1 < recipe.epochs:
                _keep(folder, encoder, optimizer, schedule, epoch + 1)


def _epoch(
    encoder: nn.Module,
    lessons: Sequence[Lesson],
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    seed: int,
    epoch: int,
) -> Iterator[float]:
    encoder.train()
    torch.manual_seed(keyed(seed, "dropout", epoch))
    device = next(encoder.parameters()).device
    for lesson, inputs, labels in _batches(lessons, recipe.batch_size, seed, epoch):
        logits = lesson.head(encoder(**{k: v.to(device) for k, v in inputs.items()}))
        loss = cross_entropy(logits, labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(encoder.parameters(), recipe.clip)
        optimizer.step()
        yield float(loss.detach())


def _batches(
    lessons: Sequence[Lesson], size: int, seed: int, epoch: int
) -> Iterator[tuple[Lesson, dict[str, Tensor], Tensor]]:
    """Yield every batch of every lesson as often as its share says; one alone keeps the order of its own examples."""
    streams = [_stream(lesson, size, seed, epoch) for lesson in lessons]
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


def _stream(lesson: Lesson, size: int, seed: int, epoch: int) -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor]]:
    """Yield a lesson's batches without end, in a new order whenever all have come."""
    for again in count():
        key = keyed(seed, "order", epoch, again) if again else keyed(seed, "order", epoch)
        yield from lesson.split.batches(
            size, torch.randperm(len(lesson.split), generator=torch.Generator().manual_seed(key))
        )


def _groups(encoder: nn.Module, decay: float) -> list[dict]:
    matrices = [p for p in encoder.parameters() if p.requires_grad and p.ndim > 1]
    vectors = [p for p in encoder.parameters() if p.requires_grad and p.ndim <= 1]
    return [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]


def _warm_cosine(step: int, total: int, warmup: float) -> float:
    rise = max(1, round(total * warmup))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def _keep(folder: Path, encoder: nn.Module, optimizer: torch.optim.Optimizer, schedule: object, epoch: int) -> None:
    """Write the state after an epoch as plain tensors and JSON, replacing the previous one only when complete."""
    state = optimizer.state_dict()
    moments = {f"{i}//{key}": _tensor(v) for i, values in state["state"].items() for key, v in values.items()}
    notes = {"epoch": epoch, "groups": state["param_groups"], "schedule": schedule.state_dict()["last_epoch"]}  # pyright: ignore
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
    return notes["epoch"]


def _tensor(value: Tensor | float) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value)

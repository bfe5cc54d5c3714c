"""Training of a lab's models, each once, kept with a note that says it is whole."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from byom.backbone.base import Backbone
from byom.experts.finetune.base import Recipe
from byom.experts.finetune.loop import Lesson, finetune
from byom.functional.precision import DEFAULT
from byom.storage.atomic import write_json
from byom.storage.lock import alone


def trained_once(folder: Path, train: Callable[[], None]) -> None:
    """Train a model that is not there; of several processes that want it, one trains and the others wait.

    Args:
        folder: Where the model belongs.
        train: Calls `kept`.
    """
    if (folder / "training.json").is_file():
        return
    with alone(folder):
        if not (folder / "training.json").is_file():
            train()


def kept(
    folder: Path,
    encoder: nn.Module,
    lessons: Mapping[str, Lesson],
    recipe: Recipe,
    backbone: Backbone,
    seed: int,
    label: str,
    precision: str,
    notes: Mapping[str, Any],
) -> None:
    """Fine-tune an encoder and keep the model, with a note that says it is whole.

    Args:
        folder: Where the model belongs.
        encoder: The encoder, with pre-trained weights.
        lessons: Task to what is learned.
        recipe: How.
        backbone: Where the encoder comes from.
        seed: Orders training.
        label: Shown next to the progress bar.
        precision: That of the encoder's arithmetic.
        notes: Go into the note.
    """
    if next(encoder.parameters()).device.type == "cuda" and precision == DEFAULT:
        say_faster()
    trained = recipe.attach(encoder, backbone, seed)
    training = folder.with_name(f"{folder.name}.training")
    held = list(lessons.values())
    finetune(trained, held, recipe, recipe.rate(backbone), seed, training, label, precision)
    shutil.rmtree(folder, ignore_errors=True)  # without training.json it is the rest of an interrupted save
    recipe.save(trained, folder)
    told = {"task": "+".join(lessons), "backbone": type(backbone).__name__, **notes}
    write_json(folder / "training.json", told | {"examples": sum(len(lesson.split) for lesson in held)})
    shutil.rmtree(training, ignore_errors=True)


@cache
def say_faster() -> None:
    """Say once that there is a faster precision than that of the records which any machine can make."""
    tqdm.write(
        "fine-tuning in fp32 on a GPU; precision=bf16 is faster, and its experts have names of their own", sys.stderr
    )

"""The lab: what all runs of one suite, backbone, recipe and seed share, kept in memory and on disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from byom import data, storage
from byom.backbone.base import Backbone, Head
from byom.evaluate import Score, evaluate
from byom.finetune import Full, finetune
from byom.record import write_json
from byom.signature import signature
from byom.suite import Suite, Task
from byom.weights import Weights


class Lab:
    """Encoder, data, heads and experts, made on first use and cached by the signature of what determines them.

    Args:
        suite: The tasks.
        backbone: The encoder.
        recipe: How experts are fine-tuned.
        seed: Draws training, validation and head examples, and orders training.
        cache: Folder for everything that can be made again.
        device: ``cpu``, ``cuda`` or ``auto``.
        batch_size: Examples a forward pass in evaluation.
    """

    def __init__(
        self,
        suite: Suite,
        backbone: Backbone,
        recipe: Full,
        seed: int,
        cache: Path,
        device: str,
        batch_size: int,
    ) -> None:
        for task in suite.tasks:
            backbone.require(task)
        self.suite, self.backbone, self.recipe, self.seed, self.cache = suite, backbone, recipe, seed, cache
        self.device = _device(device)
        self.batch_size = batch_size
        self._splits: dict[str, dict[str, data.Split]] = {}
        self._heads: dict[str, Head] = {}
        self._experts: dict[str, Weights] = {}

    @property
    def tasks(self) -> dict[str, Task]:
        """Tasks by name."""
        return {task.name: task for task in self.suite.tasks}

    @cached_property
    def encoder(self) -> nn.Module:
        """The module that every model of this lab is loaded into."""
        return self.backbone.load().to(self.device)

    @cached_property
    def pretrained(self) -> Weights:
        """theta_0."""
        state = {name: tensor.cpu().clone() for name, tensor in self.encoder.state_dict().items()}
        return Weights.of(state, origin="pre-trained")

    def splits(self, task: str) -> dict[str, data.Split]:
        """Return a task's train, validation, test and shots."""
        if task not in self._splits:
            self._splits[task] = data.load(self.tasks[task], self.backbone, self.seed, self.cache)
        return self._splits[task]

    def read_all(self) -> None:
        """Read every task's data, so that missing or altered data is found before any training."""
        for task in tqdm(list(self.tasks), desc="read data", unit="task", leave=False, mininterval=1):
            self.splits(task)

    def head(self, task: str) -> Head:
        """Return a task's frozen head."""
        if task not in self._heads:
            self._heads[task] = self._cached_head(task)
        return self._heads[task]

    def expert(self, task: str) -> Weights:
        """Return theta_t, fine-tuning it if it is not cached."""
        if task not in self._experts:
            folder = self.cache / "experts" / self.signature_of(task)
            if not (folder / "training.json").is_file():
                self._train(task, folder)
            self._experts[task] = Weights.open(folder)
        return self._experts[task]

    def signature_of(self, task: str) -> str:
        """Return the signature of a task's expert and everything made with it."""
        return signature(self.backbone, self.tasks[task], self.recipe, self.seed)

    def score(self, task: str, weights: Weights, split: str) -> Score:
        """Score weights on a task's split."""
        self.fill(weights.state())
        return evaluate(self.encoder, self.head(task), self.splits(task)[split], self.batch_size)

    def single_task(self, task: str, split: str) -> float:
        """Return the accuracy of a task's own expert: the denominator of normalised accuracy."""
        file = self.cache / "scores" / f"{self.signature_of(task)}-{split}.json"
        if not file.is_file():
            write_json(file, {"accuracy": self.score(task, self.expert(task), split).accuracy})
        return json.loads(file.read_text())["accuracy"]

    def fill(self, state: Mapping[str, Tensor]) -> None:
        """Load a state dict into the encoder."""
        self.encoder.load_state_dict(dict(state))

    def _cached_head(self, task: str) -> Head:
        file = self.cache / "heads" / f"{signature(self.backbone, self.tasks[task], self.seed)}.safetensors"
        if not file.is_file():
            self.fill(self.pretrained.state())
            head = self.backbone.head(self.encoder, self.tasks[task], self.splits(task)["shots"])
            file.parent.mkdir(parents=True, exist_ok=True)
            storage.write_file(
                file, {"weight": head.weight, "temperature": torch.tensor(head.temperature)}, {"task": task}
            )
        stored = load_file(file)
        return Head(stored["weight"], float(stored["temperature"]))

    def _train(self, task: str, folder: Path) -> None:
        head, split = self.head(task), self.splits(task)["train"]
        self.fill(self.pretrained.state())
        rate = self.recipe.learning_rate or self.backbone.learning_rate
        training = folder.with_name(f"{folder.name}.training")
        tuned = finetune(self.encoder, head, split, self.recipe, rate, self.seed, training, f"fine-tune {task}")
        tuned.save(folder)
        backbone = type(self.backbone).__name__
        notes = {"task": task, "backbone": backbone, "seed": self.seed, "examples": len(split)}
        write_json(folder / "training.json", notes)
        shutil.rmtree(training, ignore_errors=True)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)

"""The lab: what all runs of one suite, backbone, recipe and seed share, kept in memory and on disk."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from byom.backbone.base import Backbone
from byom.checkpoint import Checkpoint, read
from byom.data import splits as data
from byom.data.suite import Suite, Task
from byom.experts.base import Experts
from byom.experts.finetune.base import Recipe
from byom.experts.finetune.loop import Lesson
from byom.functional import heads
from byom.functional.heads import Readout
from byom.functional.metrics import value_of
from byom.functional.precision import DEFAULT, later, products, require_precision
from byom.functional.seeding import keyed
from byom.functional.tensors import copied, on_cpu
from byom.merge.base.probe import Features
from byom.pipeline.batch_size import BatchSize
from byom.pipeline.device import resolve
from byom.pipeline.evaluate import Score, evaluate, features
from byom.pipeline.inputs import Names
from byom.pipeline.training import kept, trained_once
from byom.statistics.base import Statistic, fit
from byom.storage import tensor_files as storage
from byom.storage.atomic import write_json
from byom.storage.lock import alone
from byom.storage.signature import describe, signature
from byom.weights import Weights


class Lab:
    """Encoder, data, heads and experts, made on first use and cached by the signature of what determines them.

    Args:
        suite: The tasks.
        backbone: The encoder.
        recipe: How models are fine-tuned here.
        experts: Where the tasks' own models come from.
        seed: Draws training, validation and head examples, and orders training.
        cache: Folder for everything that can be made again.
        device: ``cpu``, ``cuda`` or ``auto``.
        batch_size: Examples per forward pass in evaluation; see `byom.pipeline.batch_size.BatchSize`.
        precision: That of training, evaluation and features. Heads, statistics and whatever is learned through
            a probe are computed in fp32: they are estimates from small gradients, and what others start from.
    """

    def __init__(
        self,
        suite: Suite,
        backbone: Backbone,
        recipe: Recipe,
        experts: Experts,
        seed: int,
        cache: Path,
        device: str,
        batch_size: int | str | None = None,
        precision: str = DEFAULT,
    ) -> None:
        for task in suite.tasks:
            backbone.require(task)
        self.suite, self.backbone, self.recipe, self.experts = suite, backbone, recipe, experts
        self.seed, self.cache = seed, cache
        self.device = resolve(device)
        self.precision = require_precision(precision, self.device)
        self.size = BatchSize(batch_size, self.device)
        self._splits: dict[str, data.Splits] = {}
        self._heads: dict[str, Readout] = {}
        self._experts: dict[str, Weights] = {}
        self._features: dict[tuple[str, str, str], Features] = {}
        self._names = Names(backbone, experts, recipe, seed, cache, precision)
        self._checkpoints: dict[Path, Checkpoint] = {}
        # the cells of a sweep share experts and references; functions of this lab, so that they end with it
        self.opened = lru_cache(maxsize=4)(Weights.open)
        self.distance = lru_cache(maxsize=64)(distance)
        self.differing = lru_cache(maxsize=64)(count_differing)

    @property
    def tasks(self) -> dict[str, Task]:
        """Tasks by name."""
        return {task.name: task for task in self.suite.tasks}

    @cached_property
    def encoder(self) -> nn.Module:
        """The module that every model of this lab is loaded into."""
        return self.recipe.host(self.backbone.load(), self.backbone).to(self.device)

    @property
    def pretrained(self) -> Weights:
        """theta_0."""
        return self._pretrained

    @cached_property
    def _pretrained(self) -> Weights:
        return Weights.of(copied(self.encoder.state_dict()), origin="pre-trained")

    def splits(self, task: str) -> data.Splits:
        """Return a task's train, validation, test and shots, each read when it is asked for."""
        if task not in self._splits:
            self._splits[task] = data.load(self.tasks[task], self.backbone, self.seed, self.cache)
        return self._splits[task]

    def read_all(self, splits: Sequence[str]) -> None:
        """Read every task's data, so that missing or altered data is found before any training.

        Args:
            splits: Those that are evaluated; experts that are trained here need the others too.
        """
        here = {task.name for task in self.experts.trains(self.suite.tasks)}
        for task in tqdm(list(self.tasks), desc="read data", unit="task", leave=False, mininterval=1):
            for split in data.SPLITS if task in here else splits:
                self.splits(task)[split]

    def head(self, task: str) -> Readout:
        """Return a task's frozen head: that of its expert's checkpoint, or the backbone's."""
        if task not in self._heads:
            own = self.experts.head(self, task)
            self._heads[task] = self._cached_head(task) if own is None else own
        return self._heads[task]

    def expert(self, task: str, member: int = 0) -> Weights:
        """Return theta_t.

        Args:
            task: The task.
            member: 0 for theta_t itself; further members see the same examples in another order.
        """
        key = self.signature_of(task, member)
        if key not in self._experts:
            self._experts[key] = self.experts.open(self, task, member)
        return self._experts[key]

    def trained(self, task: str, member: int = 0) -> Weights:
        """Return theta_t as it is fine-tuned here; see `expert`."""
        folder = self.cache / "experts" / self.signature_of(task, member)
        label = f"fine-tune {task}" + (f" (member {member})" if member else "")
        seed = keyed(self.seed, "member", member) if member else self.seed
        self._once(folder, {task: 1.0}, label, seed)
        return self.recipe.open(folder, self.pretrained)

    def joint(self, shares: Mapping[str, float]) -> Weights:
        """Return a model fine-tuned on several tasks together, the batches of each as frequent as its share.

        Args:
            shares: Task to weight; tasks of weight 0 are left out. Only their ratios matter, and equal ones give
                every batch of every task once an epoch.
        """
        known = {task: shares[task] for task in self.tasks if shares.get(task, 0) > 0}
        mean = sum(known.values()) / len(known)
        parts = [[self.signature_of(task), round(share / mean, 9)] for task, share in known.items()]
        frequent = ["by frequency"] if len(set(known.values())) > 1 else []
        key = signature(*parts, *frequent, *self.scored, *self.joining)
        folder = self.cache / "joint" / key
        self._once(folder, {t: s / mean for t, s in known.items()}, f"fine-tune {len(known)} tasks", self.seed)
        return self.recipe.open(folder, self.pretrained)

    def signature_of(self, task: str, member: int = 0) -> str:
        """Return the signature of a task's expert and everything made with it."""
        return self._names.expert(self.tasks[task], member)

    @property
    def scored(self) -> list[dict[str, str]]:
        """What the names of scores, and of what features were looked at for, have besides those of the models."""
        return later(self.precision)

    @property
    def joining(self) -> list[Recipe]:
        """What the names of joint models have besides those of experts from elsewhere: how they are trained."""
        return [] if any(self.experts.trains(self.suite.tasks)) else [self.recipe]

    @property
    def signature(self) -> str:
        """The signature of all tasks' experts, in order."""
        return signature([self.signature_of(task) for task in self.tasks])

    def checkpoint(self, path: Path) -> Checkpoint:
        """Return a checkpoint that was fine-tuned elsewhere, in the names of theta_0; read once."""
        if path not in self._checkpoints:
            self._checkpoints[path] = read(path, self.pretrained)
        return self._checkpoints[path]

    def statistics(self, task: str, wanted: Mapping[str, Statistic], member: int = 0) -> dict[str, Weights]:
        """Return statistics of a task's expert; those that are not cached are fitted together in one pass.

        Args:
            task: The task.
            wanted: Name to the statistic that is fitted.
            member: Which of the task's experts.
        """
        key = self.signature_of(task, member)
        folders = {name: self.cache / "statistics" / signature(key, what) for name, what in wanted.items()}

        def missing() -> dict[str, Statistic]:
            return {name: wanted[name] for name, folder in folders.items() if not (folder / "cost.json").is_file()}

        if missing():
            with alone(self.cache / "statistics" / key):
                for split in sorted({what.split for what in missing().values()}):
                    some = {name: what for name, what in missing().items() if what.split == split}
                    self._fit(task, member, some, split, folders)
        return {name: Weights.open(folder / "values") for name, folder in folders.items()}

    def statistics_cost(self, wanted: Mapping[str, Statistic], members: int = 1) -> float:
        """Return the seconds that fitting took, for all tasks, whenever that was."""
        keys = [self.signature_of(task, member) for task in self.tasks for member in range(members)]
        files = [
            self.cache / "statistics" / signature(key, what) / "cost.json" for key in keys for what in wanted.values()
        ]
        return sum(json.loads(file.read_text(encoding="utf-8"))["seconds"] for file in files)

    def features(self, weights: Weights, task: str, split: str) -> Features:
        """Return the features of a split under some weights, in the split's order."""
        key = (weights.fingerprint(), task, split)
        if key not in self._features:
            self.fill(weights.state())
            held = self.splits(task)[split]
            self._features[key] = Features(features(self.encoder, held, self.size, self.precision), held.labels)
        return self._features[key]

    def _fit(
        self, task: str, member: int, wanted: Mapping[str, Statistic], split: str, folders: Mapping[str, Path]
    ) -> None:
        self.fill(self.expert(task, member).state())
        start = time.perf_counter()
        with products(DEFAULT, self.device):
            fitted = fit(self.encoder, self.head(task), self.splits(task)[split], wanted, self.size.plain)
        seconds = (time.perf_counter() - start) / len(wanted)  # of a shared pass, each bears its part
        for name, values in fitted.items():
            Weights.of(on_cpu(values)).save(folders[name] / "values")
            write_json(folders[name] / "cost.json", {"seconds": round(seconds, 3), "statistic": describe(wanted[name])})

    def score(self, task: str, weights: Weights, split: str, head: Readout | None = None) -> Score:
        """Score weights on a task's split, with the task's own head or one that a variant changed."""
        self.fill(weights.state())
        return self.evaluated(head or self.head(task), self.splits(task)[split], self.tasks[task].metric)

    def evaluated(self, head: Readout, split: data.Split, metric: str) -> Score:
        """Score the weights that the encoder holds."""
        return evaluate(self.encoder, head, split, self.size, metric, self.precision)

    def single_task(self, task: str, split: str) -> float:
        """Return the score of a task's own expert: the denominator of normalised accuracy."""
        name = "-".join([self.signature_of(task), split, *([self.precision] if self.scored else [])])
        file = self.cache / "scores" / f"{name}.json"
        if not file.is_file():
            score = self.score(task, self.expert(task), split)
            write_json(file, {"metric": score.metric, "value": score.value})
        return value_of(json.loads(file.read_text(encoding="utf-8")))

    def fill(self, state: Mapping[str, Tensor]) -> None:
        """Load a state dict into the encoder."""
        self.encoder.load_state_dict(dict(state))

    def _cached_head(self, task: str) -> Readout:
        if not self._head_file(task).is_file():
            self.fill(self.pretrained.state())
            together = not self.backbone.reads_shots and getattr(self.experts, "heads", "backbone") == "backbone"
            tasks = [t for t in self.tasks if not self._head_file(t).is_file()] if together else [task]
            shots = self.splits(task)["shots"] if self.backbone.reads_shots else None
            with products(DEFAULT, self.device):
                made = self.backbone.heads(self.encoder, [self.tasks[name] for name in tasks], shots)
                for name, head in zip(tasks, made, strict=True):
                    storage.write_file(self._head_file(name), heads.pack(head), {"task": name})
        return heads.unpack(load_file(self._head_file(task)))

    def _head_file(self, task: str) -> Path:
        return self.cache / "heads" / f"{self._names.head(self.tasks[task])}.safetensors"

    def _once(self, folder: Path, shares: Mapping[str, float], label: str, seed: int) -> None:
        def train() -> None:
            lessons = {task: Lesson(self.head(task), self.splits(task)["train"], s) for task, s in shares.items()}
            self.fill(self.pretrained.state())
            how = (self.recipe, self.backbone, seed, label, self.precision)
            kept(folder, self.encoder, lessons, *how, {"seed": self.seed})

        trained_once(folder, train)


def distance(a: Weights, b: Weights) -> float:
    """Return the Euclidean distance between two models, over all their parameters."""
    return (a - b).norm()


def count_differing(a: Weights, b: Weights) -> int:
    """Return in how many parameters two models differ."""
    return sum(int((a[name] != b[name]).sum()) for name in a.mergeable())

"""A hub in a folder: the layout of a Hugging Face cache, with tiny data in the schemas of the real data sets.

`build(home, suites)` writes what some suites read; `add_model(home, repository, folder)` adds a model; within `once`,
one of a run's processes does. Code that runs with ``HF_HOME=home HF_HUB_OFFLINE=1``, or inside `visit(home)`, finds
them under their real names. Images are noise and texts are random words: numbers that come out of them mean nothing.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from PIL import Image

from byom.cli import config
from byom.data.suite import Task

SIZES = {"train": 30, "validation": 12, "test": 12, "validation_matched": 12}
SIDE = 32
WORDS = "a the cat dog sat ran on under red blue house tree quickly never because it they bird river green".split()  # noqa: SIM905
NAMES = {
    "cola": ["unacceptable", "acceptable"], "sst2": ["negative", "positive"],
    "mrpc": ["not_equivalent", "equivalent"], "qqp": ["not_duplicate", "duplicate"],
    "mnli": ["entailment", "neutral", "contradiction"], "qnli": ["entailment", "not_entailment"],
    "rte": ["entailment", "not_entailment"],
}  # fmt: skip


@cache
def tasks(suite: str) -> tuple[Task, ...]:
    """Return a suite's tasks as its yaml has them."""
    return config.option("suite", suite).tasks


def shared() -> Path:
    """Return the hub that all processes of a test run have in common."""
    return Path(os.environ["BYOM_TEST_SHARED"]) / "hub"


def once(home: Path, what: str, make: Callable[[], object]) -> None:
    """Let one of the processes that want something in a hub make it, while the others wait."""
    done = home / f"{what}.done"
    home.mkdir(exist_ok=True)
    with FileLock(home / f"{what}.lock"):
        if not done.exists():
            make()
            done.touch()


def build(home: Path, suites: Iterable[str]) -> None:
    """Write the data sets of some suites.

    Args:
        home: The folder that HF_HOME will name.
        suites: Options of ``suite=`` whose data comes from the hub.
    """
    every = {task.name: task for suite in suites for task in tasks(suite)}
    by_path: dict[str, list[Task]] = {}
    for task in every.values():
        by_path.setdefault(task.source.path, []).append(task)
    for path, of in by_path.items():
        folder = _snapshot(home, "datasets", path)
        notes = [note for task in of for note in _write(folder, task)]
        (folder / "README.md").write_text("---\nconfigs:\n" + "".join(notes) + "---\n")


def add_model(home: Path, repository: str, folder: Path) -> None:
    """Add a folder of files as a model repository."""
    shutil.copytree(folder, _snapshot(home, "models", repository), dirs_exist_ok=True)


@contextmanager
def visit(home: Path, patch: Any) -> Iterator[None]:
    """Make this process's hub the one in a folder, without a network.

    Args:
        home: What `build` and `add_model` wrote to.
        patch: A `pytest.MonkeyPatch`.
    """
    import datasets
    import huggingface_hub.constants as hub

    with patch.context() as undo:
        undo.setattr(hub, "HF_HUB_CACHE", str(home / "hub"))
        undo.setattr(hub, "HF_HUB_OFFLINE", True)
        undo.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
        undo.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        yield


def _snapshot(home: Path, kind: str, name: str) -> Path:
    place = home / "hub" / f"{kind}--{name.replace('/', '--')}"
    commit = hashlib.sha1(name.encode()).hexdigest()
    folder = place / "snapshots" / commit
    folder.mkdir(parents=True, exist_ok=True)
    (place / "refs").mkdir(exist_ok=True)
    (place / "refs" / "main").write_text(commit)
    return folder


def _write(folder: Path, task: Task) -> list[str]:
    """Write a task's splits as the real data set has them; return its lines of the README."""
    source = task.source
    inner = source.name or "data"
    lines = [f"- config_name: {source.name or 'default'}\n  data_files:\n"]
    for split in source.splits.values():
        file = folder / inner / f"{split}-00000-of-00001.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        _table(task, split).to_parquet(file)
        lines.append(f"  - split: {split}\n    path: {inner}/{split}-*\n")
    return lines


def _table(task: Task, split: str) -> Any:
    import datasets

    rng = np.random.default_rng(int(hashlib.sha256(f"{task.name} {split}".encode()).hexdigest()[:8], 16))
    count, source = SIZES[split], task.source
    if task.modality == "image":
        labels = [int(n) for n in rng.choice([0, 1, len(task.classes) // 2, len(task.classes) - 1], count)]
        images = [Image.fromarray(_picture(rng, label)) for label in labels]
        features = {source.input: datasets.Image(), source.label: datasets.ClassLabel(num_classes=len(task.classes))}
        rows: dict[str, Any] = {source.input: images, source.label: labels}
    else:
        rows = {column: [_sentence(rng) for _ in range(count)] for column in source.input}
        features = {column: datasets.Value("string") for column in source.input}
        names = NAMES.get(task.name)
        rows[source.label] = (
            rng.integers(len(names), size=count).tolist() if names else (5 * rng.random(count)).tolist()
        )
        features[source.label] = datasets.ClassLabel(names=names) if names else datasets.Value("float32")
        rows["idx"], features["idx"] = list(range(count)), datasets.Value("int32")
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def _picture(rng: np.random.Generator, label: int) -> np.ndarray:
    noise = rng.integers(0, 128, (SIDE, SIDE, 3))
    return (noise + np.array([40 * (label % 3), 60 * (label % 2), 20 * (label % 5)])).clip(0, 255).astype(np.uint8)


def _sentence(rng: np.random.Generator) -> str:
    return " ".join(rng.choice(WORDS, rng.integers(4, 12)))

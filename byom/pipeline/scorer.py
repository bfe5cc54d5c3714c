"""Scores of whole models on every task, kept on disk one model at a time, so that interrupted work goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from byom.data.splits import Split
from byom.pipeline.lab import Lab
from byom.storage.atomic import write_json
from byom.storage.preview import Seconds, Weighting
from byom.storage.signature import signature
from byom.weights import Weights


@dataclass(frozen=True)
class Job:
    """A model to be scored.

    Args:
        label: Shown next to the progress bar.
        weights: Task weights, kept with the scores.
        key: What identifies the model among those of one lab.
        make: Makes it; called only if it has no score yet.
    """

    label: str
    weights: tuple[float, ...]
    key: str
    make: Callable[[], Weights]


class Scorer:
    """Scores whole models on every task; each score is kept on disk, so that interrupted work goes on.

    Args:
        lab: Tasks, heads and the encoder.
        splits: On which splits.
        examples: At most so many of each, the first ones (they were drawn at random); None takes all.
    """

    def __init__(self, lab: Lab, splits: Sequence[str], examples: int | None) -> None:
        self.lab, self.splits, self.examples = lab, tuple(splits), examples
        self._held: dict[tuple[str, str], Split] = {}

    def split(self, task: str, split: str) -> Split:
        """Return the examples that are scored."""
        if (task, split) not in self._held:
            self._held[task, split] = _first(self.lab.splits(task)[split], self.examples)
        return self._held[task, split]

    def run(self, jobs: Iterable[Job]) -> list[Weighting]:
        """Score the jobs that have no score yet, and return all scores in order."""
        jobs = list(jobs)
        files = [self._file(job) for job in jobs]
        missing = [(job, file) for job, file in zip(jobs, files, strict=True) if not file.is_file()]
        total = len(missing) * len(self.lab.tasks) * len(self.splits)
        with tqdm(total=total, desc="preview", unit="task", leave=False, mininterval=1) as bar:
            for job, file in missing:
                bar.set_description_str(f"preview {job.label}", refresh=False)
                write_json(file, self._score(job, bar).to_json())
        return [Weighting.lift(json.loads(file.read_text(encoding="utf-8"))) for file in files]

    def _file(self, job: Job) -> Path:
        name = signature(self.lab.signature, job.key, self.splits, self.examples, *self.lab.scored)
        return self.lab.cache / "preview" / f"{name}.json"

    def _score(self, job: Job, bar: tqdm) -> Weighting:
        start = time.perf_counter()
        self.lab.fill(job.make().state())
        ready = time.perf_counter()
        accuracy = {split: self._accuracies(split, bar) for split in self.splits}
        seconds = Seconds(round(ready - start, 3), round(time.perf_counter() - ready, 3))
        return Weighting(job.weights, accuracy, seconds)

    def _accuracies(self, split: str, bar: tqdm) -> tuple[float, ...]:
        return tuple(self._accuracy(task, split, bar) for task in self.lab.tasks)

    def _accuracy(self, task: str, split: str, bar: tqdm) -> float:
        lab, held = self.lab, self.split(task, split)
        score = lab.evaluated(lab.head(task), held, lab.tasks[task].metric)
        bar.update()
        return score.value


def _first(split: Split, examples: int | None) -> Split:
    if examples is None or examples >= len(split):
        return split
    return Split({name: rows[:examples] for name, rows in split.inputs.items()}, split.labels[:examples])

"""Paired bootstrap intervals of the difference between two models on the same test examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from byom.errors import ByomError
from byom.functional.metrics import metric
from byom.storage.parts import TaskScore

RESAMPLES = 2000
LEVEL = 0.95

Scores = Mapping[str, TaskScore]


def points(score: TaskScore, task: str) -> np.ndarray:
    """Return what each test example scored, for metrics that are the mean of that.

    Args:
        score: The task's score.
        task: The task's name, for the message.

    Returns:
        ``[N]``, 0 and 1 where an example is right or wrong.

    Raises:
        ByomError: If the score does not hold one value for each of its N examples.
    """
    if score.points:
        held, values = f"{len(score.points)} values", np.array(score.points)
    else:
        packed = np.frombuffer(bytes.fromhex(score.hits), dtype=np.uint8)
        bits = np.unpackbits(packed, count=min(score.examples, 8 * packed.size)).astype(np.int64)
        held, values = f"{packed.size} bytes", bits if packed.size == -(-score.examples // 8) else bits[:0]
    if len(values) != score.examples:
        raise ByomError(
            f"the hits of {task} hold {held}, which is not {score.examples} examples; "
            "the record is damaged: delete it and run that cell again"
        )
    return values


def interval(differences: Sequence[np.ndarray], seed: int = 0) -> tuple[float, float]:
    r"""Return the 95 % percentile bootstrap interval of a mean over tasks of paired differences.

    Examples are resampled with replacement within each task. A difference takes few distinct values, so one
    multinomial draw of how often each is seen is the same as drawing the examples one by one.

    Args:
        differences: For each task [examples], what one model scores beyond the other on each example.
        seed: Of the 2000 resamples.

    Returns:
        The lower and the upper end, as fractions.

    References:
        Efron and Tibshirani, An Introduction to the Bootstrap, section 13.3.
    """
    rng = np.random.default_rng(seed)
    return _ends([_resampled_means(task, rng) for task in differences])


def gain_interval(pairs: Sequence[tuple[Scores, Scores]], seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of what one model scores beyond another, averaged over tasks and over pairs.

    Scores that are not a mean over examples (correlations) are computed again on every resample.

    Args:
        pairs: Task to score of both models, a pair for each seed.
        seed: Of the 2000 resamples.

    Returns:
        The lower and the upper end, as fractions.
    """
    rng = np.random.default_rng(seed)
    return _ends([_resampled_gains([(a[task], b[task]) for a, b in pairs], task, rng) for task in pairs[0][0]])


def mean_interval(runs: Sequence[Scores], seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of a model's score over test examples, averaged over runs and over tasks.

    Args:
        runs: Task to score, for each seed of the run on the same examples.
        seed: Of the 2000 resamples.

    Returns:
        The lower and the upper end, as fractions.
    """
    rng = np.random.default_rng(seed)
    return _ends([_resampled_scores([run[task] for run in runs], task, rng) for task in runs[0]])


def relative_interval(pairs: Sequence[tuple[Scores, Scores]], seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of what one model scores divided by another, averaged over pairs and over tasks.

    Both are resampled together, example by example, so that what is hard for both makes the interval no wider.

    Args:
        pairs: Task to score of the model and of the one it is divided by, a pair for each seed, on the same examples.
        seed: Of the 2000 resamples.

    Returns:
        The lower and the upper end, as fractions; NaN where the other model may score nothing.
    """
    rng = np.random.default_rng(seed)
    ratios = [_resampled_ratios([(a[task], b[task]) for a, b in pairs], task, rng) for task in pairs[0][0]]
    return _ends(ratios) if np.isfinite(ratios).all() else (np.nan, np.nan)


def _ends(resampled: Sequence[np.ndarray]) -> tuple[float, float]:
    tail = 50 * (1 - LEVEL)
    lower, upper = np.percentile(np.mean(resampled, axis=0), [tail, 100 - tail])
    return float(lower), float(upper)


def _resampled_gains(pairs: Sequence[tuple[TaskScore, TaskScore]], task: str, rng: np.random.Generator) -> np.ndarray:
    first = pairs[0][0]
    if first.hits or first.points:
        return _resampled_means(np.mean([points(a, task) - points(b, task) for a, b in pairs], axis=0), rng)
    places = rng.integers(first.examples, size=(RESAMPLES, first.examples))
    return np.mean([_rescored(a, places) - _rescored(b, places) for a, b in pairs], axis=0)


def _resampled_scores(scores: Sequence[TaskScore], task: str, rng: np.random.Generator) -> np.ndarray:
    first = scores[0]
    if first.hits or first.points:
        return _resampled_means(np.mean([points(score, task) for score in scores], axis=0), rng)
    places = rng.integers(first.examples, size=(RESAMPLES, first.examples))
    return np.mean([_rescored(score, places) for score in scores], axis=0)


def _resampled_ratios(pairs: Sequence[tuple[TaskScore, TaskScore]], task: str, rng: np.random.Generator) -> np.ndarray:
    first = pairs[0][0]
    if first.hits or first.points:
        seen = np.stack([points(score, task) for pair in pairs for score in pair])
        values, counts = np.unique(seen, axis=1, return_counts=True)
        resampled = rng.multinomial(seen.shape[1], counts / counts.sum(), size=RESAMPLES) @ values.T
    else:
        places = rng.integers(first.examples, size=(RESAMPLES, first.examples))
        resampled = np.stack([_rescored(score, places) for pair in pairs for score in pair], axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (resampled[:, 0::2] / resampled[:, 1::2]).mean(1)


def _rescored(score: TaskScore, places: np.ndarray) -> np.ndarray:
    of = metric(score.metric)
    predictions, labels = np.array(score.predictions), np.array(score.labels)
    return np.array([of.value(predictions[drawn], labels[drawn]) for drawn in places])


def _resampled_means(differences: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    values, counts = np.unique(differences, return_counts=True)
    drawn = rng.multinomial(len(differences), counts / counts.sum(), size=RESAMPLES)
    return drawn @ values / len(differences)

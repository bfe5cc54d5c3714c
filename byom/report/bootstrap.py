"""How sure a difference between two models on the same test examples is: paired bootstrap intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from byom.errors import ByomError
from byom.functional.metrics import METRICS

RESAMPLES = 2000
LEVEL = 0.95

Scores = Mapping[str, Mapping[str, Any]]  # task -> a score as a record holds it


def unpack_hits(score: Mapping, task: str) -> np.ndarray:
    """Return whether each test example was classified correctly.

    Args:
        score: A task's score, with ``hits`` (hexadecimal, most significant bit first) and ``examples``.
        task: The task's name, for the message.

    Returns:
        Booleans as 0 and 1, one an example.

    Raises:
        ByomError: If ``hits`` does not hold ``examples`` bits.
    """
    packed = np.frombuffer(bytes.fromhex(score["hits"]), dtype=np.uint8)
    if packed.size != -(-score["examples"] // 8):
        raise ByomError(
            f"the hits of {task} hold {packed.size} bytes, which is not {score['examples']} examples; "
            "the record is damaged: delete it and run that cell again"
        )
    return np.unpackbits(packed, count=score["examples"]).astype(np.int64)


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

    Scores that are no mean over examples (correlations) are computed anew on every resample.

    Args:
        pairs: The scores of both models, a pair for each seed.
        seed: Of the 2000 resamples.

    Returns:
        The lower and the upper end, as fractions.
    """
    rng = np.random.default_rng(seed)
    return _ends([_resampled_gains([(a[task], b[task]) for a, b in pairs], task, rng) for task in pairs[0][0]])


def _ends(resampled: Sequence[np.ndarray]) -> tuple[float, float]:
    tail = 50 * (1 - LEVEL)
    lower, upper = np.percentile(np.mean(resampled, axis=0), [tail, 100 - tail])
    return float(lower), float(upper)


def _resampled_gains(pairs: Sequence[tuple[Mapping, Mapping]], task: str, rng: np.random.Generator) -> np.ndarray:
    if "hits" in pairs[0][0]:
        return _resampled_means(np.mean([unpack_hits(a, task) - unpack_hits(b, task) for a, b in pairs], axis=0), rng)
    places = rng.integers(pairs[0][0]["examples"], size=(RESAMPLES, pairs[0][0]["examples"]))
    return np.mean([_rescored(a, places) - _rescored(b, places) for a, b in pairs], axis=0)


def _rescored(score: Mapping, places: np.ndarray) -> np.ndarray:
    compute = METRICS[score["metric"]].compute
    predictions, labels = np.array(score["predictions"]), np.array(score["labels"])
    return np.array([compute(predictions[drawn], labels[drawn]) for drawn in places])


def _resampled_means(differences: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    values, counts = np.unique(differences, return_counts=True)
    drawn = rng.multinomial(len(differences), counts / counts.sum(), size=RESAMPLES)
    return drawn @ values / len(differences)

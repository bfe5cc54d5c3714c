"""Scores: a number from the predictions and labels of one split."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from byom.errors import OptionError, suggest

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Metric:
    """A score of predictions.

    Args:
        title: How tables write it.
        compute: Maps predictions ``[N]`` and labels ``[N]`` to a number, 1 for perfect ones; None where the score is
            the mean of `points`.
        points: Maps predictions ``[N, ...]`` and labels ``[N]`` to what each example scores, ``[N]``, bool or a number
            that is 1 for a perfect prediction; None where the score is not a mean over examples.
        predict: Maps logits ``[B, C]`` to the predictions ``[B, ...]`` that `points` or `compute` reads; None takes
            what the task's head predicts, which is the class with the largest logit where it does not say.
        regression: Whether labels are real numbers.

    Raises:
        OptionError: If neither or both of `compute` and `points` are given.
    """

    title: str
    compute: Callable[[np.ndarray, np.ndarray], float] | None = None
    points: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    predict: Callable[[Tensor], Tensor] | None = None
    regression: bool = False

    def __post_init__(self) -> None:
        if (self.compute is None) == (self.points is None):
            raise OptionError(f"metric {self.title}: give either compute or points")

    @property
    def decomposes(self) -> bool:
        """True where the score is a mean over examples."""
        return self.points is not None

    def value(self, predictions: np.ndarray, labels: np.ndarray) -> float:
        """Return the score of predictions ``[N, ...]`` against labels ``[N]``."""
        if self.points is not None:
            return float(np.mean(self.points(predictions, labels)))
        assert self.compute is not None
        return float(self.compute(predictions, labels))

    def __call__(self, predictions: Tensor, labels: Tensor) -> float:
        """Return the score of predictions ``[N, ...]`` against labels ``[N]``."""
        return self.value(predictions.numpy(), labels.numpy())


def metric(name: str) -> Metric:
    """Return a metric by its name.

    Raises:
        OptionError: If the name is not that of a metric.
    """
    if name not in METRICS:
        raise OptionError(f"there is no metric {name!r}; {suggest(name, METRICS)}")
    return METRICS[name]


def value_of(row: Mapping[str, Any]) -> float:
    """Return the score in a row as it is stored, whatever its metric; rows of accuracies once named it."""
    return row["value"] if "value" in row else row["accuracy"]


def _right(predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return predictions == labels


def _five_best(logits: Tensor) -> Tensor:
    return logits.topk(min(5, logits.shape[-1]), -1).indices


def _among(predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return (predictions == labels[:, None]).any(1)


def _matthews(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Return Matthews' correlation for any number of classes; 0 where one side is constant.

    Gorodkin (2004), "Comparing two K-category assignments by a K-category correlation coefficient"; as scikit-learn has
    it, whose checks of its inputs would take most of the time of an interval over 2000 resamples.
    """
    codes = np.unique(np.concatenate([labels, predictions]), return_inverse=True)[1]
    truth, guess = (np.bincount(half, minlength=codes.max() + 1).astype(np.float64) for half in np.split(codes, 2))
    total, right = float(len(labels)), float(np.sum(labels == predictions))
    spread = (total**2 - guess @ guess) * (total**2 - truth @ truth)
    return float((right * total - truth @ guess) / np.sqrt(spread)) if spread > 0 else 0.0


def _pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Return Pearson's correlation; 0 where one side is constant, because nothing is predicted then."""
    if len(labels) < 2 or np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    return float(np.corrcoef(predictions.astype(np.float64), labels.astype(np.float64))[0, 1])


def _spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    from scipy.stats import rankdata

    return _pearson(rankdata(predictions), rankdata(labels))


def _both(predictions: np.ndarray, labels: np.ndarray) -> float:
    return (_pearson(predictions, labels) + _spearman(predictions, labels)) / 2


METRICS = {
    "accuracy": Metric("accuracy", points=_right),
    "exact_match": Metric("exact match", points=_right),
    "top5": Metric("top-5 accuracy", points=_among, predict=_five_best),
    "matthews": Metric("Matthews correlation", _matthews),
    "pearson_spearman": Metric("mean of Pearson and Spearman correlation", _both, regression=True),
    "spearman": Metric("Spearman correlation", _spearman, regression=True),
}

"""Metrics by the name that a task's ``metric`` gives.

``top5`` counts an example as right if its label is among the five classes with the largest logits, as ImageNet does; it
is 1 for five classes or fewer.
"""


def ratio(accuracy: float, single: float) -> float:
    """Return an accuracy relative to the single-task model's; 1 where both are 0."""
    return accuracy / single if single else float(accuracy == single)

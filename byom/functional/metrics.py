"""What a score is: a number from the predictions and labels of one split."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
        compute: Maps predictions [N] and labels [N] to a number, 1 for perfect ones.
        regression: Whether labels are real numbers.
        decomposes: Whether the score is the share of examples that are right.
    """

    title: str
    compute: Callable[[np.ndarray, np.ndarray], float]
    regression: bool = False
    decomposes: bool = False

    def __call__(self, predictions: Tensor, labels: Tensor) -> float:
        """Return the score of predictions [N] against labels [N]."""
        return float(self.compute(predictions.numpy(), labels.numpy()))


def metric(name: str) -> Metric:
    """Return a metric by its name.

    Raises:
        OptionError: If there is none of that name.
    """
    if name not in METRICS:
        raise OptionError(f"there is no metric {name!r}; {suggest(name, METRICS)}")
    return METRICS[name]


def value_of(row: Mapping[str, Any]) -> float:
    """Return the score that a record holds, whatever its metric."""
    return row["accuracy"] if "accuracy" in row else row["value"]


def _right(predictions: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean(predictions == labels))


def _matthews(predictions: np.ndarray, labels: np.ndarray) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predictions))


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
    "accuracy": Metric("accuracy", _right, decomposes=True),
    "exact_match": Metric("exact match", _right, decomposes=True),
    "matthews": Metric("Matthews correlation", _matthews),
    "pearson_spearman": Metric("mean of Pearson and Spearman correlation", _both, regression=True),
    "spearman": Metric("Spearman correlation", _spearman, regression=True),
}


def ratio(accuracy: float, single: float) -> float:
    """Return an accuracy relative to the single-task model's; 1 where both are 0."""
    return accuracy / single if single else float(accuracy == single)


def accuracies(rows: Sequence[Mapping[str, Any]], split: str) -> np.ndarray:
    """Return ``[N, T]`` accuracies of scored weightings."""
    return np.array([list(row["accuracy"][split]) for row in rows])

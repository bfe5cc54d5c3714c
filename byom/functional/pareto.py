"""Pareto fronts: the points that no other beats, and how well points predict others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FEWEST_RANKED = 3  # any two points agree or disagree completely, which says nothing


def unbeaten(scores: np.ndarray) -> np.ndarray:
    """Return which points are Pareto-optimal: none is at least as good on every task and better on one.

    Args:
        scores: ``[N, T]``, larger is better.

    Returns:
        bool ``[N]``; points that are equal are all kept.
    """
    ours, theirs = scores[:, None, :], scores[None, :, :]
    beaten = (theirs >= ours).all(-1) & (theirs > ours).any(-1)
    return np.logical_not(np.any(beaten, axis=1))


def hypervolume(scores: np.ndarray) -> float:
    """Return the volume of what the points dominate above 0: one number for a whole Pareto front.

    It slices along the last task, so that it takes time of the order of ``N ** (T - 1)``.

    Args:
        scores: ``[N, T]``, 0 or more.

    Returns:
        The volume; 1 if a point reaches 1 on every task, 0 without points.
    """
    if not len(scores):
        return 0.0
    if scores.shape[1] == 1:
        return float(scores.max())
    front = scores[unbeaten(scores)]
    front = front[np.argsort(-front[:, -1], kind="stable")]
    heights = front[:, -1] - np.append(front[1:, -1], 0.0)
    return float(sum(h * hypervolume(front[: n + 1, :-1]) for n, h in enumerate(heights) if h > 0))


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Return Spearman's rank correlation, equal values sharing their mean rank.

    Args:
        a: ``[N]``.
        b: ``[N]``.

    Returns:
        A value in [-1, 1]; None for fewer than three points, or if one side is constant.
    """
    left, right = _ranks(a), _ranks(b)
    if len(left) < FEWEST_RANKED or not left.any() or not right.any():
        return None
    return float(left @ right / np.sqrt((left @ left) * (right @ right)))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks less their mean; all 0 if the values are equal."""
    return (values[:, None] > values).sum(1) / 2 - (values[:, None] < values).sum(1) / 2


@dataclass(frozen=True)
class Agreement:
    """Agreement of previewed points with jointly fine-tuned ones of the same weights.

    Args:
        points: How many were compared (N).
        difference: Mean over points of ``|previewed - trained|``, one per task.
        bias: Mean over points of ``previewed - trained``, one per task.
        rank: Spearman's correlation over points, one per task; None where it has no meaning.
        mean_difference: As `difference`, of the mean accuracy over tasks.
        mean_rank: As `rank`, of the mean accuracy over tasks.
        regret: Mean accuracy lost by training at the point whose preview is best, instead of at the best of the N.
    """

    points: int
    difference: tuple[float, ...]
    bias: tuple[float, ...]
    rank: tuple[float | None, ...]
    mean_difference: float
    mean_rank: float | None
    regret: float


def agreement(previewed: np.ndarray, trained: np.ndarray) -> Agreement:
    """Compare previewed with trained accuracies.

    Args:
        previewed: ``[N, T]``, N at least 1.
        trained: ``[N, T]``, the same weightings in the same order.

    Returns:
        The comparison.
    """
    gap, (ours, theirs) = previewed - trained, (previewed.mean(1), trained.mean(1))
    return Agreement(
        len(gap),
        tuple(np.abs(gap).mean(0).tolist()),
        tuple(gap.mean(0).tolist()),
        tuple(rank_correlation(a, b) for a, b in zip(previewed.T, trained.T, strict=True)),
        float(np.abs(ours - theirs).mean()),
        rank_correlation(ours, theirs),
        float(theirs.max() - theirs[ours.argmax()]),
    )

"""Printed forms of the tables of the LoRA experiments, and what their columns mean."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd

from byom.report.frame import MISSING, percent, task_names
from experiments.lora.tables import FAMILIES, SPARSE

HEADS = {
    "task_parameters": "Stored per task (M)", "task_bytes": "Stored per task (kB)", "parameters": "Parameters (M)",
    "error": "Relative error", "difference": "Difference (points)", "interval": "95 % interval",
}  # fmt: skip
INTERVAL = (
    "Interval: paired bootstrap over the test examples of each task (2000 resamples, differences averaged over seeds); "
    "it does not cover the spread over seeds."
)
RANK_NOTES = (
    "Accuracies are in per cent on the test split. q: singular values kept of each matrix; with global ranks as many "
    "values as that stores, spent on the largest singular values of all matrices together. Where query, key and value "
    "lie in one fused matrix, each has its own q in an adapter; they share one q on a merged model and in full "
    "fine-tunes, whose differences are dense.",
    "Normalised: the mean over tasks of the accuracy divided by that of the task's own model.",
    "Stored per task: values kept for each task beside the shared model, q (m + n + 1) for an m x n matrix; kB: 1000 "
    "bytes of what is stored, positions included. Parameters: one shared model and what every task adds. Task heads "
    "count in none of them.",
    "Relative error: the mean over tasks of ‖θₜ − θ‖ / ‖θₜ − θ₀‖ (θₜ: the task's own model, θ: what serves it, θ₀: "
    "pre-trained).",
)
BYTES_NOTES = (
    "Beside every BYOM-LoRA the sparse model that is nearest in bytes per task (kB: 1000 bytes, values and encoded "
    "positions); no difference is given where the two sizes are more than 10 % apart.",
    "Difference: BYOM-LoRA less the sparse model, in points of mean accuracy.",
    INTERVAL,
)
RECIPE_NOTES = (
    "Single-task models. Stored per task: the values that fine-tuning trained.",
    "Difference: the LoRA that stores as many values less this recipe, in points of mean accuracy.",
    INTERVAL,
)


def display_ranks(frame: pd.DataFrame, by_task: bool = True) -> pd.DataFrame:
    """Return the printed form of `ranked`, without its sparse rows.

    Args:
        frame: What `ranked` returned.
        by_task: Whether every task has a column.
    """
    shown = pd.DataFrame(frame.loc[frame["family"].isin(FAMILIES) & ~frame["family"].isin(SPARSE)])
    ranks = [MISSING if np.isnan(rank) else f"{rank:.0f}" for rank in shown["rank"]]
    out = pd.DataFrame({"Method": shown["method"], "q": ranks})
    for task in task_names(frame) if by_task else ():
        out[task] = _percents(shown, f"accuracy_{task}")
    out["Mean"], out["Normalised"] = _percents(shown, "mean"), _percents(shown, "normalised")
    out[HEADS["task_parameters"]] = _millions(shown["task_parameters"])
    out[HEADS["task_bytes"]] = _kilobytes(shown["task_bytes"])
    out[HEADS["parameters"]] = [f"{value / 1e6:.2f}" for value in shown["parameters"]]
    out[HEADS["error"]] = [MISSING if np.isnan(value) else f"{value:.3f}" for value in shown["error"]]
    return out


def display_bytes(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the printed form of `at_equal_bytes`."""
    out = pd.DataFrame({"Method": frame["method"], "q": frame["rank"].astype(str)})
    out["kB per task"], out["Mean"] = _kilobytes(frame["task_bytes"]), _percents(frame, "mean")
    out["Beside"], out["m %"] = frame["sparse"], [percent(m) for m in frame["density"]]
    out["Its kB per task"], out["Its mean"] = _kilobytes(frame["sparse_bytes"]), _percents(frame, "sparse_mean")
    return _with_difference(out, frame)


def display_recipes(frame: pd.DataFrame, by_task: bool = True) -> pd.DataFrame:
    """Return the printed form of `recipes`.

    Args:
        frame: What `recipes` returned.
        by_task: Whether every task has a column.
    """
    out = pd.DataFrame({"Recipe": frame["method"], HEADS["task_parameters"]: _millions(frame["task_parameters"])})
    for task in task_names(frame) if by_task else ():
        out[task] = _percents(frame, f"accuracy_{task}")
    out["Mean"] = _percents(frame, "mean")
    return _with_difference(out, frame).rename(columns={HEADS["difference"]: "LoRA of that size less this (points)"})


def _with_difference(out: pd.DataFrame, frame: pd.DataFrame) -> pd.DataFrame:
    pairs = zip(frame["difference"], frame["difference_std"], strict=True)
    out[HEADS["difference"]] = [_points(100 * value, 100 * std, "+.1f") for value, std in pairs]
    ends = zip(frame["lower"], frame["upper"], strict=True)
    out[HEADS["interval"]] = [MISSING if np.isnan(a) else f"[{100 * a:+.1f}, {100 * b:+.1f}]" for a, b in ends]
    return out


def _percents(frame: pd.DataFrame, name: str) -> list[str]:
    stds = frame[f"{name}_std"] if f"{name}_std" in frame else [np.nan] * len(frame)
    return [_points(100 * value, 100 * std, ".1f") for value, std in zip(frame[name], stds, strict=True)]


def _points(value: float, std: float, form: str) -> str:
    if np.isnan(value):
        return MISSING
    return f"{value:{form}}" + ("" if np.isnan(std) else f" ± {std:.1f}")


def _millions(values: Iterable[float]) -> list[str]:
    return [f"{value / 1e6:.4f}" for value in values]


def _kilobytes(values: Iterable[float]) -> list[str]:
    return [f"{value / 1e3:.0f}" for value in values]

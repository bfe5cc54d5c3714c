"""The anatomy of task vectors: where their mass lies, how concentrated it is, where tasks pull against each other."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import exp, pi, sqrt
from statistics import NormalDist
from typing import Any, Literal, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from byom.errors import CheckpointError, OptionError, fraction
from byom.functional.deltas import inner_products
from byom.functional.tensors import wide
from byom.weights import Weights
from byom.weights.cuts import Cuts, cuts_at
from byom.weights.match import matched

FIRST, LAST = "embeddings", "end"  # the layers before and after the numbered ones
KINDS = {
    "normalisation": r"norm|(^|[._])ln_|\.ls\d+\.|layer_scale",
    "embedding": r"embed|token|conv1|(^|\.)shared\.|relative_attention_bias",
    "attention": r"attn|attention",
    "MLP": r"mlp|intermediate|output\.dense|DenseReluDense|ffn",
    "other": r"",
}
"""Kind of parameter to a regular expression of its name; the first that is found counts."""
NUMBERED = re.compile(r"(?:^|\.)(?:blocks?|layers?|resblocks|h)\.(\d+)\.")


class Place(NamedTuple):
    """The place of a parameter in a transformer.

    Attributes:
        layer: The number of its block as the model names it (``decoder 3`` in a second stack), ``embeddings`` before
            the blocks, or ``end`` after them.
        kind: A name of `KINDS`.
    """

    layer: str
    kind: str


def place(name: str) -> Place:
    """Say where a parameter lies, from its name alone.

    Args:
        name: The parameter, as timm, open_clip, or transformers (CLIP, BERT, RoBERTa, T5) name it.
    """
    kind = next(kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE))
    if number := NUMBERED.search(name):
        return Place(f"{'decoder ' * name.startswith('decoder.')}{number[1]}", kind)
    return Place(FIRST if kind == "embedding" else LAST, kind)


def _depth(layer: str) -> tuple[int, int]:
    if layer in (FIRST, LAST):
        return (0, 0) if layer == FIRST else (3, 0)
    stack, _, number = layer.rpartition(" ")
    return (2 if stack else 1, int(number))


def _framed(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Return rows that name a tensor as a frame, with its place, layers ordered by depth."""
    frame = pd.DataFrame([{"tensor": row["tensor"], **place(row["tensor"])._asdict(), **row} for row in rows])
    depth = sorted(set(frame["layer"]), key=_depth)
    return frame.assign(layer=pd.Categorical(frame["layer"], depth, ordered=True))


def masses(experts: Mapping[str, Weights], reference: Weights) -> pd.DataFrame:
    """Measure the mass of ``theta_t - reference``, its squared norm, in every tensor.

    Args:
        experts: Task name to theta_t.
        reference: theta_0, or a merged model.

    Returns:
        A row per tensor and task: tensor, layer, kind, entries (n), task, mass.

    Raises:
        CheckpointError: If models do not belong together, or a value is not finite.
    """
    return _framed(
        {"tensor": name, "entries": delta.numel(), "task": task, "mass": _mass(delta)}
        for task, expert in experts.items()
        for name, delta in _differences(expert, reference)
    )


def _differences(target: Weights, reference: Weights) -> Iterator[tuple[str, Tensor]]:
    target, reference = matched(target, reference)
    for name in target.mergeable():
        yield name, wide(target.read_finite(name)) - wide(reference.read_finite(name))


def _mass(delta: Tensor) -> float:
    return float(torch.linalg.vector_norm(delta, dtype=torch.float64)) ** 2


def shares(frame: pd.DataFrame, *by: str) -> pd.Series:
    """Return which share of a task vector's mass lies where, the mean over tasks.

    Args:
        frame: A frame made by `masses`.
        by: What is told apart: ``layer``, ``kind``, ``tensor``; tasks are, if ``task`` is among them.

    Returns:
        Shares in [0, 1]; those of a task, or of the mean, sum to 1.

    Raises:
        CheckpointError: If a task vector is zero.
    """
    by_task = sums(frame, ["task"], "mass")
    whole = dict(zip(by_task.index, by_task["mass"], strict=True))
    if still := [str(task) for task, mass in whole.items() if not mass]:
        raise CheckpointError(f"{', '.join(still)}: fine-tuning changed nothing, so that it has no shares")
    share = frame["mass"] / [whole[task] for task in frame["task"]] / (1 if "task" in by else len(whole))
    return pd.Series(sums(frame.assign(share=share), by, "share")["share"])


def sums(frame: pd.DataFrame, by: Sequence[str], *columns: str) -> pd.DataFrame:
    """Add up some columns over the rows that agree in others, layers in their order.

    Args:
        frame: A frame made by a function of this module.
        by: The columns that tell groups apart.
        columns: What is added up.
    """
    return pd.DataFrame(frame.groupby([*by], observed=True)[[*columns]].sum())


def put_back(
    target: Weights, reference: Weights, densities: Sequence[float], scope: Literal["global", "tensor"] = "global"
) -> pd.DataFrame:
    """Measure which part of every tensor are the largest entries of ``theta_t - reference``.

    That is what BYOM-FFT puts back where the reference is a merged model, and post-pruning where it is theta_0.

    Args:
        target: theta_t.
        reference: theta_0, or a merged model.
        densities: Fractions of the entries (m), in [0, 1].
        scope: ``global`` takes the largest of the whole model, ``tensor`` those of each tensor.

    Returns:
        A row per tensor and density: tensor, layer, kind, density, entries (n), kept (of n), mass, kept_mass.

    Raises:
        OptionError: If a density or the scope is not known.
        CheckpointError: If the models do not belong together, or a value is not finite.
    """
    if scope not in ("global", "tensor"):
        raise OptionError(f"scope={scope} is not known; use global or tensor")
    target, reference = matched(target, reference)
    by_density = cuts_at(target, reference, [fraction("density", density) for density in densities], scope)
    return _framed(row for name, delta in _differences(target, reference) for row in _largest(name, delta, by_density))


def _largest(name: str, delta: Tensor, by_density: Mapping[float, Cuts]) -> Iterator[dict[str, Any]]:
    whole = {"tensor": name, "entries": delta.numel(), "mass": _mass(delta)}
    for density, cuts in by_density.items():
        cut, offset = cuts[name]
        mask = cut.mask(delta, offset)
        yield {**whole, "density": density, "kept": int(mask.sum()), "kept_mass": _mass(delta[mask])}


def concentration(frame: pd.DataFrame) -> pd.Series:
    """Return which share of a difference's mass its largest entries hold.

    Args:
        frame: A frame made by `put_back`.

    Returns:
        Density to share, both in [0, 1].

    Raises:
        CheckpointError: If the difference is zero.
    """
    total = sums(frame, ["density"], "kept_mass", "mass")
    if not total["mass"].to_numpy().all():
        raise CheckpointError("the two models are the same, so that no entry holds a share of their difference")
    return pd.Series(total["kept_mass"].to_numpy() / total["mass"].to_numpy(), index=total.index)


def normal_concentration(density: float) -> float:
    """Return which share of the squared norm the largest entries of a normal vector hold, in the limit of many.

    With the threshold ``a``, ``P(|x| > a) = m``: the share is ``m + 2 a phi(a)``, phi being the standard density.

    Args:
        density: Fraction of entries (m), in [0, 1].
    """
    if fraction("density", density) in (0, 1):
        return float(density)
    threshold = NormalDist().inv_cdf(1 - density / 2)
    return density + 2 * threshold * exp(-(threshold**2) / 2) / sqrt(2 * pi)


def conflicts(experts: Mapping[str, Weights], pretrained: Weights, density: float = 1.0) -> pd.DataFrame:
    """Count the entries that tasks move in opposite directions, and what of their movement a sum cancels.

    Args:
        experts: Two or more tasks, name to theta_t.
        pretrained: theta_0.
        density: Fraction of its largest entries that each task vector is first trimmed to, as TIES trims.

    Returns:
        A row per tensor: tensor, layer, kind, entries (n); shared, the entries that two or more tasks move;
        conflicting, those of them with both signs; by_chance, how many that would be if signs were coins; movement,
        ``sum_t |tau_t|`` over all entries; cancelled, ``sum_t |tau_t| - |sum_t tau_t|``.

    Raises:
        OptionError: If there are fewer than two tasks, or the density is out of range.
        CheckpointError: If models do not belong together, or a value is not finite.
    """
    if len(experts) < 2:
        raise OptionError(f"signs conflict between two or more tasks; {list(experts)} was given")
    pretrained, *tied = matched(pretrained, *experts.values())
    experts = dict(zip(experts, tied, strict=True))
    trims = [_cuts(expert, pretrained, fraction("density", density)) for expert in experts.values()]
    together = zip(*(_differences(expert, pretrained) for expert in experts.values()), strict=True)
    return _framed(_conflict(pairs[0][0], _trimmed(pairs, trims)) for pairs in together)


def _cuts(expert: Weights, pretrained: Weights, density: float) -> Cuts:
    return cuts_at(expert, pretrained, [density], "global")[density]


def _trimmed(pairs: Sequence[tuple[str, Tensor]], trims: Sequence[Cuts]) -> Tensor:
    rows = [delta * trim[name][0].mask(delta, trim[name][1]) for (name, delta), trim in zip(pairs, trims, strict=True)]
    return torch.stack(rows)


def _conflict(name: str, deltas: Tensor) -> dict[str, Any]:
    moving = (deltas != 0).sum(0)
    shared = moving > 1
    movement = deltas.abs().sum(dtype=torch.float64)
    return {
        "tensor": name,
        "entries": moving.numel(),
        "shared": int(shared.sum()),
        "conflicting": int(((deltas > 0).any(0) & (deltas < 0).any(0)).sum()),
        "by_chance": float((1 - 0.5 ** (moving[shared] - 1).double()).sum()),
        "movement": float(movement),
        "cancelled": float(movement - deltas.double().sum(0).abs().sum()),
    }


def cosines(experts: Mapping[str, Weights], pretrained: Weights) -> pd.DataFrame:
    """Measure the cosine between every two task vectors.

    Args:
        experts: Task name to theta_t.
        pretrained: theta_0.

    Returns:
        ``[T, T]``, tasks along both axes.

    Raises:
        CheckpointError: If a task vector is zero, models do not belong together, or a value is not finite.
    """
    together = zip(*(_differences(expert, pretrained) for expert in experts.values()), strict=True)
    gram = torch.stack([inner_products(torch.stack([delta for _, delta in pairs])) for pairs in together]).sum(0)
    norms = gram.diagonal().sqrt()
    if still := [task for task, norm in zip(experts, norms.tolist(), strict=True) if norm == 0]:
        raise CheckpointError(f"{', '.join(still)}: fine-tuning changed nothing, so that it has no direction")
    return pd.DataFrame((gram / norms.outer(norms)).numpy(), index=list(experts), columns=list(experts))


def distances(experts: Mapping[str, Weights], references: Mapping[str, Weights]) -> pd.DataFrame:
    """Measure how far every task's model is from some references, in the Euclidean norm.

    Args:
        experts: Task name to theta_t.
        references: Name to theta_0 or a merged model.

    Returns:
        A row per task, a column per reference.

    Raises:
        CheckpointError: If models do not belong together, or a value is not finite.
    """
    columns = {name: [_distance(expert, one) for expert in experts.values()] for name, one in references.items()}
    return pd.DataFrame(columns, index=list(experts))


def _distance(target: Weights, reference: Weights) -> float:
    return sqrt(sum(_mass(delta) for _, delta in _differences(target, reference)))

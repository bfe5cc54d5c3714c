"""Models that are merged together, under the names of the pre-trained one, and what of them is only carried over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from byom.errors import CheckpointError
from byom.functional.tensors import wide, widened
from byom.storage.quantised import FLOAT8
from byom.weights.match import (
    fits,
    has_no_average,
    may_be_mask,
    not_finite,
    require_alike,
    require_match,
    require_one_place,
)
from byom.weights.spec import Spec
from byom.weights.ties import united
from byom.weights.weights import Weights


def aligned(base: Weights, models: Mapping[str, Weights]) -> tuple[Weights, Mapping[str, Weights]]:
    """Check that models fit their base, and give them its names.

    A buffer that a model lacks is the base's. Masks, tensors with infinities that are the same in every model, are
    carried over, as position ids are. Values of 8 bits become fp32.

    Tensors that some models tie and others do not are two in all of them; copies that are equal in every model are one.

    Args:
        base: theta_0.
        models: Task name to theta_t.

    Returns:
        The base and the models; the same objects unless they differ in buffers or ties or hold masks.

    Raises:
        WeightsMismatch: If names, shapes or devices of parameters differ.
        CheckpointError: If a matrix of whole numbers, or a complex tensor, differs between models.
    """
    for model in models.values():
        require_match(base, model)
        require_one_place(base, model)
    base, fitted = _fitted(base, base), {task: _fitted(model, base) for task, model in models.items()}
    if any(fitted[task] is not model for task, model in models.items()):
        models = fitted
    every = [base, *models.values()]
    for name in base.canonical():
        if has_no_average(name, base.shape(name), base.dtype(name)):
            _require_one_value(name, every)
    base, *tied = united(base, *models.values())
    if any(one is not other for one, other in zip(tied, models.values(), strict=True)):
        models = dict(zip(models, tied, strict=True))
    every = [base, *models.values()]
    numbers = [name for name in base.canonical() if base.dtype(name).is_floating_point]
    masks = [name for name in numbers if may_be_mask(name, base.shape(name)) and _is_mask(name, every)]
    if odd := [name for name in numbers if name not in masks and not base.merges(name)]:
        raise CheckpointError(not_finite(base.origin, odd[0], base[odd[0]]))
    if not masks:
        return base, models
    return base.carrying(masks), {task: model.carrying(masks) for task, model in models.items()}


def _fitted(model: Weights, base: Weights) -> Weights:
    """Return a model under exactly the base's names, and without types of 8 bits, in which no method computes."""
    held = {name for name in base if fits(name, base, model)}
    narrow = any(model.dtype(name) in FLOAT8 for name in model)
    if len(held) == len(base) == len(model) and not narrow:
        return model

    def read(name: str) -> Tensor:
        return model[name] if name in held else base[name]

    sources = {name: model if name in held else base for name in base}
    specs = {name: Spec(source.shape(name), _computed(source.dtype(name))) for name, source in sources.items()}
    ties = {alias: name for alias, name in model.ties.items() if alias in held and name in held}
    return Weights(specs, read, ties=ties, origin=model.origin, place=model.place)


def _computed(dtype: torch.dtype) -> torch.dtype:
    return widened(dtype) if dtype in FLOAT8 else dtype


def _require_one_value(name: str, every: list[Weights]) -> None:
    """Compare the values of a tensor by their checksums, which files of byom have recorded."""
    first, *others = every
    for other in others:
        if other is not first and first.checksum(name) != other.checksum(name):
            require_alike(name, (first.origin, first[name]), (other.origin, partial(other.__getitem__, name)))


def _is_mask(name: str, every: list[Weights]) -> bool:
    """Say whether a tensor has infinities and no NaN, and is the same in every model."""
    values = _values(name, every)
    first = wide(next(values))
    if bool(first.isfinite().all()) or bool(first.isnan().any()):
        return False
    return all(torch.equal(first, wide(other)) for other in values)


def _values(name: str, every: list[Weights]) -> Iterator[Tensor]:
    return (weights[name] for weights in every)

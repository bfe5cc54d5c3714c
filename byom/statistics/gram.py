"""Grams of what matrix parameters multiply, captured from the products themselves, whatever module makes them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from byom.functional.heads import Readout
from byom.merge.base.probe import Batch
from byom.statistics.base import Fitter, Statistic, parameters

ATTENTION = inspect.signature(functional.multi_head_attention_forward)


@dataclass(frozen=True)
class Gram(Statistic):
    """The mean outer product of the inputs of each matrix parameter that is used as a linear map.

    ``G = X^T X / rows``, one row per token that is not padding. Covered are the weights of linear layers however they
    are called: ``functional.linear`` (nn.Linear, fused or bare weights), products with a bare parameter and
    ``addmm`` (GPT-2's Conv1D), and nn.MultiheadAttention, whose ``in_proj_weight`` is covered when query, key and
    value are one tensor. Convolutions and embeddings are not covered.

    A parameter stored out x in has ``[n, n]``; one stored in x out has ``[1, n, n]``: it multiplies its first axis.

    References:
        Dataless Knowledge Fusion by Merging Weights of Language Models, section 3. https://arxiv.org/abs/2212.09849

    Differences:
        The authors' hooks see nn.Linear and Conv1D and keep padding rows; nn.MultiheadAttention calls no hook on its
        projections, so that code based on hooks averages all attention weights of open_clip's models.
    """

    def start(self, encoder: nn.Module, head: Readout) -> Fitter:
        """Begin to fit; see `Statistic.start`."""
        return GramFitter(encoder)


class Use(NamedTuple):
    """A matrix parameter applied to an activation."""

    parameter: str
    inputs: Tensor  # [..., n]
    sequence_first: bool  # [L, B, n] instead of [B, L, n]
    transposed: bool  # whether the parameter is stored in x out


class Capture(TorchFunctionMode):
    """While it is entered, reports every product of an activation with a matrix parameter of a module.

    Because it is active, torch does not take the fast path of its transformer layers, which would hide them.

    Args:
        module: Whose parameters are watched.
        see: Called at every use.
    """

    def __init__(self, module: nn.Module, see: Callable[[Use], None]) -> None:
        super().__init__()
        self.names = {id(value): name for name, value in parameters(module).items() if value.ndim == 2}
        self.see = see

    def __torch_function__(
        self, func: Callable, types: Collection[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Report, then compute as usual."""
        kwargs = dict(kwargs or {})
        if func is functional.multi_head_attention_forward:
            return self._attention(ATTENTION.bind(*args, **kwargs).arguments)
        if func is functional.linear:
            arguments = dict(zip(("input", "weight"), args, strict=False)) | kwargs
            self._report(arguments["weight"], arguments["input"])
        elif func in (torch.matmul, Tensor.matmul, Tensor.__matmul__) and len(args) == 2:
            self._report(args[1], args[0], transposed=True)
        elif func in (torch.addmm, Tensor.addmm) and len(args) == 3:
            self._report(args[2], args[1], transposed=True)
        return func(*args, **kwargs)

    def _report(self, weight: Any, inputs: Tensor, *, sequence_first: bool = False, transposed: bool = False) -> None:
        if name := self.names.get(id(weight)):
            self.see(Use(name, inputs, sequence_first, transposed))

    def _attention(self, arguments: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Attend with the identity as output projection, whose result is what the real one multiplies."""
        query, key, value = (arguments[name] for name in ("query", "key", "value"))
        if query is key and key is value:
            self._report(arguments["in_proj_weight"], query, sequence_first=True)
        if arguments.get("use_separate_proj_weight"):
            for letter, inputs in zip("qkv", (query, key, value), strict=True):
                self._report(arguments[f"{letter}_proj_weight"], inputs, sequence_first=True)
        weight, bias = arguments["out_proj_weight"], arguments["out_proj_bias"]
        identity = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        plain = arguments | {"out_proj_weight": identity, "out_proj_bias": None}
        heads, attention = functional.multi_head_attention_forward(**plain)
        self._report(weight, heads, sequence_first=True)
        return functional.linear(heads, weight, bias), attention


class GramFitter(Fitter):
    """Sums outer products in fp64.

    Args:
        encoder: The model.
        wanted: Names of the parameters of interest; None takes all.
    """

    def __init__(self, encoder: nn.Module, wanted: Collection[str] | None = None) -> None:
        self.encoder, self.wanted = encoder, wanted
        self.sums: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}
        self.transposed: set[str] = set()

    def update(self, batch: Batch) -> None:
        """Take in examples; see `Fitter.update`."""
        self.add(batch.inputs)

    def add(self, inputs: Mapping[str, Tensor]) -> None:
        """Run a batch through the encoder and add what its matrices multiply."""
        last: tuple[Tensor, int, Tensor, int] | None = None

        def see(use: Use) -> None:
            nonlocal last
            if self.wanted is not None and use.parameter not in self.wanted:
                return
            version = use.inputs._version
            if last is None or last[0] is not use.inputs or last[1] != version:  # q, k and v multiply one tensor
                rows = real_rows(use, inputs.get("attention_mask")).double()
                last = use.inputs, version, rows.T @ rows, len(rows)
            self._add(use, *last[2:])

        with torch.no_grad(), Capture(self.encoder, see):
            self.encoder(**inputs)

    def _add(self, use: Use, product: Tensor, rows: int) -> None:
        self.sums[use.parameter] = self.sums.get(use.parameter, 0) + product
        self.rows[use.parameter] = self.rows.get(use.parameter, 0) + rows
        if use.transposed:
            self.transposed.add(use.parameter)

    def means(self) -> dict[str, Tensor]:
        """Return the sums divided by their rows, in fp64."""
        means = {name: product / max(1, self.rows[name]) for name, product in self.sums.items()}
        return {name: mean.unsqueeze(0) if name in self.transposed else mean for name, mean in means.items()}

    def finish(self) -> dict[str, Tensor]:
        """Return the Grams in fp32; see `Fitter.finish`."""
        return {name: mean.float() for name, mean in self.means().items()}


def grams(encoder: nn.Module, batches: Iterable[Mapping[str, Tensor]], wanted: Collection[str]) -> dict[str, Tensor]:
    """Return fp64 Grams of the inputs of some parameters; see `Gram`.

    Args:
        encoder: The model, in evaluation mode.
        batches: Keyword inputs on the encoder's device.
        wanted: Canonical parameter names; those that no captured input multiplies are left out.

    Returns:
        Parameter name to ``[n, n]``, or ``[1, n, n]`` if it is stored in x out; divided by the number of rows.
    """
    fitter = GramFitter(encoder, wanted)
    for inputs in batches:
        fitter.add(inputs)
    return fitter.means()


def order(encoder: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> list[list[str]]:
    """Return the matrix parameters that Grams cover, in the order in which a forward pass uses them first.

    Args:
        encoder: The model, in evaluation mode.
        batches: Keyword inputs on the encoder's device; a single example will do.

    Returns:
        Groups of canonical names; those of a group multiply the same tensor.
    """
    groups: list[list[str]] = []
    last: Tensor | None = None

    def see(use: Use) -> None:
        nonlocal last
        if not any(use.parameter in group for group in groups):
            if groups and last is use.inputs:
                groups[-1].append(use.parameter)
            else:
                groups.append([use.parameter])
        last = use.inputs

    with torch.no_grad(), Capture(encoder, see):
        for inputs in batches:
            encoder(**inputs)
    return groups


def real_rows(use: Use, mask: Tensor | None) -> Tensor:
    """Return the rows ``[R, n]`` of an activation that are not padding.

    Args:
        use: Where it was captured.
        mask: ``[B, L]``, 1 where there is a token; applies to activations ``[B, L, n]`` and ``[B L, n]``.
    """
    inputs = use.inputs
    if mask is not None and inputs.ndim in (2, 3):
        mask = mask.T if use.sequence_first else mask
        mask = mask.flatten() if inputs.ndim == 2 else mask
        if mask.shape == inputs.shape[:-1]:
            return inputs[mask.bool()]
    return inputs.reshape(-1, inputs.shape[-1])

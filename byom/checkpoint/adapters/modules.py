"""Map packed differences to the modules of the model that a PEFT adapter is loaded onto."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from byom.checkpoint.adapters.tied import tied_names
from byom.errors import CheckpointError, OptionError, listed
from byom.functional.tensors import finite, packs_experts
from byom.variants.base.delta import Delta, Parts, Served
from byom.weights import Weights
from byom.weights.fused import PARTS, Rows, module_of
from byom.weights.lowrank import Piece

FACTOR = re.compile(r"(left|singular|right)(@\d+)?")
REMEDY = "byom=lora byom.rest=drop leaves such at the reference, and a bundle (byom pack) holds everything"

TIED = "save a bundle (byom pack), which holds everything, or fine-tune without the embeddings (finetune=lora)"


class Site(NamedTuple):
    """One tensor of a module: some or all rows of a parameter as it is stored.

    Args:
        path: The module, without the prefix.
        kind: The tensor's name in the module, such as ``weight``.
        rows: Where it lies in the stored weights.
    """

    path: str
    kind: str
    rows: Rows


class SiteFactors(NamedTuple):
    """The low-rank difference of one module: ``W + up @ down``, W flattened to ``[shape[0], rest]``.

    Args:
        site: The tensor that is adapted.
        up: ``[m, r]``.
        down: ``[r, n]``.
    """

    site: Site
    up: Tensor
    down: Tensor


class TaskAdapter(NamedTuple):
    """The contents of one task's adapter.

    Args:
        factors: Module path to its low-rank difference.
        biases: Trained biases of those modules.
        saved: Paths of the modules that are stored whole.
    """

    factors: dict[str, SiteFactors]
    biases: list[Site]
    saved: list[str]


@dataclass(frozen=True)
class Modules:
    """The modules of a model, by their paths, and the tensors of its stored weights that each of them has.

    Args:
        reference: The weights that differences were taken to.
        prefix: Start of every parameter's name that is missing in the plain model's.
        module: The model, to look the types of its modules up; None takes every matrix for a linear layer.
        apart: Whether adapters go onto a model that `byom.backbone.split_attention.split` took apart.
        tied: Names of parameters that are one tensor with another in the model.
    """

    reference: Weights
    prefix: str
    module: nn.Module | None
    apart: bool
    tied: frozenset[str] = frozenset()

    @classmethod
    def of(cls, served: Served, prefix: str, module: nn.Module | None, base_model: str = "") -> Modules:
        """Return modules that fit all tasks: taken apart if attention is fused and cannot be adapted as it is.

        What is tied is asked of the weights, of the module and, if it is a folder, of the base model's configuration.
        """
        reference = served.reference
        fused = any(name.endswith("in_proj_weight") for name in reference)
        partial = any(
            len(value) < reference.shape(name)[0]
            for delta in served.deltas.values()
            for name, parts in delta.parts.items()
            for part, value in parts.items()
            if part.startswith("left") and name in reference
        )
        return cls(reference, prefix, module, fused or partial, tied_names(reference, prefix, module, base_model))

    @cached_property
    def tensors(self) -> dict[str, list[Site]]:
        """Module path to all its tensors."""
        tensors: dict[str, list[Site]] = {}
        for name in self.reference:
            if name.startswith(self.prefix):
                for site in self.sites(name):
                    tensors.setdefault(site.path, []).append(site)
        return tensors

    def sites(self, name: str) -> list[Site]:
        """Return the tensors that a parameter consists of: three where fused attention is taken apart."""
        if not name.startswith(self.prefix):
            raise OptionError(f"'{name}' does not start with the prefix '{self.prefix}', which is to be removed")
        stem, _, last = name.removeprefix(self.prefix).rpartition(".")
        height = self.reference.shape(name)[0] if self.reference.shape(name) else 1
        if not self._fused(stem, last):
            return [Site(stem, last, Rows(name, 0, height))]
        third, kind = height // len(PARTS), last.removeprefix("in_proj_")
        rows = [Rows(name, part * third, third) for part in range(len(PARTS))]
        paths = [module_of(*each, self.reference).removeprefix(self.prefix) for each in rows]
        return [Site(path, kind, each) for path, each in zip(paths, rows, strict=True)]

    def value(self, site: Site, weights: Weights) -> Tensor:
        """Return a module's tensor in some weights."""
        stored = weights.read_finite(site.rows.name)
        return stored[site.rows.start : site.rows.start + site.rows.height] if stored.ndim else stored

    def moved(self, site: Site, weights: Weights) -> bool:
        """Say whether a module's tensor differs from the reference's."""
        return not torch.equal(self.value(site, weights), self.value(site, self.reference))

    def role(self, site: Site) -> str:
        """Say what kind of layer adapts a module: ``linear``, ``transposed``, ``embedding`` or ``conv``.

        Raises:
            OptionError: If none does, or the module's type would have to be known.
        """
        dims = len(self.reference.shape(site.rows.name))
        if site.kind != "weight" or not site.path or dims < 2:
            raise _unadaptable(site, "a parameter of its own")
        if self.module is None and dims == 2 and "embed" in site.path:
            raise OptionError(f"'{site.path}' may be an embedding or a linear layer; give module= to tell which")
        if self.module is None or site.rows.height < self.reference.shape(site.rows.name)[0]:
            return "linear" if dims == 2 else "conv"  # a third of fused attention: linear once it is taken apart
        module = self.module.get_submodule(self.prefix + site.path)
        role = _role(module)
        if role is None:
            raise _unadaptable(site, f"a {type(module).__name__}")
        return role

    def factors(self, delta: Delta) -> dict[str, SiteFactors]:
        """Return a task's low-rank differences by module path, none if it has none.

        Raises:
            OptionError: If an adapter cannot hold the difference.
            CheckpointError: If a value is not finite.
        """
        factors: dict[str, SiteFactors] = {}
        for name, parts in sorted(delta.parts.items()):
            _require(self, delta, name, parts)
            factors |= self._factors(name, parts)
        return factors

    def spare(self, served: Served) -> dict[str, SiteFactors]:
        """Return factors of rank 1 that change nothing: PEFT does not load an adapter without any.

        Raises:
            OptionError: If no task has a low-rank difference.
        """
        for delta in served.deltas.values():
            for name, parts in sorted(delta.parts.items()):
                if name in self.reference and _factored(parts):
                    path, (site, up, down) = next(iter(self._factors(name, parts).items()))
                    return {path: SiteFactors(site, torch.zeros_like(up[:, :1]), torch.zeros_like(down[:1]))}
        title = next((delta.variant.title for delta in served.deltas.values()), "a bundle without tasks")
        raise OptionError(f"{title} has no low-rank difference, which is what adapters hold; use byom=lora")

    def adapter(self, factors: dict[str, SiteFactors], delta: Delta, weights: Weights) -> TaskAdapter:
        """Return the contents of a task's adapter: its factors, and what else moved.

        Args:
            factors: Module path to its low-rank difference, at least one.
            delta: The task's packed difference.
            weights: The task's weights.

        Raises:
            OptionError: If an adapter cannot hold the difference.
        """
        wholes = [name for name, parts in sorted(delta.parts.items()) if not _factored(parts)]
        changed = [site for name in wholes for site in self.sites(name) if self.moved(site, weights)]
        biases = [site for site in changed if site.path in factors and site.kind == "bias"]
        return TaskAdapter(factors, biases, self.saved([site for site in changed if site not in biases], factors))

    def saved(self, sites: Collection[Site], adapted: Collection[str]) -> list[str]:
        """Return the modules that have to be stored whole for some of their tensors to be stored.

        PEFT finds them by the end of their path, so that others with the same end are stored with them.

        Args:
            sites: The tensors.
            adapted: Paths of the modules with factors, which cannot be stored whole as well.

        Raises:
            OptionError: If a tensor does not lie in a module that can be stored on its own.
        """
        ends = {site.path for site in sites}
        holders = {".".join(path.split(".")[:end]) for path in self.tensors for end in range(1, path.count(".") + 1)}
        odd = [s.rows.name for s in sites if s.path in holders or s.path in adapted or not s.path]
        if odd:
            raise OptionError(f"PEFT keeps whole modules only and cannot hold {listed(odd)}: {REMEDY}")
        paths = {path for path in {*self.tensors, *holders} if any(path.endswith(end) for end in ends)}
        if clash := sorted(paths & (holders | set(adapted))):
            raise OptionError(f"PEFT would take '{clash[0]}' for one of the modules kept whole, by its end: {REMEDY}")
        return sorted(paths)

    def _fused(self, stem: str, last: str) -> bool:
        if last in ("in_proj_weight", "in_proj_bias"):
            return True
        return self.apart and stem.rpartition(".")[2] == "qkv" and last in ("weight", "bias")

    def _factors(self, name: str, parts: Parts) -> dict[str, SiteFactors]:
        factors: dict[str, SiteFactors] = {}
        shape = self.reference.shape(name)
        if packs_experts(name, shape):
            raise OptionError(
                f"'{name}' packs the matrices of {shape[0]} experts in one tensor, for which the export writes no "
                "adapter: save a bundle (byom pack), which holds everything"
            )
        for piece in pieces(parts):
            for site in self.sites(name):
                if (up := _cut(piece, site.rows)) is not None:
                    self.role(site)
                    factors[site.path] = SiteFactors(site, up, piece.right)
        return factors


def pieces(parts: Parts) -> list[Piece]:
    """Return the low-rank differences among the parts of one parameter, the singular values in both factors."""
    low_rank: list[Piece] = []
    for mark in sorted(part.removeprefix("left") for part in parts if part.startswith("left")):
        left, right = parts[f"left{mark}"], parts[f"right{mark}"]
        root = parts[f"singular{mark}"].sqrt() if f"singular{mark}" in parts else left.new_ones(left.shape[1])
        low_rank.append(Piece(int(mark.removeprefix("@") or 0), left * root, root[:, None] * right))
    return low_rank


def _cut(piece: Piece, rows: Rows) -> Tensor | None:
    """Return the part of a difference's left factor that belongs to some rows, None if no row of it does."""
    first, last = rows.start - piece.start, rows.start + rows.height - piece.start
    if last <= 0 or first >= len(piece.left):
        return None
    if first < 0 or last > len(piece.left):
        end = piece.start + len(piece.left)
        raise OptionError(f"rows {piece.start} to {end} of '{rows.name}' are not a module's own; {REMEDY}")
    return piece.left[first:last]


def _require(modules: Modules, delta: Delta, name: str, parts: Mapping[str, Tensor]) -> None:
    """Refuse what is neither low-rank nor whole, what is tied, and what is not finite."""
    if not _factored(parts) and not _whole(modules.reference, name, parts):
        raise OptionError(
            f"{delta.variant.title} has no low-rank difference of '{name}', which is what adapters hold; use byom=lora"
        )
    if name in modules.tied:
        remedy = TIED if _factored(parts) else REMEDY
        raise OptionError(f"'{name}' is tied to another parameter, which an adapter would not change with it: {remedy}")
    if any(t.is_floating_point() and t.numel() and not finite(t) for t in parts.values()):
        raise CheckpointError(f"the difference of '{name}' holds NaN or infinity; pack it again")


def _factored(parts: Mapping[str, Tensor]) -> bool:
    return all(FACTOR.fullmatch(part) for part in parts)


def _whole(reference: Weights, name: str, parts: Mapping[str, Tensor]) -> bool:
    count = torch.Size(reference.shape(name)).numel() if name in reference else None
    return "values" in parts and parts["values"].numel() == count


def _role(module: nn.Module) -> str | None:
    if type(module).__name__ == "Conv1D":  # of transformers: a linear layer whose matrix is [inputs, outputs]
        return "transposed"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "conv" if module.groups == 1 else None
    return "linear" if isinstance(module, nn.Linear) else "embedding" if isinstance(module, nn.Embedding) else None


def _unadaptable(site: Site, what: str) -> OptionError:
    return OptionError(
        f"PEFT cannot adapt '{site.rows.name}', which is {what}: fine-tune with finetune=lora, which leaves it alone, "
        "or save a bundle (byom pack), which holds everything"
    )

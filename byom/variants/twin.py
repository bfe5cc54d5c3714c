"""Twin-Merging: a merged model with shared knowledge, and compressed exclusive knowledge of each task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from byom.errors import OptionError, fraction, one_of
from byom.functional.seeding import keyed
from byom.functional.selection import kept, top_mask
from byom.functional.tensors import wide
from byom.merge.base.matrices import is_matrix, is_stack
from byom.variants.base import Parts, Shared, sparse
from byom.variants.base import factors as truncated
from byom.variants.base.quantised import CompactVariant
from byom.variants.base.unpacker import Entries
from byom.weights import Weights


@dataclass(frozen=True)
class TwinMerging(CompactVariant):
    """Put back each task's exclusive knowledge ``theta_t - theta_merged``, compressed tensor by tensor.

    Inference uses ``theta_merged + v_t``, where ``v_t`` is the compressed difference.

    ``magnitude`` keeps the top m % of each tensor; ``bernoulli`` keeps each entry with probability m and multiplies
    it by 1/m, so that its expectation is the whole; ``svd`` keeps ``floor(m * min(m, n))`` singular values of each
    matrix, in fp32. Tensors that are not compressed are stored whole: those with fewer than two axes, and for
    ``svd`` all that are not matrices.

    The router is another option (``router=``); with the task known, ``magnitude`` is BYOM-FFT of scope ``tensor``
    except for the tensors stored whole.

    Args:
        density: Fraction kept of each tensor's entries, or of each matrix's singular values (m), in [0, 1].
        compress: ``magnitude``, ``bernoulli`` or ``svd``.
        seed: Seeds ``bernoulli``, together with the expert's own values and the parameter's name.
        values: ``native``, or the bits of differences and singular vectors; see `QuantisedVariant`.
        positions: ``bytes`` or ``entropy``; see `CompactVariant`.

    Raises:
        OptionError: If a hyperparameter is out of range.

    References:
        Twin-Merging: Dynamic Integration of Modular Expertise in Model Merging, section 3.
        https://arxiv.org/abs/2406.15479

    Differences:
        The authors leave parameters named ``*bias*`` and ``*classifier*`` out of merging; here heads are never
        part of a model, and biases, having one axis, are stored whole. Kept entries are values of the result and
        not differences, so that ``magnitude`` at density 1 is theta_t bit for bit.
    """

    density: float = 0.2
    compress: Literal["magnitude", "bernoulli", "svd"] = "magnitude"
    seed: int = 0

    title = "Twin-Merging"
    stores = "m d values and their positions, or m of the singular values; tensors with one axis whole"
    on = "merged"

    def __post_init__(self) -> None:
        super().__post_init__()
        fraction("byom.density", self.density)
        one_of("byom.compress", self.compress, ("magnitude", "bernoulli", "svd"))
        if self.compress == "svd" and self.positions != "bytes":
            raise OptionError(
                "byom.compress=svd stores no positions, which byom.positions codes; leave one of them out"
            )

    def plan(self, target: Weights, reference: Weights, base: Weights | None = None) -> str:
        """Return what tells this expert's randomness from another's; the names of tasks do not matter."""
        return target.fingerprint() if self.compress == "bernoulli" else ""

    def pack(self, name: str, target: Tensor, shared: Shared, plan: str) -> Parts:
        """Store the compressed difference of one parameter."""
        matrix = is_matrix(name, target.shape) or is_stack(name, target.shape)
        if target.ndim < 2 or (self.compress == "svd" and not matrix):
            return sparse.whole(target, shared.reference)
        delta = wide(target) - wide(shared.reference)
        if self.compress == "svd":
            return truncated.factor(delta, kept(self.density, min(target.shape[-2:])))
        if self.compress == "magnitude" or self.density in (0, 1):
            return sparse.gather(target, top_mask(delta, self.density))
        rescaled = (wide(shared.reference) + delta / self.density).to(target.dtype)
        mask = chosen(target.shape, self.density, keyed(self.seed, plan, name)).to(delta.device) & (delta != 0)
        return sparse.gather(rescaled, mask)

    def unpack(self, parts: Parts, shared: Shared) -> Tensor:
        """Put values back at their positions, or add the product of the factors."""
        return (sparse.assign if "values" in parts else truncated.add)(parts, shared.reference)

    def entries(self, parts: Parts, numel: int) -> Entries | None:
        """Return stored values and their positions, nothing for factors."""
        return sparse.entries(parts, numel)


def chosen(shape: tuple[int, ...], density: float, seed: int) -> Tensor:
    """Choose entries at random.

    Args:
        shape: Shape of the result.
        density: Probability of each.
        seed: Seeds the choice.

    Returns:
        Bool ``[*shape]``.
    """
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density

"""TSV-Compress: each task's largest singular vectors of every matrix."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from byom.errors import OptionError, fraction
from byom.functional.selection import kept
from byom.functional.tensors import wide
from byom.merge.base import Problem
from byom.merge.base.matrices import is_matrix, is_stack
from byom.variants.base import Parts, Shared, sparse
from byom.variants.base import factors as truncated
from byom.variants.base.quantised import QuantisedVariant
from byom.weights import Weights


@dataclass(frozen=True)
class TaskSingularVectorsCompress(QuantisedVariant):
    """Store each matrix of a task vector as its ``1/T`` largest singular values and their vectors.

    ``tau_t ~ U_k diag(s_k) Vt_k`` with ``k = floor(share * min(m, n))`` but at least 1, in fp32; inference uses
    ``theta_0 + U_k diag(s_k) Vt_k``. Experts of a mixture that lie in one tensor are one matrix each. Other tensors are
    stored whole, and unchanged ones are not stored.

    Args:
        share: Fraction of a matrix's singular values that a task keeps, in (0, 1]. None divides them evenly among
            the tasks served together, so that all tasks take as many as one model has.
        values: ``native``, or the bits of singular vectors and of other tensors; see `QuantisedVariant`.

    Raises:
        OptionError: If a hyperparameter is out of range.

    References:
        Task Singular Vectors: Reducing Task Interference in Model Merging, section 4.1 (TSV-Compress).
        https://arxiv.org/abs/2412.00081

    Differences:
        Where a matrix has a side below T, k is 0 in the authors' code and the matrix keeps its pre-trained values;
        here one singular value stays. Matrices with a side of 1 are stored whole, which is smaller. Results depend
        on how attention is stored: fused (open_clip) or as three matrices.
    """

    share: float | None = None

    title = "TSV-Compress"
    low_rank = True
    stores = "k (m + n + 1) values per matrix, other tensors whole"
    on = "pretrained"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share is not None and not fraction("byom.share", self.share):
            raise OptionError("byom.share=0 would keep nothing; use a fraction above 0, or null for 1 / tasks")

    def suited(self, problem: Problem, reference: Weights) -> TaskSingularVectorsCompress:
        """Give every task its share of the singular values; see `PackingVariant.suited`."""
        return replace(self, share=1 / len(problem.tasks)) if self.share is None else self

    def pack(self, name: str, target: Tensor, shared: Shared, plan: Any) -> Parts:
        """Store a matrix's factors, or all values of another tensor."""
        if not (is_matrix(name, target.shape) or is_stack(name, target.shape)):
            return sparse.whole(target, shared.reference)
        share = 1.0 if self.share is None else self.share  # a task packed alone has no other to divide with
        return truncated.factor(wide(target) - wide(shared.reference), max(1, kept(share, min(target.shape[-2:]))))

    def unpack(self, parts: Parts, shared: Shared) -> Tensor:
        """Add the product to theta_0, or put all values back."""
        return (sparse.assign if "values" in parts else truncated.add)(parts, shared.reference)

"""The rows of `benchmarks.peers`: a method, what each tool is told for it, and in which sense results are the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.peers_models import RANK
from byom.merge.average import Average
from byom.merge.dare import Dare
from byom.merge.iso_c import IsotropicMergingCommon
from byom.merge.knots import KnowledgeOrientationThroughSvd
from byom.merge.task_arithmetic import TaskArithmetic
from byom.merge.ties import Ties
from byom.merge.tsv import TaskSingularVectors
from byom.merge.wudi import Wudi

PACKAGES = {"byom": "byom", "mergekit": "mergekit", "fusion-bench": "fusion-bench", "PEFT": "peft"}
"""Tools, in the order in which they are run and shown, to what is installed for them."""
FULL, ADAPTERS = ("byom", "mergekit", "fusion-bench"), ("byom", "PEFT")


@dataclass(frozen=True)
class Work:
    """What one tool does.

    Args:
        how: Which of `benchmarks.peers_tools.WORK`.
        told: What it is told.
        equal: How close the result must be to byom's, as `benchmarks.peers_compare.difference` measures it; None
            where it is another function.
        why: Why it is another function, or what is to be known.
    """

    how: str
    told: Any
    equal: float | None = None
    why: str = ""


@dataclass(frozen=True)
class Row:
    """One method.

    Args:
        title: What is shown.
        tools: The tools that have it, to what they do.
        absent: Tools that lack it, to why, where there is more to say than that.
        adapters: Whether adapters are merged into one.
    """

    title: str
    tools: Mapping[str, Work]
    absent: Mapping[str, str]
    adapters: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """The tools that could have it."""
        return ADAPTERS if self.adapters else FULL


def _row(title: str, tools: Mapping[str, Work], adapters: bool = False, **absent: str) -> Row:
    return Row(title, tools, {name.replace("_", "-"): why for name, why in absent.items()}, adapters)


def _mergekit(method: str, equal: float | None = 1e-4, why: str = "", each: Any = None, **shared: Any) -> Work:
    told = {"method": method, "each": {"weight": 1.0, **(each or {})}, "all": shared}
    return Work("mergekit", told, equal, why)


def _fusion(algorithm: str, equal: float | None = 1e-4, why: str = "", **options: Any) -> Work:
    told = {"algorithm": f"fusion_bench.method.{algorithm}", "options": options}
    return Work("fusion-bench", told, equal, why)


def _byom(method: Any, adapters: bool = False, why: str = "") -> Work:
    return Work("byom adapter" if adapters else "byom", method, None, why)


def _peft(kind: str, equal: float | None = None, why: str = "", **options: Any) -> Work:
    return Work("PEFT", {"combination_type": kind, **options}, equal, why)


FLIPS = "draws other coin flips"
APART = "PEFT combines A and B apart, byom the products"

ROWS: Mapping[str, Row] = {
    "average": _row(
        "averaging",
        {
            "byom": _byom(Average()),
            "mergekit": _mergekit("linear", normalize=True),
            "fusion-bench": _fusion("simple_average:SimpleAverageAlgorithm"),
        },
    ),
    "task_arithmetic": _row(
        "Task Arithmetic",
        {
            "byom": _byom(TaskArithmetic(0.3)),
            "mergekit": _mergekit("task_arithmetic", normalize=False, **{"lambda": 0.3}),
            "fusion-bench": _fusion("task_arithmetic:TaskArithmeticAlgorithm", scaling_factor=0.3),
        },
    ),
    "dare": _row(
        "DARE, Task Arithmetic",
        {
            "byom": _byom(Dare(TaskArithmetic(0.3), 0.5)),
            "mergekit": _mergekit(
                "dare_linear",
                None,
                f"{FLIPS} and rescales to the L1 norm",
                each={"density": 0.5},
                normalize=False,
                rescale=True,
                **{"lambda": 0.3},
            ),
            "fusion-bench": _fusion(
                "dare:DareTaskArithmetic",
                None,
                FLIPS,
                scaling_factor=0.3,
                sparsity_ratio=0.5,
                only_on_linear_weights=False,
            ),
        },
    ),
    "ties": _row(
        "TIES, ranking a whole model",
        {
            "byom": _byom(Ties(0.2, 1.0)),
            "fusion-bench": _fusion(
                "ties_merging:TiesMergingAlgorithm",
                1e-2,
                "keeps one entry more for each task",
                scaling_factor=1.0,
                threshold=20,
                remove_keys=[],
                merge_func="mean",
            ),
        },
        mergekit="ranks each tensor on its own, see below",
    ),
    "ties_tensor": _row(
        "TIES, ranking each tensor",
        {
            "byom": _byom(Ties(0.2, 1.0, scope="tensor")),
            "mergekit": _mergekit(
                "ties", 1e-2, "keeps others of the entries that tie", each={"density": 0.2}, normalize=True
            ),
        },
        fusion_bench="ranks the whole model, see above",
    ),
    "iso_c": _row(
        "Iso-C",
        {
            "byom": _byom(IsotropicMergingCommon(1.0)),
            "fusion-bench": _fusion("isotropic_merging:ISO_C_Merge", 1e-3, scaling_factor=1.0),
        },
    ),
    "tsv": _row(
        "TSV-M",
        {
            "byom": _byom(TaskSingularVectors(1.0)),
            "fusion-bench": _fusion("task_singular_vector:TaskSingularVectorMerging", 1e-3),
        },
    ),
    "wudi": _row(
        "WUDI, 30 of its 300 steps",
        {
            "byom": _byom(Wudi(steps=30, rest="mean", exclude=())),
            "fusion-bench": _fusion("wudi.wudi:WUDIMerging", 1e-2, iter_num=30),
        },
    ),
    "knots": _row(
        "KnOTS over TIES",
        {
            "byom": _byom(KnowledgeOrientationThroughSvd(Ties(0.2))),
            "fusion-bench": Work("fusion-bench knots", {}, None, "the decomposition alone, nothing merged or written"),
        },
    ),
    "lora_average": _row(
        "adapters, exact mean",
        {"byom": _byom(Average(), True), "PEFT": _peft("cat", 1e-4, "cat")},
        True,
    ),
    "lora_svd": _row(
        f"adapters, mean cut to rank {RANK}",
        {"byom": _byom(RANK, True), "PEFT": _peft("svd", 1e-3, "svd", svd_rank=RANK, svd_full_matrices=False)},
        True,
    ),
    "lora_ties": _row(
        "adapters, TIES",
        {
            "byom": _byom(KnowledgeOrientationThroughSvd(Ties(0.2)), True, "TIES in the basis of KnOTS"),
            "PEFT": _peft("ties", None, APART, density=0.2),
        },
        True,
    ),
    "lora_dare": _row(
        "adapters, DARE",
        {"PEFT": _peft("dare_linear", None, "drops entries of A and B apart", density=0.5)},
        True,
        byom="products with dropped entries are no adapter",
    ),
}
"""Name of each row to it, what takes least time first."""

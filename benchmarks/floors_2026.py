"""The options of 2025 and 2026 on eight experts of ViT-B/32's layers, beside their floors: products and memory.

    python -m benchmarks.floors_2026 --json benchmarks/floors_2026.json

As `benchmarks.floors` does, a layer's four matrices are measured and scaled to twelve. A floor is the operations of the
direct algorithm over the rate of matrix products in their precision, and the bytes that have to be read over the rate
of a sum of tensors beyond the caches. What a variant reads is every expert and the reference, once each. Figures are
processor time of one thread.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from benchmarks import floors
from benchmarks.floors import LAYERS, SHAPES, TASKS, Operations, eigenvectors, few, noise, problem, rate
from benchmarks.options import conclude, parser
from byom.merge.base import Problem
from byom.merge.cart import CenteredArithmeticWithRankReducedTaskVectors as Cart
from byom.merge.dc import DirectionalConsistency
from byom.merge.fr import FrequencyMerging
from byom.merge.lines import LayerIncreasingNetworkScaling
from byom.merge.svc import SingularValueCalibration
from byom.merge.task_arithmetic import TaskArithmetic
from byom.merge.task_grams import TaskGrams
from byom.variants.base import Variant
from byom.variants.bitdelta import BitDelta
from byom.variants.budget import ByomBudget
from byom.variants.dts import DecompositionThresholdingScaling
from byom.variants.flex import FlexMerge
from byom.variants.tvq import TaskVectorQuantisation
from byom.variants.ultradelta import UltraDelta
from byom.weights import Weights

SHARE = 6  # of the singular values that BYOM-Budget looks for, one in so many
NUMBERS = 1 << 26  # of each tensor that the rate of memory is measured with


class Row(NamedTuple):
    """One option.

    Args:
        title: What the table calls it.
        work: Does it for a layer's models, the second being the mean of the experts.
        operations: Of a matrix, in fp64 and fp32.
        models: How many models have to be read.
    """

    title: str
    work: Callable[[Problem, Weights], object]
    operations: Callable[[int, int], Operations]
    models: int


def merged(method) -> Callable[[Problem, Weights], object]:
    """Merge all parameters."""
    return lambda models, _: method(models).state()


def packed(variant: Variant) -> Callable[[Problem, Weights], object]:
    """Pack every task against the second model, or theta_0 if the variant wants it."""

    def work(models: Problem, mean: Weights) -> object:
        deltas = variant.merged_by(TaskArithmetic(1 / TASKS)).streamed(models, mean).deltas
        return [deltas[task] for task in models.tasks]

    return work


def none(m: int, n: int) -> Operations:
    """Return no operations: memory is all there is."""
    return 0, 0


def svd(m: float, n: float) -> float:
    """Return the operations of all singular values and vectors by the square."""
    long, short = max(m, n), min(m, n)
    return 3 * long * short**2 + eigenvectors(short)


def grams(m: int, n: int) -> Operations:
    """Return the operations of ASWUDI: each task's square and its product with the task, and a solution."""
    return TASKS * 3 * m * n**2 + 2 * m * n**2 + eigenvectors(n) + 4 * m * n**2, 0


def calibrated(m: int, n: int) -> Operations:
    """Return the operations of SVC."""
    return svd(m, n) + (TASKS + 1) * 2 * m * n * min(m, n), 0


def cart(m: int, n: int) -> Operations:
    """Return the operations of CART at a rank of 8 %."""
    rank = int(0.08 * min(m, n))
    return TASKS * (few(m, n, rank) + 2 * m * n * rank), 0


def transforms(m: int, n: int) -> Operations:
    """Return the operations of a complex Fourier transform there and back."""
    return 2 * 5 * m * n * math.log2(m * n), 0


def norms(m: int, n: int) -> Operations:
    """Return the operations of UltraDelta's sums of singular values: a square, and its eigenvalues alone."""
    return TASKS * (max(m, n) * min(m, n) ** 2 + 4 / 3 * min(m, n) ** 3), 0


def similar(m: int, n: int) -> Operations:
    """Return the operations of all inner products between tasks."""
    return 0, TASKS * (TASKS + 1) * m * n


def budget(m: int, n: int) -> Operations:
    """Return the operations of BYOM-Budget: the metric, and singular vectors in it."""
    return TASKS * (2 * m * n**2 + n**3 / 3 + few(m, n, min(m, n) // SHARE)), 0


ROWS = {
    "task_grams": Row("ASWUDI", merged(TaskGrams()), grams, TASKS + 1),
    "svc": Row("SVC of Task Arithmetic", merged(SingularValueCalibration(TaskArithmetic())), calibrated, 2 * TASKS + 2),
    "lines": Row("LiNeS", merged(LayerIncreasingNetworkScaling(TaskArithmetic())), none, TASKS + 1),
    "cart": Row("CART", merged(Cart()), cart, TASKS + 1),
    "dc": Row("DC-Merge", merged(DirectionalConsistency()), floors.tsv, TASKS + 1),
    "fr": Row("FR-Merging", merged(FrequencyMerging()), transforms, TASKS + 1),
    "bitdelta": Row("BitDelta", packed(BitDelta()), none, 2 * TASKS),
    "tvq": Row("TVQ", packed(TaskVectorQuantisation()), none, 2 * TASKS),
    "ultradelta": Row("UltraDelta", packed(UltraDelta()), norms, 2 * TASKS),
    "dts": Row("DTS", packed(DecompositionThresholdingScaling()), lambda m, n: (TASKS * svd(m, n), 0), 2 * TASKS),
    "flex": Row("FlexMerge, size 4", packed(FlexMerge(size=4.0)), similar, TASKS + 1),
    "budget": Row("BYOM-Budget, 300 kB", packed(ByomBudget(300 / LAYERS)), budget, 2 * TASKS),
}


def memory(repeats: int = 5) -> float:
    """Return the bytes per second of processor time that a sum reads."""
    numbers = torch.ones(NUMBERS)
    times = []
    for _ in range(repeats):
        start = time.process_time()
        numbers.sum()
        times.append(time.process_time() - start)
    return 4 * NUMBERS / min(times)


def measure(only: Iterable[str]) -> dict:
    """Measure the rates, and each option on one layer."""
    double, single = (rate(dtype, torch.device("cpu"))[1] for dtype in (torch.float64, torch.float32))
    result = {
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "rates": {"float64": double, "float32": single, "bytes": memory()},
        "rows": {},
    }
    layer = {name: noise(shape, 0) for name, shape in SHAPES.items()}
    models = problem(layer)
    mean = Weights.of({name: deltas.mean(0) for name, deltas in layer.items()})
    numbers = sum(m * n for m, n in SHAPES.values())
    for name in only:
        row = ROWS[name]
        start = time.process_time()
        row.work(models, mean)
        taken = LAYERS * (time.process_time() - start)
        counts = [sum(each) for each in zip(*(row.operations(*shape) for shape in SHAPES.values()), strict=True)]
        seconds = counts[0] / double + counts[1] / single
        read = 4 * numbers * row.models / result["rates"]["bytes"]
        result["rows"][name] = {
            "title": row.title,
            "products": LAYERS * seconds,
            "memory": LAYERS * read,
            "seconds": taken,
        }
    return result


def table(result: dict) -> str:
    """A Markdown table of floors and seconds."""
    lines = ["| option | floor s: products, memory | s | times floor |", "|---|--:|--:|--:|"]
    for row in result["rows"].values():
        floor = row["products"] + row["memory"]
        parts = f"{row['products']:.1f}, {row['memory']:.1f}"
        lines.append(f"| {row['title']} | {parts} | {row['seconds']:.1f} | {row['seconds'] / floor:.1f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write on request."""
    given = parser(__doc__ or "", repeats=1)
    given.add_argument("--only", type=lambda text: text.split(","), default=list(ROWS), help=f"of {', '.join(ROWS)}")
    read = given.parse_args()
    if unknown := [name for name in read.only if name not in ROWS]:
        given.error(f"'{unknown[0]}' is not measured here; known are {', '.join(ROWS)}")
    torch.set_num_threads(1)
    result = measure(read.only)
    conclude(result, table(result), "", read)


if __name__ == "__main__":
    main()

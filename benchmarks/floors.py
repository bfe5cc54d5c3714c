"""Methods of singular values on eight experts of ViT-B/32's layers, beside their floors: operations over GEMM's rate.

    python -m benchmarks.floors --layers 1 --threads 2
    python -m benchmarks.floors --only iso_c,tsv --spectrum decaying --device cuda

A layer has four matrices: 2304 x 768, 768 x 768, 3072 x 768 and 768 x 3072; ViT-B/32 has twelve of them. The task
vectors are heavy-tailed noise, whose spectrum is flat, or have singular values that decay as j^-0.7. The rate is that
of `torch.mm` at 768 and at 3072, the better of the two, in fp32 and fp64. Operations are those of the direct
algorithm: ``m n^2`` for a square, ``9 n^3`` for eigenvectors, ``2 m n k`` for a product. Seconds are scaled to twelve
layers. `cpu s` are seconds of processor time: on a shared machine compare these, with one thread.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.options import conclude, parser
from byom.errors import suggest
from byom.functional.deltas import total
from byom.functional.linalg import truncated_each
from byom.merge.base import Problem
from byom.merge.esm import EssentialSubspaceMerging, joined
from byom.merge.iso_c import isotropic
from byom.merge.iso_cts import isotropic_with_own, own_directions
from byom.merge.knots import KnowledgeOrientationThroughSvd
from byom.merge.tsv import add_orthogonalised
from byom.merge.wudi import descend
from byom.weights import Weights

LAYERS, TASKS, STEPS, COMMON, KEPT = 12, 8, 300, 0.8, 32
SHAPES = {"attention.in": (2304, 768), "attention.out": (768, 768), "mlp.in": (3072, 768), "mlp.out": (768, 3072)}
PRODUCTS = 30  # of a filter, about
ESM = EssentialSubspaceMerging()
Operations = tuple[float, float]  # in fp64 and in fp32


@dataclass(frozen=True)
class Method:
    """One method.

    Args:
        title: What the table calls it.
        work: Merges a layer, given task vectors ``[T, m, n]`` by name.
        operations: Of a matrix, from m and n.
    """

    title: str
    work: Callable[[dict[str, Tensor]], object]
    operations: Callable[[int, int], Operations]


def eigenvectors(n: float) -> float:
    """Return the operations of all eigenvectors of a symmetric matrix (Golub and Van Loan's count)."""
    return 9 * n**3


def polar(m: float, n: float) -> float:
    """Return the operations of a polar factor by its square: ``A (V diag(1/s) Vᵀ)``."""
    long, short = max(m, n), min(m, n)
    return 3 * long * short**2 + eigenvectors(short) + 2 * short**3


def tsv(m: int, n: int) -> Operations:
    """Return the operations of TSV-M."""
    long, short = max(m, n), min(m, n)
    rank = short // TASKS
    each = long * short**2 + eigenvectors(short) + 2 * long * short * rank
    return TASKS * each + polar(m, rank * TASKS) + polar(n, rank * TASKS) + 2 * m * n * rank * TASKS, 0


def iso_cts(m: int, n: int) -> Operations:
    """Return the operations of Iso-CTS."""
    long, short = max(m, n), min(m, n)
    share = own_directions(short, TASKS, COMMON)
    common = short - share * TASKS
    shared = long * short**2 + eigenvectors(short) + 2 * long * short * common
    if m <= n:
        own = 2 * (m - common) * m * n + n * (m - common) ** 2 + eigenvectors(m - common)
    else:
        own = 4 * m * n * common + few(m, n, share)
    return shared + TASKS * own + polar(m, short) + polar(n, short) + 2 * m * n * short, 0


def few(m: int, n: int, rank: int) -> float:
    """Return the operations of a few singular directions: a square, a filter and the Cholesky factor of its proof."""
    long, short = max(m, n), min(m, n)
    return long * short**2 + PRODUCTS * 4 * short**2 * rank + short**3 / 3 + 2 * long * short * rank


def knots(m: int, n: int) -> Operations:
    """Return the operations of KnOTS, its coordinates being computed once for the plan and once for the result."""
    return TASKS * m**2 * n + eigenvectors(m), 2 * (2 * TASKS + 1) * m**2 * n


def esm(m: int, n: int) -> Operations:
    """Return the operations of ESM, of which U, m x m where T divides m, has most."""
    rank = m // TASKS
    if m <= n:
        directions = 2 * m * n**2 + 2 * m**2 * n + eigenvectors(m)
    else:
        directions = 2 * eigenvectors(n) + 3 * m * n**2 + 2 * m * n * rank
    parts = TASKS * (directions + 2 * rank * m * n)
    return parts + polar(m, rank * TASKS) + polar(n, rank * TASKS) + 2 * m * n * rank * TASKS, 0


def joined_with(deltas: Tensor) -> Tensor:
    """Merge one matrix as ESM does; the Grams have a few large directions, and are drawn for little beside the rest."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(TASKS, 32, deltas.shape[2], generator=generator)
    grams = torch.rand(TASKS, deltas.shape[2], generator=generator).diag_embed().baddbmm_(rows.mT, rows)
    return joined(deltas, grams.to(deltas.device), ESM.power, ESM.energy)


def wudi(steps: int) -> Method:
    """Return WUDI with a number of steps: its operations are those of the Grams, the slope, and the steps."""
    return Method(
        f"WUDI, {steps} steps of Adam",
        every(lambda deltas: descend(deltas, steps, 1e-5)),
        lambda m, n: (TASKS * m * n**2, 2 * (TASKS + steps) * m * n**2),
    )


def problem(layer: dict[str, Tensor]) -> Problem:
    """Return the problem whose task vectors are given, on a pre-trained model of zeros."""
    base = Weights.of({name: torch.zeros_like(deltas[0]) for name, deltas in layer.items()})
    experts = {str(t): Weights.of({n: deltas[t] for n, deltas in layer.items()}) for t in range(TASKS)}
    return Problem(base, experts)


def every(change: Callable[[Tensor], object]) -> Callable[[dict[str, Tensor]], object]:
    """Lift the merging of one matrix to a layer."""
    return lambda layer: [change(deltas) for deltas in layer.values()]


METHODS = {
    "tsv": Method("TSV-M", every(add_orthogonalised), tsv),
    "esm": Method("ESM", every(joined_with), esm),
    "iso_c": Method("Iso-C", every(lambda deltas: isotropic(total(deltas))), lambda m, n: (polar(m, n), 0)),
    "iso_cts": Method(
        "Iso-CTS",
        every(lambda each: isotropic_with_own(each, own_directions(min(each.shape[1:]), TASKS, COMMON))),
        iso_cts,
    ),
    "knots": Method("KnOTS", lambda layer: KnowledgeOrientationThroughSvd()(problem(layer)).state(), knots),
    "wudi": wudi(STEPS),
    "lora": Method(
        f"BYOM-LoRA, {KEPT} directions of dense differences",
        every(lambda deltas: truncated_each(deltas, KEPT)),
        lambda m, n: (TASKS * few(m, n, KEPT), 0),
    ),
}


def noise(shape: tuple[int, int], seed: int) -> Tensor:
    """Return task vectors of heavy-tailed noise."""
    generator = torch.Generator().manual_seed(seed)
    tail = torch.randn(TASKS, *shape, generator=generator).exp_()
    return 1e-5 * tail.mul_(torch.randn(TASKS, *shape, generator=generator))


def decaying(shape: tuple[int, int], seed: int) -> Tensor:
    """Return task vectors whose singular values decay as j^-0.7."""
    rank, generator = min(shape), torch.Generator().manual_seed(seed)
    values = torch.arange(1, rank + 1) ** -0.7

    def one() -> Tensor:
        left, right = (torch.linalg.qr(torch.randn(side, rank, generator=generator))[0] for side in shape)
        return 1e-2 * left * values @ right.T

    return torch.stack([one() for _ in range(TASKS)])


def clocks(device: torch.device) -> tuple[float, float]:
    """Return seconds of the wall and of the processors, after what the device still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter(), time.process_time()


def rate(dtype: torch.dtype, device: torch.device, repeats: int = 5) -> tuple[float, float]:
    """Return the operations per second of a product of matrices, of the wall and of the processors."""
    best = [0.0, 0.0]
    for rows in (768, 3072):
        one, other = (torch.randn(shape, dtype=dtype, device=device) for shape in ((rows, 768), (768, 768)))
        torch.mm(one, other)
        for _ in range(repeats):
            before = clocks(device)
            torch.mm(one, other)
            taken = [after - start for after, start in zip(clocks(device), before, strict=True)]
            best = [max(known, 2 * rows * 768**2 / max(each, 1e-9)) for known, each in zip(best, taken, strict=True)]
    return best[0], best[1]


def measure(options: argparse.Namespace) -> dict:
    """Measure the rates, and every method that was asked for on some layers."""
    device = torch.device(options.device)
    rates = {str(dtype).removeprefix("torch."): rate(dtype, device) for dtype in (torch.float64, torch.float32)}
    result = {
        "spectrum": options.spectrum,
        "layers": options.layers,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "rates": rates,
        "methods": {},
    }
    known = METHODS | {"wudi": wudi(options.steps)}
    for name in options.only or known:
        result["methods"][name] = timed(known[name], rates, options, device)
    return result


def timed(
    method: Method, rates: dict[str, tuple[float, float]], options: argparse.Namespace, device: torch.device
) -> dict:
    """Return a method's operations, its floor, and its seconds for twelve layers."""
    seconds = [0.0, 0.0]
    for at in range(options.layers):
        make = noise if options.spectrum == "flat" else decaying
        layer = {name: make(shape, at).to(device) for name, shape in SHAPES.items()}
        before = clocks(device)
        method.work(layer)
        spent = (after - start for after, start in zip(clocks(device), before, strict=True))
        seconds = [known + each * LAYERS / options.layers for known, each in zip(seconds, spent, strict=True)]
    double, single = (
        LAYERS * sum(each) for each in zip(*(method.operations(*s) for s in SHAPES.values()), strict=True)
    )
    floors = [double / rates["float64"][i] + single / rates["float32"][i] for i in range(2)]
    return {
        "title": method.title,
        "operations": {"float64": double, "float32": single},
        "floor": floors[0],
        "seconds": seconds[0],
        "cpu_floor": floors[1],
        "cpu_seconds": seconds[1],
    }


def table(result: dict) -> str:
    """A Markdown table of floors and seconds."""
    rates = ", ".join(f"{name} {each[0] / 1e9:,.0f} GFLOP/s" for name, each in result["rates"].items())
    lines = [
        f"{TASKS} x ViT-B/32, {result['spectrum']} spectra, {result['layers']} of {LAYERS} layers measured, "
        f"threads={result['threads']}, {result['device']}; GEMM: {rates}",
        "",
        "| method | operations fp64, fp32 | floor s | s | times floor | cpu s | times its floor |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    return "\n".join([*lines, *map(_row, result["methods"].values())])


def _row(row: dict) -> str:
    counts = ", ".join(f"{count / 1e12:.2f} T" for count in row["operations"].values())
    wall = f"{row['floor']:.0f} | {row['seconds']:.0f} | {row['seconds'] / row['floor']:.1f}"
    cpu = f"{row['cpu_seconds']:.0f} | {row['cpu_seconds'] / row['cpu_floor']:.1f}"
    return f"| {row['title']} | {counts} | {wall} | {cpu} |"


def options() -> argparse.Namespace:
    """Read the command line."""
    given = parser(__doc__ or "", repeats=1)
    given.add_argument("--only", type=lambda text: text.split(","), default=[], help=f"of {', '.join(METHODS)}")
    given.add_argument("--layers", type=int, default=1, help=f"layers that are measured, up to {LAYERS}")
    given.add_argument("--steps", type=int, default=STEPS, help="of WUDI")
    given.add_argument("--spectrum", choices=("flat", "decaying"), default="flat")
    given.add_argument("--threads", type=int, default=2)
    given.add_argument("--device", default="cpu")
    read = given.parse_args()
    if unknown := [name for name in read.only if name not in METHODS]:
        given.error(f"'{unknown[0]}' is not measured here; {suggest(unknown[0], [*METHODS])}")
    if not 1 <= read.layers <= LAYERS or min(read.threads, read.steps) < 1:
        given.error(f"--layers is 1 to {LAYERS}, and --threads and --steps 1 or more")
    return read


def main() -> None:
    """Measure, print, and write on request."""
    given = options()
    torch.set_num_threads(given.threads)
    result = measure(given)
    conclude(result, table(result), "", given)


if __name__ == "__main__":
    main()

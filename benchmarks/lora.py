"""BYOM-LoRA's factoring beside the dense SVD and PEFT's, and the compression of eight adapters, one thread, one run.

    python -m benchmarks.lora --json lora.json

`product_svd` and `torch.linalg.svd` find the same singular values of the same fp32 product; PEFT's
`add_weighted_adapter(combination_type="svd")` is called on a model with one layer, where PEFT is installed, and must
give the same cut. The eight adapters are random, of the sizes of ViT-B/32. `--check` fails when a target is missed (at
least 20 times faster than the dense SVD at width 2048; eight adapters of rank 16 on q, k, v and out cut to rank 4 in
less than 2 s). Times are medians over repeats after one that does not count.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from statistics import median

import torch
from torch import nn

from benchmarks.options import conclude, parser
from byom.functional.linalg import product_svd
from byom.merge.base import Problem
from byom.variants import lora
from byom.variants.lora import ByomLora
from byom.weights import Weights
from byom.weights.lowrank import Adapted, Piece

TIMES_FASTER = 20.0
SECONDS = 2.0
WIDTHS = (768, 2048)
CHECKED = 2048
RANK, KEPT = 16, 4
TASKS, LAYERS, SIDE = 8, 12, 768
ATTENTION = {"q": (SIDE, SIDE), "k": (SIDE, SIDE), "v": (SIDE, SIDE), "out": (SIDE, SIDE)}
MLP = {"up": (4 * SIDE, SIDE), "down": (SIDE, 4 * SIDE)}
SHOWN = {
    "product": "byom product_svd",
    "dense": "torch.linalg.svd of the dense product",
    "peft": "PEFT add_weighted_adapter, svd",
}


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median seconds, the first run left out."""
    work()
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return median(taken)


def factors(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal factors of rank `RANK`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, RANK, generator=generator), torch.randn(RANK, columns, generator=generator) / rows


def layer(width: int, repeats: int) -> dict[str, float]:
    """Seconds of every routine for one square matrix; raises SystemExit if singular values differ."""
    left, right = factors(width, width, seed=0)
    found, expected = product_svd(left, right)[1], torch.linalg.svdvals(left @ right)[:RANK]
    if not torch.allclose(found, expected, rtol=1e-4):
        sys.exit(f"the singular values differ: {found} and {expected}; product_svd is wrong here, please report it")
    rows = {
        "product": seconds(lambda: product_svd(left, right), repeats),
        "dense": seconds(lambda: torch.linalg.svd(left @ right, full_matrices=False), max(1, repeats // 3)),
    }
    return rows | ({"peft": seconds(peft(left, right), max(1, repeats // 3))} if find_spec("peft") else {})


def peft(left: torch.Tensor, right: torch.Tensor) -> Callable[[], object]:
    """PEFT's public way to another rank: a weighted sum, with the thin SVD, which is its faster one.

    It leaves one adapter alone, whatever the rank, so that a second of weight 0 is needed.
    """
    from peft import LoraConfig, get_peft_model

    model = nn.Sequential(nn.Linear(right.shape[1], left.shape[0], bias=False))
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"])
    adapted = get_peft_model(model, config)  # type: ignore[arg-type]
    adapted.add_adapter("other", config)
    layer = adapted.base_model.model[0]
    layer.lora_A["default"].weight.data.copy_(right)
    layer.lora_B["default"].weight.data.copy_(left)

    def work() -> torch.Tensor:
        adapted.base_model.add_weighted_adapter(
            ["default", "other"], [1.0, 0.0], "cut", combination_type="svd", svd_rank=KEPT, svd_full_matrices=False
        )
        cut = layer.get_delta_weight("cut")
        adapted.base_model.delete_adapter("cut")
        return cut

    u, values, vt = product_svd(left, right)
    expected = u[:, :KEPT] * values[:KEPT] @ vt[:KEPT]
    if (work() - expected).norm() > 1e-3 * expected.norm():
        sys.exit("PEFT cuts to another product; this version of it is not the one that was compared")
    return work


def problem(kinds: dict[str, tuple[int, int]]) -> Problem:
    """Eight adapters of rank `RANK` on every layer's matrices."""
    shapes = {f"{at}.{kind}": sides for at in range(LAYERS) for kind, sides in (ATTENTION | MLP).items()}
    base = Weights.of({name: torch.zeros(shape) for name, shape in shapes.items()})
    names = [name for name in shapes if name.split(".")[1] in kinds]

    def pieces(task: int) -> Iterator[tuple[str, list[Piece]]]:
        for at, name in enumerate(names):
            yield name, [Piece(0, *factors(*shapes[name], seed=1000 * task + at))]

    return Problem(base, {f"task{task}": Adapted(base, dict(pieces(task))) for task in range(TASKS)})


def compression(kinds: dict[str, tuple[int, int]], repeats: int) -> dict[str, float]:
    """Seconds to cut all adapters, and the values stored per task before and after."""
    given = problem(kinds)

    def work() -> list[int]:
        lora._known.cache_clear()  # nothing is taken from the run before
        served = ByomLora(KEPT).serve(given, given.pretrained)
        return [delta.stored_parameters for delta in served.deltas.values()]

    before = LAYERS * RANK * sum(map(sum, kinds.values()))
    return {"seconds": seconds(work, repeats), "values_before": before, "values_after": work()[0]}


def measure(options: argparse.Namespace) -> dict:
    """Run everything once."""
    return {
        "rank": RANK,
        "kept": KEPT,
        "tasks": TASKS,
        "threads": torch.get_num_threads(),
        "repeats": options.repeats,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "layers": {str(width): layer(width, options.repeats) for width in WIDTHS},
        "compression": {
            "q, k, v, out": compression(ATTENTION, options.repeats),
            "q, k, v, out, mlp": compression(ATTENTION | MLP, options.repeats),
        },
    }


def table(result: dict) -> str:
    """Two Markdown tables."""
    lines = ["rank {rank}, fp32, threads={threads}, median of {repeats}".format(**result), ""]
    lines += ["| routine | width | ms | times product_svd |", "|---|---:|---:|---:|"]
    for width, rows in result["layers"].items():
        for name, taken in rows.items():
            lines.append(f"| {SHOWN[name]} | {width} | {1e3 * taken:.2f} | {taken / rows['product']:.1f} |")
    lines += ["", "| {tasks} adapters cut to rank {kept} | s | values per task, before and after |".format(**result)]
    lines += ["|---|---:|---:|"]
    for name, row in result["compression"].items():
        lines.append(f"| {name} | {row['seconds']:.2f} | {row['values_before']:,} and {row['values_after']:,} |")
    return "\n".join(lines)


def missed(result: dict) -> str:
    """The sentence about a missed target, or nothing."""
    rows = result["layers"][str(CHECKED)]
    ratio, taken = rows["dense"] / rows["product"], result["compression"]["q, k, v, out"]["seconds"]
    if ratio >= TIMES_FASTER and taken < SECONDS:
        return ""
    return (
        f"product_svd was {ratio:.1f} times faster than the dense SVD at {CHECKED} (target: at least {TIMES_FASTER:g}) "
        f"and eight adapters took {taken:.2f} s (target: less than {SECONDS:g}); repeat on an idle machine"
    )


def main() -> None:
    """Measure, print, and write or check on request."""
    options = parser(__doc__ or "", repeats=9).parse_args()
    torch.set_num_threads(1)
    result = measure(options)
    conclude(result, table(result), missed(result), options)


if __name__ == "__main__":
    main()

"""What was tried for BYOM-Budget and left out, on the committed suites' experts of seed 0: what it would have saved.

    python -m benchmarks.budget_trials --json benchmarks/budget_trials.json

**Error feedback** as in GPTQ: the right singular vectors are rounded one column after another, and each error is made
up for in the columns that are still to come, in the metric of the inputs. Figure: the damage that is left by as many
bytes, beside that without feedback (every `STRIDE`th tensor, the first task).

**Shared bases**: one left basis for all tasks with right vectors of their own, or two shared bases with a core of each
task, of as many numbers per task as rank k takes, an eighth of the bases included. Figure: squared error beside that of
rank k for each task alone (every `STRIDE`th matrix, all tasks).
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.options import conclude, parser
from byom.cli import config
from byom.functional.hull import Level, allocate
from byom.merge.base import Problem
from byom.pipeline.cell import Cell
from byom.variants.base.levels import Difference, rounded
from byom.variants.budget import ByomBudget
from byom.weights import Weights

SUITES = {"vision8_offline": "images, ViT-S/14", "text8_offline": "texts, MiniLM-L6"}
STRIDE = 7
KILOBYTES = (50, 90, 250, 700, 3000)
RANKS = (2, 8, 32)
BLOCK = 64


class Fed(Difference):
    """A difference whose right singular vectors are rounded with error feedback."""

    def _right(self, rows: Tensor) -> Tensor:
        return rounded(rows) if self.root is None else fed(rows, self.root)


def fed(rows: Tensor, root: Tensor) -> Tensor:
    """Round rows from the last column to the first, each error made up for in the columns before it.

    Args:
        rows: ``[k, n]``, in steps.
        root: ``[n, n]`` lower triangular; the damage of an error e is ``|e root|^2``.
    """
    aim, found, share = rows.clone(), torch.empty_like(rows), root / root.diagonal()
    for end in range(rows.shape[1], 0, -BLOCK):
        start = max(0, end - BLOCK)
        for column in range(end - 1, start - 1, -1):
            found[:, column] = rounded(aim[:, column])
            error = found[:, column] - rows[:, column]
            aim[:, start:column] -= error[:, None] * share[column, start:column]
        aim[:, :start] -= (found - rows)[:, start:end] @ share[start:end, :start]
    return found


def feedback(cell: Cell) -> dict:
    """Return damages with feedback beside those without, and the seconds of both."""
    served = cell.settings.byom.streamed(cell.problem, cell.reference)
    task = cell.problem.tasks[0]
    target, damage = cell.problem.finetuned[task], served.deltas.damages[task]  # pyright: ignore[reportAttributeAccessIssue]
    names = list(target.mergeable())
    some = names[::STRIDE]
    left, taken = [], []
    for kind in (Difference, Fed):
        start = time.perf_counter()
        levels = [list(_levels(kind, damage, name, target, cell.reference)) for name in some]
        taken.append(time.perf_counter() - start)
        left.append([_least(levels, 8000 * size * len(some) / len(names)) for size in KILOBYTES])
    ratios = [other / one for one, other in zip(*left, strict=True)]
    return {"damage": dict(zip(map(str, KILOBYTES), ratios, strict=True)), "seconds": taken}


def _levels(kind: type[Difference], damage, name: str, target: Weights, reference: Weights) -> list[Level]:
    values = target[name].float() - reference[name].float()
    values = values.reshape(values.shape[0], -1) if values.ndim > 1 else values[None]
    weighed = kind(values, damage.root(name, values.shape[1]), damage.weight(name, values))
    return [each.level for each in weighed.levels()]


def _least(levels: list[list[Level]], bits: float) -> float:
    return sum(each[at].damage for each, at in zip(levels, allocate(levels, bits), strict=True))


def bases(problem: Problem, reference: Weights) -> dict:
    """Return squared errors of shared bases beside those of rank k per task, and the energy in task vectors."""
    names = [name for name in problem.pretrained.mergeable() if _matrix(problem.pretrained, name)]
    found = {str(rank): {"left": 0.0, "cores": 0.0} for rank in RANKS}
    energy = 0.0
    some = names[::STRIDE]
    for name in some:
        tasks = [problem.finetuned[task][name].float() - reference[name].float() for task in problem.tasks]
        vectors = [problem.finetuned[task][name].float() - problem.pretrained[name].float() for task in problem.tasks]
        energy += _squares(tasks) / _squares(vectors) / len(some)
        squares = [torch.linalg.svdvals(each).square() for each in tasks]
        for rank in RANKS:
            own = sum(float(each[rank:].sum()) for each in squares)
            for way, rest in (("left", _left(tasks, rank)), ("cores", _cores(tasks, rank))):
                found[str(rank)][way] += rest / own / len(some)
    return {"energy": energy, **found}


def _matrix(weights: Weights, name: str) -> bool:
    shape = weights.shape(name)
    return len(shape) == 2 and min(shape) > 2 * max(RANKS) and "embed" not in name


def _squares(tensors: list[Tensor]) -> float:
    return sum(float(each.square().sum()) for each in tensors)


def _left(tasks: list[Tensor], rank: int) -> float:
    """Squared error of one left basis, as large as the numbers of a rank allow."""
    (m, n), count = tasks[0].shape, len(tasks)
    rank = round(rank * (m + n) / (m / count + n))
    return float(torch.linalg.svdvals(torch.cat(tasks, 1))[rank:].square().sum())


def _cores(tasks: list[Tensor], rank: int) -> float:
    """Squared error of two bases and a core per task, as large as the numbers of a rank allow."""
    m, n = tasks[0].shape
    half = (m + n) / len(tasks) / 2
    side = min(int((half**2 + rank * (m + n)) ** 0.5 - half), m, n)
    left = torch.linalg.svd(torch.cat(tasks, 1), full_matrices=False)[0][:, :side]
    right = torch.linalg.svd(torch.cat(tasks, 0), full_matrices=False)[2][:side]
    return _squares(tasks) - _squares([left.T @ each @ right.T for each in tasks])


def measured(suite: str, cache: Path | None) -> dict:
    """Return what both trials find on a suite."""
    overrides = [f"suite={suite}", "seed=0", "merge=task_grams", "byom=budget", "byom.inputs=train"]
    overrides += [f"statistics.{name}.examples=64" for name in ("fisher", "gram")]
    cell = Cell(config.settings(overrides + ([f"cache={cache}"] if cache else [])))
    assert isinstance(cell.settings.byom, ByomBudget)
    return {
        "feedback": feedback(cell),
        "bases": {
            "pretrained": bases(cell.problem, cell.problem.pretrained),
            "merged": bases(cell.problem, cell.reference),
        },
    }


def table(result: dict) -> str:
    """Return both tables in Markdown."""
    lines = ["| error feedback | " + " | ".join(f"{size} kB" for size in KILOBYTES) + " | seconds |"]
    lines += ["|---|" + "--:|" * (len(KILOBYTES) + 1)]
    for suite, found in result.items():
        one, other = found["feedback"]["seconds"]
        ratios = " | ".join(f"{ratio:.2f}" for ratio in found["feedback"]["damage"].values())
        lines.append(f"| {SUITES[suite]} | {ratios} | {other / one:.1f} times |")
    heads = [f"rank {rank}: {way}" for rank in RANKS for way in ("left basis", "cores")]
    lines += ["", f"| shared bases | &#124;D&#124;² / &#124;τ&#124;² | {' | '.join(heads)} |"]
    lines += ["|---|" + "--:|" * (1 + 2 * len(RANKS))]
    titles = {"pretrained": "pre-trained reference", "merged": "ASWUDI"}
    for suite, found in result.items():
        for name, each in found["bases"].items():
            ratios = [f"{each[str(rank)][way]:.2f}" for rank in RANKS for way in ("left", "cores")]
            lines.append(f"| {SUITES[suite]}, {titles[name]} | {each['energy']:.2f} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def main() -> None:
    """Run both trials."""
    options = parser(__doc__ or "", 1)
    options.add_argument("--cache", type=Path, help="where experts are kept")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    result = {suite: measured(suite, chosen.cache) for suite in SUITES}
    conclude(result, table(result), "", chosen)


if __name__ == "__main__":
    sys.exit(main())

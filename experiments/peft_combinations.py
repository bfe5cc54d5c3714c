"""PEFT's combinations of LoRA adapters beside byom's: python -m experiments.peft_combinations SUITE (or --synthetic).

Uniform weights 1/T. For every combination: the relative error of the merged change against the exact weighted sum, its
cosine with it, which does not depend on a scale, and the mean test accuracy over tasks. Nothing is tuned: TIES keeps
its scale of 1 and KnOTS its 0.6, so that their relative errors say less than their cosines. Both keep a fifth of the
entries, as PEFT's types do, which choose it in each factor.

PEFT's own code combines the factors, one layer for every adapted one, with the scale ``alpha / r`` folded into B.
Adapters of scale 1 (the default of ``finetune=lora``) are what PEFT would have loaded; of others, the element-wise
types see another split of the same product. Writes results/lora/peft_combinations/SUITE.json and prints a table.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from byom.errors import OptionError
from byom.merge.average import Average
from byom.merge.base import Problem
from byom.merge.knots import KnowledgeOrientationThroughSvd
from byom.merge.ties import Ties
from byom.weights import Weights
from byom.weights.lowrank import Adapted, Piece, cat, truncated

DENSITY = 0.2
PEFT = ("linear", "svd", "ties", "dare_linear", "magnitude_prune", "cat")
Site = tuple[str, int]  # parameter, first row
Row = dict[str, Any]


class Host:
    """A PEFT model with one linear layer for every adapted one, which holds the factors of all adapters.

    Args:
        adapters: Task name to adapter; all adapt the same layers at one rank, which PEFT's types ask for.

    Raises:
        OptionError: If they do not.
    """

    def __init__(self, adapters: Mapping[str, Adapted]) -> None:
        from peft import LoraConfig, get_peft_model

        self.base = next(iter(adapters.values())).base
        self.tasks = [f"task{t}" for t in range(len(adapters))]  # PEFT takes no names with dots
        by_task = {task: _sites(adapter) for task, adapter in zip(self.tasks, adapters.values(), strict=True)}
        self.sites = {f"site{i}": site for i, site in enumerate(by_task[self.tasks[0]])}
        self.rank = _rank(by_task)
        shapes = {key: _shape(by_task[self.tasks[0]][site]) for key, site in self.sites.items()}
        layers = nn.ModuleDict({key: nn.Linear(n, m, bias=False) for key, (m, n) in shapes.items()})
        settings = LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=list(self.sites))
        with torch.random.fork_rng(devices=[]):
            self.model: Any = get_peft_model(layers, settings, self.tasks[0])  # pyright: ignore[reportArgumentType]
            for task in self.tasks[1:]:
                self.model.add_adapter(task, settings)
        for task, pieces in by_task.items():
            self._fill(task, pieces)

    def combine(self, kind: str, seed: int = 0) -> Adapted:
        """Return PEFT's combination with uniform weights.

        Args:
            kind: PEFT's ``combination_type``.
            seed: Draws the flips of DARE.
        """
        name, weights = f"combined {kind}", [1 / len(self.tasks)] * len(self.tasks)
        options = {"combination_type": kind, "density": DENSITY, "svd_rank": self.rank, "svd_full_matrices": False}
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            self.model.base_model.add_weighted_adapter(self.tasks, weights, name, **options)
        factored: dict[str, list[Piece]] = {}
        for key, (parameter, start) in self.sites.items():
            factored.setdefault(parameter, []).append(self._piece(key, name, start))
        self.model.delete_adapter(name)
        return Adapted(self.base, factored, origin=f"PEFT {kind}")

    def _fill(self, task: str, pieces: Mapping[Site, Piece]) -> None:
        for key, site in self.sites.items():
            layer = self._layer(key)
            layer.lora_A[task].weight.data = pieces[site].right.float().contiguous()
            layer.lora_B[task].weight.data = pieces[site].left.float().contiguous()

    def _piece(self, key: str, name: str, start: int) -> Piece:
        layer = self._layer(key)
        left = layer.lora_B[name].weight.detach() * layer.scaling[name]
        return Piece(start, left.clone(), layer.lora_A[name].weight.detach().clone())

    def _layer(self, key: str) -> Any:
        return self.model.base_model.model[key]


def models(adapters: Mapping[str, Adapted]) -> Iterator[tuple[str, Weights]]:
    """Give every combination by its name, one after the other.

    Args:
        adapters: Task name to adapter.
    """
    host = Host(adapters)
    for kind in PEFT:
        yield f"PEFT {kind}", host.combine(kind)
    uniform = dict.fromkeys(adapters, 1 / len(adapters))
    exact, problem = cat(adapters, uniform), Problem(host.base, adapters)
    yield "byom cat", exact
    yield f"byom cat, rank {host.rank}", truncated(exact, host.rank)
    yield "byom average", Average()(problem)
    yield "byom ties", _adapted_alone(problem)
    yield "byom knots", KnowledgeOrientationThroughSvd(Ties(DENSITY))(problem)


def measure(adapters: Mapping[str, Adapted], score: Callable[[Weights], float] | None = None) -> list[Row]:
    """Measure every combination.

    Args:
        adapters: Task name to adapter, all of one base, the same layers and one rank.
        score: Mean accuracy of weights; None leaves it out.

    Returns:
        One row per combination, the pre-trained model first: ``name``, ``error``, ``cosine``; ``accuracy`` if scored.
    """
    base = next(iter(adapters.values())).base
    exact = cat(adapters, dict.fromkeys(adapters, 1 / len(adapters)))
    rows = []
    for name, found in (("pre-trained", base), *models(adapters)):
        rows.append({"name": name, **distances(found, exact)} | ({"accuracy": score(found)} if score else {}))
    return rows


def distances(merged: Weights, exact: Adapted) -> Row:
    """Compare a merged change with the exact weighted sum over all adapted parameters.

    Args:
        merged: The merged model.
        exact: The weighted sum, which names the base and the parameters.

    Returns:
        ``error``, the Euclidean distance relative to the norm of the sum, and ``cosine`` (None for no change).
    """
    dots = torch.zeros(3, dtype=torch.float64)
    for name in exact.factored:
        base = exact.base[name].double()
        ours, sought = merged[name].double() - base, exact[name].double() - base
        dots += torch.stack([(ours * ours).sum(), (ours * sought).sum(), (sought * sought).sum()])
    ours, both, sought = dots.tolist()
    cosine = both / (ours * sought) ** 0.5 if ours and sought else None
    return {"error": max(ours - 2 * both + sought, 0) ** 0.5 / sought**0.5, "cosine": cosine}


def synthetic(side: int = 768, tasks: int = 8, rank: int = 16) -> dict[str, Adapted]:
    """Return independent adapters of one square layer, drawn from the normal distribution: the worst case.

    Args:
        side: Rows and columns.
        tasks: Number of adapters.
        rank: Rank of each.
    """
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    base = Weights.of({"layer.weight": torch.zeros(side, side)})
    pieces = [Piece(0, drawn(side, rank), drawn(rank, side)) for _ in range(tasks)]
    return {f"task{t}": Adapted(base, {"layer.weight": [piece]}) for t, piece in enumerate(pieces)}


def table(rows: Sequence[Row]) -> str:
    """Return the rows as Markdown."""
    head = "| combination | relative error | cosine | accuracy |\n|---|--:|--:|--:|\n"
    return head + "".join(f"| {row['name']} | {' | '.join(_cells(row))} |\n" for row in rows)


def run(suite: str, overrides: Sequence[str]) -> list[Row]:
    """Measure the LoRA experts of a suite and write the record.

    Args:
        suite: Its name.
        overrides: Further choices of the experts, for example ``finetune.rank=8`` or ``seed=1``.
    """
    from byom.cli import config
    from byom.pipeline.labs import laboratory
    from byom.pipeline.provenance import provenance, results_root
    from byom.storage.atomic import write_json, write_text
    from byom.storage.place import now

    settings = config.settings([f"suite={suite}", "finetune=lora", "byom=none", *overrides])
    lab = laboratory(settings)
    experts: Mapping[str, Any] = {task: lab.expert(task) for task in lab.tasks}

    def score(weights: Weights) -> float:
        held = weights.materialise()
        return sum(lab.score(task, held, "test").value for task in lab.tasks) / len(lab.tasks)

    rows = measure(experts, score)
    record = {"suite": suite, "overrides": list(overrides), "density": DENSITY, "rows": rows, "finished": now()}
    file = results_root(settings.results) / "lora" / "peft_combinations" / f"{suite}.json"
    write_json(file, record | {"provenance": provenance()})
    write_text(file.with_suffix(".md"), table(rows))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", nargs="?", help="a suite of conf/suite, for example vision8_offline")
    parser.add_argument("overrides", nargs="*", help="further choices of the experts, for example finetune.rank=8")
    parser.add_argument("--synthetic", action="store_true", help="random independent adapters, without accuracy")
    given = parser.parse_args(arguments)
    if not given.suite and not given.synthetic:
        parser.error("name a suite, or give --synthetic")
    rows = measure(synthetic()) if given.synthetic else run(given.suite, given.overrides)
    sys.stdout.write(table(rows))


def _adapted_alone(problem: Problem) -> Weights:
    """Merge by TIES what was adapted, so that its density is a share of those entries."""
    base, every = problem.pretrained, problem.finetuned.values()
    names = {name for expert in every if isinstance(expert, Adapted) for name in expert.factored}
    alone = {task: expert.select(names.__contains__) for task, expert in problem.finetuned.items()}
    merged = Ties(DENSITY)(Problem(base.select(names.__contains__), alone))
    return base.derived(lambda name: merged[name] if name in names else base[name], "byom ties")


def _sites(adapter: Adapted) -> dict[Site, Piece]:
    return {(name, piece.start): piece for name, pieces in sorted(adapter.factored.items()) for piece in pieces}


def _shape(piece: Piece) -> tuple[int, int]:
    return len(piece.left), piece.right.shape[1]


def _rank(by_task: Mapping[str, Mapping[Site, Piece]]) -> int:
    sites = {frozenset(pieces) for pieces in by_task.values()}
    ranks = {piece.left.shape[1] for pieces in by_task.values() for piece in pieces.values()}
    if len(sites) != 1 or len(ranks) != 1:
        raise OptionError(f"adapters of ranks {sorted(ranks)} cannot be compared; give one rank and the same layers")
    return ranks.pop()


def _cells(row: Row) -> list[str]:
    cosine = "" if row["cosine"] is None else f"{row['cosine']:.3f}"
    return [f"{row['error']:.3f}", cosine, f"{100 * row['accuracy']:.1f}" if "accuracy" in row else ""]


if __name__ == "__main__":
    main()

"""What `benchmarks.peers` measures: one merge from disk to disk by each tool, each in a process of its own.

Every function imports its tool, then counts seconds from the first file that it opens until the disk has what it wrote
(`returned` until the tool itself returns, which byom does when the disk has it and the others before). Bytes of
`libraries` are the anonymous memory that importing took.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks.peak import Report, anonymous
from byom.checkpoint.adapters.adapter import Adapter
from byom.checkpoint.adapters.merged import write_adapter
from byom.merge.base import MergeMethod, Problem
from byom.weights import Weights
from byom.weights.lowrank import cat, truncated

Said = dict[str, Any]


class Clock:
    """Seconds of one merge, and the memory of the libraries that it needs.

    It is made before they are imported and started afterwards.

    Args:
        out: The folder that is written.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.before = out, anonymous()
        self.libraries, self.start = 0, 0.0

    def started(self) -> None:
        """Count from now on."""
        self.libraries, self.start = anonymous() - self.before, time.perf_counter()

    def done(self) -> Said:
        """Return what it took, when the disk has the folder."""
        returned = time.perf_counter() - self.start
        for file in self.out.rglob("*"):
            handle = os.open(file, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        seconds = time.perf_counter() - self.start
        return {"seconds": seconds, "returned": returned, "libraries_bytes": self.libraries}


def byom(folder: Path, tasks: int, method: MergeMethod, out: Path, report: Report) -> Said:
    """Merge by byom into a folder that transformers opens."""
    clock = Clock(out)
    _load_transformers("CLIPVisionModel")  # it tells which tensors are tied
    clock.started()
    experts = {f"task{task}": Weights.open(folder / f"expert{task}") for task in range(tasks)}
    method(Problem(Weights.open(folder / "base"), experts)).save(out)
    shutil.copy(folder / "base" / "config.json", out)
    return clock.done()


def byom_adapter(folder: Path, tasks: int, method: MergeMethod | int, out: Path, report: Report) -> Said:
    """Merge adapters by byom into one adapter that PEFT opens; a number is the rank to which their mean is cut."""
    clock = Clock(out)
    _load_transformers("CLIPVisionModel")  # it tells which tensors are tied
    clock.started()
    base = Weights.open(folder / "base")
    adapted = {f"task{task}": Adapter.open(folder / f"adapter{task}").on(base) for task in range(tasks)}
    if isinstance(method, int):
        merged = truncated(cat(adapted, dict.fromkeys(adapted, 1 / tasks)), method)
    else:
        merged = method.low_rank(Problem(base, adapted))
    write_adapter(merged, out, base_model=str(folder / "base"))
    return clock.done()


def mergekit(folder: Path, tasks: int, told: Mapping[str, Any], out: Path, report: Report) -> Said:
    """Merge by the function behind mergekit's command, with the options that are fastest on a CPU."""
    clock = Clock(out)
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    _load_transformers("AutoConfig", "AutoModelForCausalLM", "CLIPVisionConfig")
    clock.started()
    own = dict(told.get("each", {}))
    models = [{"model": str(folder / f"expert{task}"), "parameters": own} for task in range(tasks)]
    text: Said = {"merge_method": told["method"], "models": models, "dtype": "float32"}
    text["parameters"] = dict(told.get("all", {}))
    if told["method"] != "linear":
        text["base_model"] = str(folder / "base")
    options = MergeOptions(
        copy_tokenizer=False,
        lazy_unpickle=True,
        write_model_card=False,
        quiet=True,
        num_threads=torch.get_num_threads(),
        **told.get("options", {}),
    )
    run_merge(MergeConfiguration.model_validate(text), str(out), options)
    return clock.done()


def fusion_bench(folder: Path, tasks: int, told: Mapping[str, Any], out: Path, report: Report) -> Said:
    """Merge by an algorithm of fusion-bench, on its own pool of models, saved as the pool saves them."""
    clock = Clock(out)
    with quiet():
        from fusion_bench.modelpool import CLIPVisionModelPool

        place, _, name = told["algorithm"].partition(":")
        algorithm = getattr(import_module(place), name)(**told["options"])
        clock.started()
        pool = CLIPVisionModelPool(_paths(folder, tasks))
        pool.save_model(algorithm.run(pool), str(out))
        return clock.done()


def fusion_bench_knots(folder: Path, tasks: int, told: Mapping[str, Any], out: Path, report: Report) -> Said:
    """Decompose every matrix by fusion-bench's part of KnOTS; what merges in that basis is not there."""
    clock = Clock(out)
    with quiet():
        from fusion_bench.method.knots.knots_utils import subspace_alignment
        from fusion_bench.modelpool import CLIPVisionModelPool
        from fusion_bench.utils.state_dict_arithmetic import state_dict_sub

        clock.started()
        pool = CLIPVisionModelPool(_paths(folder, tasks))
        with torch.no_grad():
            base = pool.load_pretrained_model().state_dict()
            changes = [state_dict_sub(model.state_dict(), base) for model in pool.models()]
            matrices = [name for name, value in base.items() if value.dim() == 2]
            for number, name in enumerate(matrices):
                subspace_alignment([change[name] for change in changes])
                report((number + 1) / (len(matrices) + 1))
        return clock.done()


def peft(folder: Path, tasks: int, told: Mapping[str, Any], out: Path, report: Report) -> Said:
    """Combine adapters by PEFT on the base into one adapter."""
    clock = Clock(out)
    from peft import PeftModel
    from transformers import CLIPVisionModel

    with quiet():
        clock.started()
        names = [f"task{task}" for task in range(tasks)]
        base = CLIPVisionModel.from_pretrained(folder / "base")
        fast = {"low_cpu_mem_usage": True}
        model = PeftModel.from_pretrained(base, str(folder / "adapter0"), adapter_name=names[0], **fast)
        for task in range(1, tasks):
            model.load_adapter(str(folder / f"adapter{task}"), names[task], **fast)
        with torch.no_grad():
            model.base_model.add_weighted_adapter(names, [1 / tasks] * tasks, "merged", **told)
        model.save_pretrained(str(out), selected_adapters=["merged"])
        return clock.done()


def _load_transformers(*names: str) -> None:
    """Import what a tool takes from transformers, which imports its modules when they are first used."""
    import transformers

    for name in names:
        getattr(transformers, name)


def _paths(folder: Path, tasks: int) -> dict[str, str]:
    experts = {f"task{task}": str(folder / f"expert{task}") for task in range(tasks)}
    return {"_pretrained_": str(folder / "base"), **experts}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what a tool prints and warns of to itself; what it raises is seen."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


WORK: Mapping[str, Callable[..., Said]] = {
    "byom": byom,
    "byom adapter": byom_adapter,
    "mergekit": mergekit,
    "fusion-bench": fusion_bench,
    "fusion-bench knots": fusion_bench_knots,
    "PEFT": peft,
}
"""How each kind of work is done."""

"""A Llama-shaped model of billions of parameters and its experts, from disk to disk, beside mergekit on the same files.

    python -m benchmarks.large --billions 3 --experts 3 --folder /tmp/large
    python -m benchmarks.large --billions 8 --experts 3 --share 0.75 --folder /tmp/large

Weights are random and experts differ from the base by small normal numbers, so nothing here says how good a method is.
Every stage has a process of its own. Seconds are wall time, until what is written is on the disk; memory is the peak of
anonymous memory beyond that of the interpreter with torch loaded (`benchmarks.peak`); the bytes are those that the disk
gave and took. Importing libraries is not part of anyone's seconds, and mergekit's are part of its memory. mergekit does
not wait until the disk has what it wrote. `plain` reads every input and writes one model, than which nothing is faster,
measured in the same run; the other rows say how many times as long they take. With `--cold` each stage starts with a
page cache without the models, otherwise with what the stage before left in it.

The disk holds the base, the experts and two merged models: 6 times 2 bytes a parameter with three experts. `--share`
makes that share of each expert's shards hard links to the base's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.options import conclude, fill, parser
from benchmarks.peak import Report, measured
from byom.checkpoint.bundle import Bundle
from byom.functional.seeding import keyed
from byom.merge.average import Average
from byom.merge.base import MergeMethod, Problem
from byom.merge.breadcrumbs import ModelBreadcrumbs
from byom.merge.dare import Dare
from byom.merge.model_stock import ModelStock
from byom.merge.task_arithmetic import TaskArithmetic
from byom.merge.ties import Ties
from byom.pipeline.provenance import provenance
from byom.storage.streamed import Spec
from byom.variants.fft import ByomFft
from byom.weights import Weights

METHODS: dict[str, tuple[MergeMethod, dict[str, Any]]] = {
    "average": (Average(), {"merge_method": "linear", "weight": 1.0}),
    "task_arithmetic": (TaskArithmetic(), {"merge_method": "task_arithmetic", "weight": 1.0, "lambda": 0.3}),
    "ties": (Ties(), {"merge_method": "ties", "weight": 1.0, "density": 0.2}),
    "dare": (Dare(), {"merge_method": "dare_linear", "weight": 1.0, "density": 0.5, "lambda": 0.3}),
    "model_stock": (ModelStock(), {"merge_method": "model_stock"}),
    "breadcrumbs": (
        ModelBreadcrumbs(),
        {"merge_method": "breadcrumbs", "weight": 1.0, "density": 0.15, "gamma": 0.006, "lambda": 0.3},
    ),
}
"""Merge methods, and what mergekit is told for the same work; its TIES and Breadcrumbs rank every tensor on its own."""
NORMALISED = {"average": True, "ties": True}
LIMIT = 4e9  # bytes of anonymous memory
SLOWER = {"average": 2.0, "task_arithmetic": 2.0, "ties": 4.0}  # times as long as the plain copy
SHAPES = {1: (2048, 8192, 16, 128256), 3: (3072, 8192, 28, 128256), 8: (4096, 14336, 32, 128256)}
SHARD = 2_000_000_000  # bytes, so that there are several
COPIED = 1 << 24  # bytes copied at once


def specs(billions: float) -> dict[str, Spec]:
    """Return the tensors of a Llama: of 1, 3 and 8 billion those of the published ones, otherwise narrow ones."""
    width, inner, layers, words = SHAPES.get(int(billions), (1024, 4096, max(1, round(billions * 55)), 32000))
    keys = width // 4
    shapes = {"model.embed_tokens.weight": (words, width), "model.norm.weight": (width,)}
    for layer in (f"model.layers.{number}." for number in range(layers)):
        shapes |= {f"{layer}self_attn.{name}_proj.weight": (width, width) for name in "qo"}
        shapes |= {f"{layer}self_attn.{name}_proj.weight": (keys, width) for name in "kv"}
        shapes |= {f"{layer}mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        shapes |= {f"{layer}mlp.down_proj.weight": (width, inner)}
        shapes |= {f"{layer}{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    if billions >= 8:
        shapes["lm_head.weight"] = (words, width)
    return {name: (shape, torch.bfloat16) for name, shape in shapes.items()}


def config(billions: float) -> dict[str, Any]:
    """Return the configuration, as transformers writes it."""
    given = specs(billions)
    words, width = given["model.embed_tokens.weight"][0]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": given["model.layers.0.mlp.gate_proj.weight"][0][0],
        "num_hidden_layers": sum(name.endswith("gate_proj.weight") for name in given),
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 256,
        "vocab_size": words,
        "tie_word_embeddings": "lm_head.weight" not in given,
        "torch_dtype": "bfloat16",
    }


def shards(given: Mapping[str, Spec]) -> list[list[str]]:
    """Return the names of each shard."""
    found, used = [[]], 0
    for name, (shape, dtype) in given.items():
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        if found[-1] and used + nbytes > SHARD:
            found, used = [*found, []], 0
        found[-1].append(name)
        used += nbytes
    return found


def make(folder: Path, billions: float, experts: int, share: float) -> None:
    """Write the base and the experts, unless they are there."""
    given = specs(billions)
    every = shards(given)
    for model in ("base", *(f"expert{number}" for number in range(experts))):
        place = folder / model
        if (place / "config.json").is_file():
            continue
        place.mkdir(parents=True, exist_ok=True)
        where = {}
        for number, names in enumerate(every):
            file = place / f"model-{number + 1:05d}-of-{len(every):05d}.safetensors"
            where |= dict.fromkeys(names, file.name)
            if model != "base" and number < share * len(every):
                file.unlink(missing_ok=True)
                os.link(folder / "base" / file.name, file)
            else:
                read = drawn(given, model)
                save_file({name: read(name) for name in names}, file, metadata={"format": "pt"})
        index = {"metadata": {"total_size": sum(f.stat().st_size for f in place.iterdir())}, "weight_map": where}
        (place / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        (place / "config.json").write_text(json.dumps(config(billions)), encoding="utf-8")


def drawn(given: Mapping[str, Spec], model: str) -> Callable[[str], Tensor]:
    """Return what draws a tensor of a model."""

    def normal(*key: str, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(keyed(*key)))

    def read(name: str) -> Tensor:
        shape, dtype = given[name]
        value = normal("base", name, shape=shape).mul_(0.02)
        if model != "base":
            value += normal(model, name, shape=shape).mul_(0.001)
        return value.to(dtype)

    return read


def problem(folder: Path, experts: int) -> Problem:
    """Open the models."""
    return Problem(
        Weights.open(folder / "base"), {f"e{n}": Weights.open(folder / f"expert{n}") for n in range(experts)}
    )


def merge(folder: Path, experts: int, method: MergeMethod, out: Path, report: Report) -> dict[str, Any]:
    """Merge from disk to disk."""
    start = loaded()
    method(problem(folder, experts)).save(out)
    return traffic() | {"seconds": round(time.perf_counter() - start, 2)}


def pack(folder: Path, experts: int, reference: Path, out: Path, report: Report) -> dict[str, Any]:
    """Pack every expert against a merged model by BYOM-FFT, and save the bundle."""
    start = loaded()
    served = ByomFft().streamed(problem(folder, experts), Weights.open(reference))
    Bundle(served.reference, served.deltas, served.base).save(out)
    return traffic() | {"seconds": round(time.perf_counter() - start, 2)}


def loaded() -> float:
    """Import what tells which tensors of a Llama are tied, and return the time from which its seconds count."""
    import transformers

    transformers.LlamaForCausalLM  # noqa: B018 - modules of transformers are imported when they are first used
    return time.perf_counter()


def plain(folder: Path, experts: int, out: Path, report: Report) -> dict[str, Any]:
    """Read every input, and write the base again."""
    buffer = memoryview(bytearray(COPIED))
    out.mkdir(parents=True)
    for model in ("base", *(f"expert{number}" for number in range(experts))):
        for file in sorted((folder / model).glob("*.safetensors")):
            with file.open("rb", buffering=0) as source, (out / file.name).open("wb", buffering=0) as target:
                while count := source.readinto(buffer):
                    if model == "base":
                        target.write(buffer[:count])
                if model == "base":
                    os.fsync(target.fileno())
    return traffic()


def mergekit(folder: Path, experts: int, name: str, threads: int, out: Path, report: Report) -> dict[str, Any]:
    """Merge by mergekit's own command, in this process."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    start = time.perf_counter()
    told = dict(METHODS[name][1])
    kept = {key: told.pop(key) for key in ("weight", "density", "gamma") if key in told}
    models = [{"model": str(folder / f"expert{n}"), "parameters": kept} for n in range(experts)]
    shared = {key: told.pop(key) for key in ("lambda",) if key in told} | {"normalize": NORMALISED.get(name, False)}
    text = {**told, "models": models, "dtype": "bfloat16", "parameters": {} if name == "model_stock" else shared}
    if name != "average":
        text["base_model"] = str(folder / "base")
    options = MergeOptions(
        copy_tokenizer=False, lazy_unpickle=True, write_model_card=False, quiet=True, num_threads=threads
    )
    run_merge(MergeConfiguration.model_validate(text), str(out), options)
    return traffic() | {"seconds": round(time.perf_counter() - start, 2)}


def traffic() -> dict[str, Any]:
    """Return the bytes that this process's calls have moved, and those that came from and went to the disk."""
    text = Path("/proc/self/io").read_text(encoding="utf-8")
    counts = {line.split(": ")[0]: int(line.split(": ")[1]) for line in text.splitlines()}
    return {key: counts[key] for key in ("rchar", "wchar", "read_bytes", "write_bytes")}


def rows(given: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure every stage, one after the other."""
    folder, out = given.folder / f"{given.billions:g}B", given.folder / "out"
    make(folder, given.billions, given.experts, given.share)
    chosen = [name for name in METHODS if not given.only or name in given.only]
    yield "plain", take(given, plain, folder, given.experts, out)
    for name in chosen:
        yield f"byom {name}", take(given, merge, folder, given.experts, METHODS[name][0], out, keep=name == "ties")
        if not given.alone:
            yield f"mergekit {name}", take(given, mergekit, folder, given.experts, name, given.threads, out)
    if (given.folder / "kept").is_dir():
        yield "byom pack fft", take(given, pack, folder, given.experts, given.folder / "kept", out)
        shutil.rmtree(given.folder / "kept")


def take(given: argparse.Namespace, work: Callable[..., dict], *arguments: Any, keep: bool = False) -> dict[str, Any]:
    """Measure a stage, the best of several runs, and remove what it wrote."""
    out: Path = next(each for each in reversed(arguments) if isinstance(each, Path))
    best: dict[str, Any] = {}
    for _ in range(given.repeats):
        shutil.rmtree(out, ignore_errors=True)
        if given.cold:
            forget(given.folder)
        run = measured(work, *arguments, threads=given.threads, limit=given.limit)
        row = {"seconds": round(run.seconds, 2), "peak_bytes": run.peak, "finished": run.finished, **run.said}
        best = row if not best or row["seconds"] < best["seconds"] else best
    if keep:
        shutil.rmtree(given.folder / "kept", ignore_errors=True)
        out.rename(given.folder / "kept")
    shutil.rmtree(out, ignore_errors=True)
    sys.stderr.write(f"{work.__name__}: {best}\n")
    return best


def forget(folder: Path) -> None:
    """Drop the pages of all files from the page cache; what is on the disk stays."""
    for file in folder.rglob("*.safetensors"):
        with file.open("rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def table(result: Mapping[str, Any]) -> str:
    """Return a Markdown table."""
    stages, by = result["stages"], result["provenance"]
    floor = stages["plain"]["seconds"]
    cache = "dropped before each stage" if result["cold"] else "as the stage before left it"
    lines = [
        f"{result['parameters'] / 1e9:.2f} B parameters in bf16, {result['experts']} experts, {by['threads']} threads, "
        f"page cache {cache}, best of {result['repeats']}",
        "",
        "| stage | s | times plain | anonymous memory | from disk | to disk |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for stage, row in stages.items():
        figures = f"{row['seconds']:.1f} | {row['seconds'] / floor:.1f} | {row['peak_bytes'] / 1e6:,.0f} MB"
        moved = " | ".join(f"{row.get(key, 0) / 1e9:.1f} GB" for key in ("read_bytes", "write_bytes"))
        lines.append(f"| {stage}{'' if row['finished'] else ' (stopped)'} | {figures} | {moved} |")
    return "\n".join(lines)


def missed(result: Mapping[str, Any]) -> str:
    """Return the sentences about missed targets, or nothing."""
    stages, said = result["stages"], []
    for stage, row in stages.items():
        who, _, name = stage.partition(" ")
        if who == "byom" and row["peak_bytes"] > LIMIT:
            said.append(f"{stage} took {row['peak_bytes'] / 1e9:.1f} GB of anonymous memory, 4 are allowed")
        if who == "byom" and row["seconds"] > SLOWER.get(name, float("inf")) * stages["plain"]["seconds"]:
            said.append(f"{stage} took {row['seconds'] / stages['plain']['seconds']:.1f} times the plain copy")
        peer = stages.get(f"mergekit {name}")
        if who == "byom" and peer and row["seconds"] > peer["seconds"]:
            said.append(f"{stage} took {row['seconds']:.1f} s, mergekit {peer['seconds']:.1f} s")
    return "\n".join(said)


def options() -> argparse.Namespace:
    """Read the command line."""
    given = parser(__doc__ or "", repeats=1)
    given.add_argument("--billions", type=float, default=3.0, help="parameters: 1, 3, 8, or a fraction")
    given.add_argument("--experts", type=int, default=3)
    given.add_argument("--share", type=float, default=0.0, help="share of an expert's shards that are the base's")
    given.add_argument("--folder", type=Path, required=True, help="where models are written; they stay there")
    given.add_argument("--only", type=lambda text: text.split(","), default=[], help=f"of {', '.join(METHODS)}")
    given.add_argument("--alone", action="store_true", help="leave mergekit out")
    given.add_argument("--cold", action="store_true", help="drop the models from the page cache before each stage")
    given.add_argument("--limit", type=float, default=3600.0, help="seconds a stage may take")
    given.add_argument("--threads", type=int, default=2)
    given.add_argument("--page", type=Path, help="a page whose section <!-- large --> gets the table")
    read = given.parse_args()
    if unknown := [name for name in read.only if name not in METHODS]:
        given.error(f"'{unknown[0]}' is none of {', '.join(METHODS)}")
    if not 0 <= read.share < 1 or min(read.experts, read.repeats, read.threads) < 1 or read.billions <= 0:
        given.error("--share must be in [0, 1), and --experts, --repeats, --threads and --billions positive")
    return read


def main() -> None:
    """Measure, print, and write or check on request."""
    given = options()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as byom's commands do; the stages' processes inherit it
    facts = {key: getattr(given, key) for key in ("experts", "share", "cold", "repeats")}
    numbers = sum(torch.Size(shape).numel() for shape, _ in specs(given.billions).values())
    result = {"parameters": numbers, **facts, "provenance": provenance() | {"threads": given.threads}}
    result["stages"] = dict(rows(given))
    if given.page:
        fill(given.page, "large", table(result))
    conclude(result, table(result), missed(result), given)


if __name__ == "__main__":
    main()

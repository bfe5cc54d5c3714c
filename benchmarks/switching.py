"""Switching a live model between two tasks of a BYOM-FFT bundle, one thread, one run.

    python -m benchmarks.switching --check --json switching.json

The tensors have the shapes of GPT-2 small (124 M parameters); each task puts a tenth of them back. `Bundle.attach` is
compared with a loop over ``index_copy_`` and ``index_select`` in plain torch, with all positions decoded as int64, and
with `load_state_dict`. After every routine the model has the bits of ``bundle.weights(task)``. `--check` fails if a
switch takes 0.1 s or more and also 1.3 times as long as plain torch, or more. Times are the best of the repeats, each
of which takes every routine once, there and back. Needs about 3 GB of memory and 0.6 GB of disk.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.options import conclude, parser
from byom.checkpoint.bundle import Bundle
from byom.functional.seeding import keyed
from byom.variants.base.positions import decode
from byom.variants.fft import ByomFft
from byom.weights import Weights

SECONDS = 0.1
TIMES_PLAIN = 1.3
TASKS = ("a", "b")
SHOWN = {
    "byom": "byom, Bundle.attach",
    "plain": "plain torch, int64 positions",
    "load": "load_state_dict(bundle.weights(task).state())",
}
LAYER = {
    "ln_1.weight": (768,), "ln_1.bias": (768,), "attn.c_attn.weight": (768, 2304), "attn.c_attn.bias": (2304,),
    "attn.c_proj.weight": (768, 768), "attn.c_proj.bias": (768,), "ln_2.weight": (768,), "ln_2.bias": (768,),
    "mlp.c_fc.weight": (768, 3072), "mlp.c_fc.bias": (3072,), "mlp.c_proj.weight": (3072, 768),
    "mlp.c_proj.bias": (768,),
}  # fmt: skip


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of a GPT-2 of width 768."""
    inner = {f"h.{layer}.{name}": shape for layer in range(layers) for name, shape in LAYER.items()}
    return {"wte.weight": (50257, 768), "wpe.weight": (1024, 768), **inner, "ln_f.weight": (768,), "ln_f.bias": (768,)}


def drawn(layers: int, *key: str) -> dict[str, Tensor]:
    """Draw values for all tensors."""
    generator = torch.Generator().manual_seed(keyed(0, *key))
    return {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in shapes(layers).items()}


def packed(layers: int, density: float, folder: str) -> Bundle:
    """Pack two tasks near one reference, and open what was written."""
    reference = drawn(layers, "reference")
    finetuned = {
        task: Weights.of({name: reference[name] + 0.1 * change for name, change in drawn(layers, task).items()})
        for task in TASKS
    }
    bundle = Bundle.pack(ByomFft(density), finetuned, Weights.of(reference))
    return Bundle.open(bundle.save(folder))


class Plain:
    """The loop that one writes without a library."""

    def __init__(self, bundle: Bundle, named: dict[str, Tensor]) -> None:
        self.named = named
        self.saved: dict[str, tuple[Tensor, Tensor]] = {}
        self.tasks: dict[str, dict[str, tuple[Tensor, Tensor]]] = {task: {} for task in TASKS}
        for task in TASKS:
            for name, parts in bundle.deltas[task].parts.items():
                kind = next(part for part in parts if part != "values")
                values = parts["values"]
                self.tasks[task][name] = decode(kind, parts[kind], named[name].numel(), len(values)), values

    @torch.no_grad()
    def switch(self, task: str | None) -> None:
        """Put back what was overwritten, and overwrite."""
        new = self.tasks[task] if task else {}
        kept: dict[str, tuple[Tensor, Tensor]] = {}
        for name in {**self.saved, **new}:
            flat = self.named[name].view(-1)
            if name in self.saved:
                flat.index_copy_(0, *self.saved[name])
            if name in new:
                places, values = new[name]
                kept[name] = places, flat.index_select(0, places)
                flat.index_copy_(0, places, values)
        self.saved = kept

    @property
    def nbytes(self) -> int:
        """Bytes of positions and of overwritten values."""
        positions = sum(places.nbytes for entries in self.tasks.values() for places, _ in entries.values())
        return positions + sum(values.nbytes for _, values in self.saved.values())


def measure(options: argparse.Namespace) -> dict:
    """Run everything once; raises SystemExit if bits differ."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = packed(options.layers, options.density, f"{folder}/bundle")
        model = module({name: tensor.clone() for name, tensor in bundle.reference.state().items()})
        named: dict[str, Tensor] = dict(model.named_parameters())
        plain, handle = Plain(bundle, named), bundle.attach(model)

        def load(task: str) -> None:
            model.load_state_dict(bundle.weights(task).state())

        def best(switch: Callable[[str], object]) -> list[float]:
            switch(TASKS[1])  # decodes, and warms caches
            seconds = []
            for task in TASKS:
                start = time.perf_counter()
                switch(task)
                seconds.append(time.perf_counter() - start)
                require_bits(named, bundle.weights(task))
            return seconds

        taken: dict[str, list[float]] = {name: [] for name in SHOWN}
        for _ in range(options.repeats):
            taken["byom"] += best(handle.switch)
            extra = handle.cached_bytes + handle.saved_bytes
            handle.switch(None)
            taken["plain"] += best(plain.switch)
            bytes_plain = plain.nbytes
            plain.switch(None)
            taken["load"] += best(load)
            model.load_state_dict(bundle.reference.state())
        size = sum(tensor.nbytes for tensor in named.values())
    rows = {name: {"seconds": min(each)} for name, each in taken.items()}
    for name, nbytes in (("byom", extra), ("plain", bytes_plain), ("load", size)):
        rows[name] |= {"extra_bytes": nbytes, "ratio": rows[name]["seconds"] / rows["plain"]["seconds"]}
    return {
        "parameters": bundle.reference.numel,
        "density": options.density,
        "threads": torch.get_num_threads(),
        "repeats": options.repeats,
        "model_bytes": size,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "rows": rows,
    }


def module(state: dict[str, Tensor]) -> nn.Module:
    """Return a module that holds tensors under the names of a state dict."""
    outer = nn.Module()
    for name, tensor in state.items():
        *path, last = name.split(".")
        inner = outer
        for part in path:
            if part not in inner._modules:
                inner.add_module(part, nn.Module())
            inner = inner.get_submodule(part)
        inner.register_parameter(last, nn.Parameter(tensor))
    return outer


def require_bits(named: dict[str, Tensor], weights: Weights) -> None:
    """Stop if a tensor of the model is not the task's."""
    if wrong := [name for name, tensor in named.items() if not torch.equal(tensor, weights[name])]:
        raise SystemExit(f"{wrong[0]} does not have the task's values after a switch; please report it")


def table(result: dict) -> str:
    """A Markdown table."""
    head = "{parameters:,} parameters fp32, density {density}, threads={threads}, best of {repeats}".format(**result)
    lines = [
        head,
        "",
        "| routine | s/switch | times plain torch | MB kept beside model and bundle |",
        "|---|---:|---:|---:|",
    ]
    for name, row in result["rows"].items():
        figures = f"{row['seconds']:.3f} | {row['ratio']:.2f} | {row['extra_bytes'] / 1e6:.0f}"
        lines.append(f"| {SHOWN[name]} | {figures} |")
    return "\n".join(lines)


def missed(result: dict) -> str:
    """The sentence about a missed target, or nothing."""
    row = result["rows"]["byom"]
    if row["seconds"] < SECONDS or row["ratio"] < TIMES_PLAIN:
        return ""
    return (
        f"a switch took {row['seconds']:.3f} s (target: below {SECONDS:g}), {row['ratio']:.2f} times plain torch "
        f"(target: below {TIMES_PLAIN:g}); repeat on an idle machine"
    )


def main() -> None:
    """Measure, print, and write or check on request."""
    given = parser(__doc__ or "", repeats=5)
    given.add_argument("--layers", type=int, default=12, help="1 is enough to try it")
    given.add_argument("--density", type=float, default=0.1)
    options = given.parse_args()
    torch.set_num_threads(1)
    result = measure(options)
    conclude(result, table(result), missed(result), options)


if __name__ == "__main__":
    main()

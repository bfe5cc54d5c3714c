"""Small models and merging problems that hold everything a real checkpoint does, and helpers to watch them."""

from collections.abc import Mapping
from dataclasses import fields, replace
from functools import cache
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import nn

from byom.cli import config
from byom.functional.seeding import keyed
from byom.merge.base import Member, Problem
from byom.merge.task_arithmetic import TaskArithmetic
from byom.weights import Spec, Weights
from tests.probes import TinyProbe


def slow(*values):
    """Return parameters that `make test` leaves out: a law that holds at the others nearly always holds at them."""
    return [pytest.param(value, marks=pytest.mark.slow, id=str(value)) for value in values]


FLOATS = {
    "embed": (7, 5),
    "empty": (0, 3),
    "layer.bias": (6,),
    "layer.weight": (6, 4),
    "one": (1,),
    "scale": (),
}
TIED = {"head": "embed"}
BUFFERS = ["counter", "flags"]
DTYPES = [torch.bfloat16, *slow(torch.float16, torch.float32, torch.float64)]
IN_AND_OUT_OF_PLACE = [torch.float32, *slow(torch.bfloat16, torch.float64)]
"""What is cast to fp32 or fp64 is a copy or the tensor itself; float16 is cast as bfloat16 is."""
NARROW_AND_WIDE = [torch.bfloat16, *slow(torch.float32)]
"""Storage and order of reading know bytes alone."""
QUICK = {  # laws of methods that adapt hold after any number of steps; more would take time and test nothing else
    "adamerging": {"steps": 3},
    "adarank": {"steps": 3, "learning_rate": 0.05},  # far enough for components to be turned off
    "awd": {"steps": 3},
    "wudi": {"steps": 3},
    "surgery": {"steps": 3},
    "flex": {"method": TaskArithmetic(0.5)},  # by which laws merge the reference; a run gives the variant its own
    "symerge": {"steps": 3},
    "localize_and_stitch": {"steps": 3, "learning_rate": 4.0},  # far enough for scores to change places
}


SHRUNK = {  # options that many variants have, of one that is sparse and one that is not: all would take minutes
    "post_pruning": {"values": "int4", "positions": "entropy"},
    "lora": {"values": "int3"},
}


def grid(shape, generator, span):
    """Multiples of 1/64: sums and differences are exact in fp32, and magnitudes often tie."""
    return torch.randint(-span, span + 1, shape, generator=generator) / 64


def normal(shape, generator, span):
    return torch.randn(shape, generator=generator) * span / 64


def model(seed, dtype=torch.float32, *, around=None, values=normal, span=32):
    """Make a state dict with 0-dim, empty and one-element tensors, buffers, and one tied pair."""
    generator = torch.Generator().manual_seed(seed)
    state = {name: values(shape, generator, span) for name, shape in FLOATS.items()}
    if around is not None:
        state = {name: around[name].float() + tensor for name, tensor in state.items()}
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    buffers = {"counter": torch.tensor(seed), "flags": torch.tensor([seed % 2 == 0, True])}
    return state | {alias: state[name] for alias, name in TIED.items()} | buffers


def models(tasks=3, dtype=torch.float32, *, values=normal, seed=0):
    """Return the state dicts of theta_0 and of every theta_t near it."""
    base = model(seed, dtype, values=values, span=64)
    return base, {f"task{t}": model(seed + t, dtype, around=base, values=values) for t in range(1, tasks + 1)}


def problem(base, finetuned):
    return posed(Weights.of(base, "pre-trained"), {t: Weights.of(s, t) for t, s in finetuned.items()})


def posed(pretrained, finetuned):
    """Return a problem with inputs, statistics drawn by task and parameter, and further members."""
    statistics = {
        "fisher": {task: precisions(pretrained, task, "fisher") for task in finetuned},
        "ivon": {task: precisions(pretrained, task, "ivon") for task in finetuned},
        "gram": {task: Weights.of(grams(pretrained, task)) for task in finetuned},
    }
    members, probe = Members(pretrained, finetuned), DrawnProbe(pretrained, finetuned)
    return Problem(pretrained, finetuned, statistics, members, probe)


def drawn(*key):
    """Return a generator for a task, whatever is put before its name."""
    return torch.Generator().manual_seed(keyed(*(str(part).split()[-1] for part in key)))


def precisions(base, *key):
    """Draw positive values for all parameters but one."""
    return positive(tuple((name, base.shape(name)) for name in base.mergeable() if name != "one"), *key)


@cache
def positive(shapes, *key):
    return Weights.of({name: torch.rand(shape, generator=drawn(*key, name)) + 0.01 for name, shape in shapes})


def grams(base, task):
    """Draw positive definite matrices for the inputs of all matrices; `layer.weight` is stored in x out."""
    shapes = {name: base.shape(name) for name in base.mergeable()}
    return {name: gram(task, name, shape) for name, shape in shapes.items() if len(shape) == 2}


@cache
def gram(task, name, shape):
    turned = name == "layer.weight"
    size = shape[0 if turned else 1]
    rows = torch.randn(size + 3, size, generator=drawn("gram", task, name))
    return (rows.T @ rows / len(rows)).reshape(*[1] * turned, size, size)


def members_of(base, task, expert):
    """Return three solutions of a task on one line, with statistics."""
    further = [expert, base + 1.25 * (expert - base), base + 0.75 * (expert - base)]
    kinds = ("fisher", "ivon")
    return [
        Member(weights, {kind: precisions(base, task, kind, k) for kind in kinds}) for k, weights in enumerate(further)
    ]


class Members(Mapping):
    """The members of each task, made when a method asks for them: few methods do."""

    def __init__(self, pretrained, finetuned):
        self._pretrained, self._finetuned = pretrained, finetuned

    def __getitem__(self, task):
        return members_of(self._pretrained, task, self._finetuned[task])

    def __iter__(self):
        return iter(self._finetuned)

    def __len__(self):
        return len(self._finetuned)


class DrawnProbe(TinyProbe):
    """A probe whose Grams are drawn, like the statistic's."""

    def grams(self, state, task, split, examples, parameters):
        self.seen.add(split)
        return {name: gram.double() for name, gram in grams(self.pretrained, task).items() if name in parameters}

    def order(self):
        return [[name] for name in grams(self.pretrained, "order")]


def scaled(base, finetuned, factor):
    """Multiply every task vector by `factor`; what is not floating point stays."""

    def stretch(name, tensor):
        return base[name] + factor * (tensor - base[name]) if tensor.is_floating_point() else tensor

    stretched = {t: {n: stretch(n, v) for n, v in s.items()} for t, s in finetuned.items()}
    return {t: tied(s) for t, s in stretched.items()}


def tied(state):
    return state | {alias: state[name] for alias, name in TIED.items()}


def module(state):
    """Return a live module with the tensors of a state dict under their names; tied names are one parameter."""
    outer, held = nn.Module(), {}
    for name, tensor in state.items():
        *path, last = name.split(".")
        inner = outer
        for part in path:
            if part not in inner._modules:
                inner.add_module(part, nn.Module())
            inner = inner.get_submodule(part)
        if tensor.is_floating_point():
            own = held.setdefault(id(tensor), nn.Parameter(tensor.clone()))
            inner.register_parameter(last, own)
        else:
            inner.register_buffer(last, tensor.clone())
    return outer


def counted(weights, checksums=False):
    """Return the same weights and the list of names read from them, growing."""
    reads = []

    def read(name):
        reads.append(name)
        return weights[name]

    specs = {name: Spec(weights.shape(name), weights.dtype(name)) for name in weights}
    checksum = weights.checksum if checksums else None
    return Weights(specs, read, ties=weights.ties, origin=weights.origin, checksum=checksum), reads


def random(*shape, seed=0):
    """Return normal numbers in fp64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one_tensor(deltas, name="w", base=0.5):
    """Return the problem of one tensor, from task vectors ``[T, ...]`` on a constant pre-trained model."""
    experts = {str(t): Weights.of({name: delta + base}) for t, delta in enumerate(deltas)}
    return Problem(Weights.of({name: torch.full_like(deltas[0], base)}), experts)


def bits(tensor):
    """Return a tensor's bytes: equality that tells -0 from 0 and NaN from NaN."""
    flat = tensor.detach().contiguous().reshape(-1)
    flat = flat.as_strided((flat.numel(),), (1,))  # of one value, any stride counts as contiguous
    return tensor.dtype, tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes() if len(flat) else b""


def same(a, b):
    """Say whether two sets of weights, or state dicts, have the same names and the same bits."""
    return sorted(a.keys()) == sorted(b.keys()) and all(bits(a[name]) == bits(b[name]) for name in a.keys())  # noqa: SIM118


def configured(overrides):
    """Return the merge method that some overrides configure."""
    return config.made(config.resolve(overrides).values["merge"])


@cache
def options(group):
    """Build every option of a group: its yaml, and its yaml with each other value of each `Literal` field."""
    built = {}
    for choice in config.options(group):
        option = config.made(config.resolve([], f"{group}/{choice}").values[group])
        option = replace(option, **QUICK.get(choice, {}))
        built[choice] = option
        built |= {f"{choice}-{name}={value}": replace(option, **{name: value}) for name, value in _others(option)}
        if group == "byom" and (fewer := SHRUNK.get(choice)):
            built[f"{choice}-{','.join(f'{name}={value}' for name, value in fewer.items())}"] = replace(option, **fewer)
    return built


def rows(group):
    """Return the names of `options`; `make test` leaves out those that differ from a yaml in one field alone."""
    return [param for name in options(group) for param in (slow(name) if name.count("=") == 1 else [name])]


def _others(option):
    hints = get_type_hints(type(option))
    hints = {name: hint for name, hint in hints.items() if name not in ("values", "positions")}
    literals = {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}
    return [(f.name, v) for f in fields(option) for v in literals.get(f.name, ()) if v != getattr(option, f.name)]

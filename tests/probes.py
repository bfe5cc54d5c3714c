"""Small probes: tasks of drawn inputs in front of any differentiable encoder, without data or backbones."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from byom.functional.heads import Head
from byom.functional.seeding import keyed
from byom.merge.base import Problem
from byom.merge.base.probe import Batch, Features, Probe
from byom.weights import Weights

Encoder = Callable[[Mapping[str, Tensor], Tensor], Tensor]  # (all floating-point tensors, x [B, K]) -> [B, D]


def folded(state, x):
    """Encode with whatever tensors there are: every entry scales one input, so that every entry has a gradient."""
    flat = torch.cat([state[name].float().reshape(-1) for name in sorted(state)])
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % x.shape[1]))
    return torch.tanh(x * (1 + flat.reshape(-1, x.shape[1]).sum(0)))


class TinyProbe(Probe):
    """Inputs, labels and heads drawn for each task by what its expert holds, whatever the task is called.

    Labels are what the expert says. `examples` fit in one batch unless a method asks for smaller ones.
    """

    def __init__(
        self,
        pretrained: Weights,
        finetuned: Mapping[str, Weights],
        encoder: Encoder = folded,
        sizes: tuple[int, int] = (5, 5),
        examples: int = 12,
        classes: int = 3,
    ) -> None:
        self.pretrained, self.finetuned, self.encoder = pretrained, finetuned, encoder
        self.width, self.dimensions = sizes
        self.count, self.classes = examples, classes
        self.seen: set[str] = set()  # splits whose inputs were read
        self._drawn: dict[tuple[str, str], Batch] = {}

    def examples(self, task, split):
        return self.count

    def batches(self, task, split, size, seed):
        epoch = 0
        while True:
            order = torch.randperm(self.count, generator=self._generator(seed, task, split, epoch))
            yield from (self.take(task, split, index) for index in order.split(size))
            epoch += 1

    def shots(self, task, split, per_class, seed):
        labels = self._all(task, split).labels
        return torch.cat([(labels == label).nonzero()[:per_class, 0] for label in labels.unique()]).sort().values

    def take(self, task, split, index):
        held = self._all(task, split)
        return Batch({name: value[index] for name, value in held.inputs.items()}, held.labels[index], index)

    def encode(self, state, inputs):
        missing = {name: self.pretrained[name] for name in self.pretrained.mergeable() if name not in state}
        return self.encoder({name: value.float() for name, value in (missing | dict(state)).items()}, inputs["x"])

    def readout(self, task):
        weight = torch.randn(self.classes, self.dimensions, generator=self._generator(self._content(task), "head"))
        return Head(torch.nn.functional.normalize(weight, dim=-1), 5.0)

    @torch.no_grad()
    def features(self, weights, task, split):
        held = self._all(task, split)
        return Features(self.encode({name: weights[name] for name in weights.mergeable()}, held.inputs), held.labels)

    def grams(self, state, task, split, examples, parameters):
        raise NotImplementedError

    def order(self):
        raise NotImplementedError

    def joint(self, shares):
        """Stand in for joint fine-tuning by a mean of the experts."""
        mean = sum(shares.values())
        return self.pretrained + sum((self.finetuned[t] - self.pretrained) * (s / mean) for t, s in shares.items())

    def _all(self, task, split):
        self.seen.add(split)
        if (task, split) not in self._drawn:
            x = torch.randn(self.count, self.width, generator=self._generator(self._content(task), split))
            state = {name: self.finetuned[task][name] for name in self.finetuned[task].mergeable()}
            with torch.no_grad():
                labels = self.readout(task)(self.encode(state, {"x": x})).argmax(-1)
            self._drawn[task, split] = Batch({"x": x}, labels, torch.arange(self.count))
        return self._drawn[task, split]

    def _content(self, task):
        expert = self.finetuned[task]
        return float(sum(expert[name].double().sum() for name in expert.mergeable()))

    def _generator(self, *key):
        return torch.Generator().manual_seed(keyed(*key))


def network(seed, around=None, span=0.3):
    """Make a small real module; its parameters are another's plus noise if there is one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 6)).eval()
        if around is not None:
            with torch.no_grad():
                for parameter, other in zip(module.parameters(), around.parameters(), strict=True):
                    parameter.copy_(other + span * torch.randn(other.shape))
    return module


def networks(tasks=2, **options):
    """Return a problem of small real modules, with a probe that calls one of them."""
    base = network(0)
    pretrained = Weights.of(base.state_dict(), "pre-trained")
    finetuned = {f"task{t}": Weights.of(network(t, base).state_dict(), f"task{t}") for t in range(1, tasks + 1)}
    probe = TinyProbe(
        pretrained, finetuned, lambda state, x: functional_call(base, dict(state), x), sizes=(4, 6), **options
    )
    return Problem(pretrained, finetuned, probe=probe)

"""Every merge method and variant on a device: it computes there, returns what it does on the CPU, and mixes nothing."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch.testing import assert_close

from byom.checkpoint.bundle import Bundle
from byom.errors import WeightsMismatch
from byom.merge.base import Member, Problem
from byom.merge.base.probe import Features
from byom.merge.task_arithmetic import TaskArithmetic
from byom.weights import Weights
from tests.problems import FLOATS, DrawnProbe, bits, grams, members_of, models, options, precisions

METHODS = options("merge")
VARIANTS = options("byom")
NEAR = {"rtol": 1e-5, "atol": 1e-7}
"""How near a device comes to the CPU in fp32, where a method is not in `TOLERANCE`."""
TOLERANCE = {}


class FarProbe(DrawnProbe):
    """A probe like that of a lab on a device: it encodes there, and takes inputs and gives features on the CPU."""

    def __init__(self, pretrained, finetuned, place):
        super().__init__(pretrained, finetuned)
        self.place = place

    def encode(self, state, inputs):
        missing = {name: self.pretrained[name] for name in self.pretrained.mergeable() if name not in state}
        every = {name: value.to(self.place).float() for name, value in (missing | dict(state)).items()}
        return self.encoder(every, inputs["x"].to(self.place))

    @torch.no_grad()
    def features(self, weights, task, split):
        held = self._all(task, split)
        state = {name: weights[name] for name in weights.mergeable()}
        return Features(self.encode(state, held.inputs).float().cpu(), held.labels)

    def grams(self, state, task, split, examples, parameters):
        found = super().grams(state, task, split, examples, parameters)
        return {name: gram.to(self.place) for name, gram in found.items()}

    def _all(self, task, split):
        held = super()._all(task, split)
        return held._replace(labels=held.labels.cpu())


def moved(weights, place):
    """Return weights in memory, on a device."""
    state = {name: weights[name].to(place) for name in weights.canonical()}
    return Weights.of({name: state[weights.ties.get(name, name)] for name in weights}, weights.origin)


def posed(place, probed):
    """Return the usual problem of three tasks with its models on one device, and its encoder on another."""
    base, tuned = models()
    held, experts = Weights.of(base, "pre-trained"), {task: Weights.of(state, task) for task, state in tuned.items()}
    here = probed.type == "cpu"
    probe = DrawnProbe(held, experts) if here else FarProbe(held, experts, probed)
    kinds = {kind: {task: precisions(held, task, kind) for task in experts} for kind in ("fisher", "ivon")}
    kinds["gram"] = {task: Weights.of(grams(held, task)) for task in experts}
    statistics = {k: {task: moved(each, place) for task, each in found.items()} for k, found in kinds.items()}
    members = {task: [_moved(member, place) for member in members_of(held, task, experts[task])] for task in experts}
    return Problem(
        moved(held, place), {task: moved(each, place) for task, each in experts.items()}, statistics, members, probe
    )


def _moved(member, place):
    return Member(moved(member.weights, place), {kind: moved(each, place) for kind, each in member.statistics.items()})


CPU = torch.device("cpu")


@cache
def merged_here(name):
    """Return what a method merges on the CPU."""
    return METHODS[name](posed(CPU, CPU)).state()


@cache
def served_here(name):
    """Return what a variant serves on the CPU."""
    return states(served(VARIANTS[name], posed(CPU, CPU)))


def served(variant, given):
    prepared = variant.before(given) if variant.before else given
    reference = given.pretrained if variant.on == "pretrained" else TaskArithmetic(0.5)(prepared).materialise()
    return variant.serve(given, reference)


def states(served):
    return {task: served.weights(task).state() for task in served.deltas}


def near(found, expected, **tolerance):
    for name in FLOATS:
        assert_close(found[name].cpu(), expected[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def lie(state):
    return {tensor.device for tensor in state.values()}


@pytest.mark.parametrize("name", METHODS)
def test_models_on_a_device_are_merged_there(name, device):
    state = METHODS[name](posed(device, device)).state()
    assert lie(state) == {device}
    near(state, merged_here(name), **TOLERANCE.get(name, NEAR))


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.needs.inputs or method.needs.statistics])
def test_an_encoder_on_a_device_serves_models_on_the_cpu(name, device):
    state = METHODS[name](posed(CPU, device)).state()
    assert lie(state) == {CPU}
    near(state, merged_here(name), **TOLERANCE.get(name, NEAR))


@pytest.mark.parametrize("name", VARIANTS)
def test_models_on_a_device_are_served_there(name, device, tmp_path):
    found = served(VARIANTS[name], posed(device, device))
    assert all(lie(parts) == {CPU} for delta in found.deltas.values() for parts in delta.parts.values())
    every = states(found)
    assert all(lie(state) == {device} for state in every.values())
    opened = Bundle.open(Bundle(found.reference, found.deltas, found.base).save(tmp_path / "bundle"))
    for task, state in every.items():
        near(state, served_here(name)[task], **TOLERANCE.get(name, NEAR))
        assert all(bits(opened.weights(task)[each]) == bits(state[each].cpu()) for each in FLOATS)


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.needs.inputs])
def test_an_encoder_on_a_device_serves_variants_on_the_cpu(name, device):
    found = served(VARIANTS[name], posed(CPU, device))
    for task, state in states(found).items():
        assert lie(state) == {CPU}
        near(state, served_here(name)[task], **TOLERANCE.get(name, NEAR))

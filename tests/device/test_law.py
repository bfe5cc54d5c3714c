"""Every merge method and variant on a device: it computes there, returns what it does on the CPU, and mixes nothing."""

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch.testing import assert_close

from byom.checkpoint.bundle import Bundle
from byom.errors import CheckpointError, OptionError, WeightsMismatch
from byom.functional import histogram
from byom.functional.selection import Part, locate, locate_each, top_mask
from byom.merge.base import Member, Problem, TensorwiseMethod
from byom.merge.base import problem as merging
from byom.merge.base.probe import Features
from byom.merge.task_arithmetic import TaskArithmetic
from byom.merge.ties import Ties
from byom.variants.base.sparse import TopMagnitude
from byom.weights import Weights, placed
from byom.weights.lowrank import Adapted, Piece
from tests.problems import FLOATS, TIED, DrawnProbe, bits, counted, grams, members_of, models, options, precisions, rows

METHODS = options("merge")
VARIANTS = options("byom")
NEAR = {"rtol": 1e-5, "atol": 1e-7}
"""How near a device comes to the CPU in fp32, where a method is not in `TOLERANCE`."""
FACTORED = {"rtol": 1e-4, "atol": 1e-6}
LEARNT = {"rtol": 1e-3, "atol": 1e-4}
TOLERANCE = {
    **dict.fromkeys(("tsv", "iso_c", "iso_cts", "knots", "core_space", "regmean", "regmean_plus_plus"), FACTORED),
    **dict.fromkeys(("lora", "tsv_compress", "twin", "dts", "model_stock", "awd", "mixture"), FACTORED),
    **dict.fromkeys(("adamerging", "symerge", "surgery", "localize_and_stitch", "wudi"), LEARNT),
}
"""How near a card comes to the CPU where it factors matrices by other algorithms, or where what is learnt takes steps
whose size does not shrink with the gradient's. The simulated device computes as the CPU does: there, `NEAR` holds."""
CARD = torch.cuda.is_available()


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


@cache
def tensors(place):
    """Return the usual models of three tasks with statistics and members, whose tensors are on a device."""
    base, tuned = models()
    held, experts = Weights.of(base, "pre-trained"), {task: Weights.of(state, task) for task, state in tuned.items()}
    kinds = {kind: {task: precisions(held, task, kind) for task in experts} for kind in ("fisher", "ivon")}
    kinds["gram"] = {task: Weights.of(grams(held, task)) for task in experts}
    members = {task: members_of(held, task, experts[task]) for task in experts}
    return (
        moved(held, place).state(),
        {task: moved(each, place).state() for task, each in experts.items()},
        {kind: {task: moved(each, place) for task, each in found.items()} for kind, found in kinds.items()},
        {
            task: [Member(moved(m.weights, place), _all(m.statistics, place)) for m in each]
            for task, each in members.items()
        },
    )


def _all(statistics, place):
    return {kind: moved(each, place) for kind, each in statistics.items()}


def posed(place, probed):
    """Return the usual problem with its models on one device, and its encoder on another, as if new."""
    base, tuned = models()
    held, experts = Weights.of(base, "pre-trained"), {task: Weights.of(state, task) for task, state in tuned.items()}
    probe = DrawnProbe(held, experts) if probed.type == "cpu" else FarProbe(held, experts, probed)
    base, tuned, statistics, members = tensors(place)
    experts = {task: Weights.of(state, task) for task, state in tuned.items()}
    return Problem(Weights.of(base, "pre-trained"), experts, statistics, members, probe)


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


def near(found, expected, option=""):
    tolerance = TOLERANCE.get(option.partition("-")[0], NEAR) if CARD else NEAR
    for name in FLOATS:
        assert_close(found[name].cpu(), expected[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def lie(state):
    return {tensor.device for tensor in state.values()}


@pytest.mark.parametrize("name", rows("merge"))
def test_models_on_a_device_are_merged_there(name, device):
    state = METHODS[name](posed(device, device)).state()
    assert lie(state) == {device}
    near(state, merged_here(name), name)


@pytest.mark.parametrize(
    "name", [name for name, method in METHODS.items() if method.needs.inputs or method.needs.statistics]
)
def test_an_encoder_on_a_device_serves_models_on_the_cpu(name, device):
    state = METHODS[name](posed(CPU, device)).state()
    assert lie(state) == {CPU}
    near(state, merged_here(name), name)


@pytest.mark.skipif(not CARD, reason="only a card can compute twice in another order")
def test_a_card_gives_the_same_bits_twice(device):
    for name, method in METHODS.items():
        once, twice = (method(posed(device, device)).state() for _ in range(2))
        assert all(bits(once[each].cpu()) == bits(twice[each].cpu()) for each in FLOATS), name


@pytest.mark.parametrize("name", rows("byom"))
def test_models_on_a_device_are_served_there(name, device, tmp_path):
    found = served(VARIANTS[name], posed(device, device))
    assert all(lie(parts) == {CPU} for delta in found.deltas.values() for parts in delta.parts.values())
    every = states(found)
    assert all(lie(state) == {device} for state in every.values())
    opened = Bundle.open(Bundle(found.reference, found.deltas, found.base).save(tmp_path / "bundle"))
    for task, state in every.items():
        near(state, served_here(name)[task], name)
        assert all(bits(opened.weights(task)[each]) == bits(state[each].cpu()) for each in FLOATS)


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.needs.inputs])
def test_an_encoder_on_a_device_serves_variants_on_the_cpu(name, device):
    found = served(VARIANTS[name], posed(CPU, device))
    for task, state in states(found).items():
        assert lie(state) == {CPU}
        near(state, served_here(name)[task], name)


# where merging computes


@pytest.mark.parametrize("name", rows("merge"))
def test_models_on_the_cpu_are_merged_on_a_device_and_come_back(name, device):
    merged = METHODS[name](posed(CPU, device).on(device))
    assert set(merged) == set(merged_here(name)) and merged.ties == TIED
    state = merged.state()
    assert lie(state) == {CPU} and {merged.place(each) for each in merged} == {CPU}
    near(state, merged_here(name), name)


@pytest.mark.parametrize("name", rows("byom"))
def test_models_on_the_cpu_are_packed_on_a_device_and_come_back(name, device):
    found = served(VARIANTS[name], posed(CPU, device).on(device))
    for task, state in states(found).items():
        assert lie(state) == {CPU}
        near(state, served_here(name)[task], name)


def test_where_the_models_lie_nothing_is_moved(device):
    given, there = posed(CPU, CPU), posed(device, CPU)
    assert given.on("cpu") is given and there.on(device) is there


def test_merging_elsewhere_computes_there(device):
    @dataclass(frozen=True)
    class Asks(TensorwiseMethod):
        title, elementwise = "Asks", False

        def merge(self, group):
            assert {tensor.device for tensor in (group.pretrained, *group.experts)} == {device}
            assert all(rows.device == device for rows in group.statistics.values())
            assert group.statistics or group.name == "one"
            return group.finetuned.mean(0)

    near(Asks()(posed(CPU, CPU).on(device)).state(), merged_here("average"))


def test_a_tensor_that_does_not_fit_is_merged_where_it_lies(device, monkeypatch):
    size = 11 * 4 * 35  # that of `embed` in all models, twice, with differences
    monkeypatch.setattr(merging, "room", lambda place: size - 1)
    whole = posed(CPU, CPU)
    whole = Problem(whole.pretrained, whole.finetuned, whole.statistics)
    with pytest.warns(UserWarning, match=r"1 of 6 tensors do not fit on .* merged on the CPU: embed"):
        given = whole.on(device)
    assert {name: given.pretrained.place(name) for name in FLOATS} == {
        name: CPU if name == "embed" else device for name in FLOATS
    }
    for name in ("ties", "average", "fisher"):
        near(METHODS[name](given).state(), merged_here(name), name)
    monkeypatch.setattr(merging, "room", lambda place: size)
    assert whole.on(device).pretrained.place("embed") == device


@pytest.mark.parametrize("planned", [False, True])
def test_memory_that_ends_in_merging_is_said(planned, device, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried much\nand more")

    monkeypatch.setattr(Ties, "plan" if planned else "merge", full)
    monkeypatch.setattr(TopMagnitude, "plan", full)
    given = posed(CPU, CPU).on(device)
    what = "merging by Ties" if planned else "merging 'embed'"
    with pytest.raises(OptionError, match=rf"{what} takes more memory .*\(CUDA out of memory. Tried much\); use merge"):
        METHODS["ties"](given)["embed"]
    with pytest.raises(OptionError, match="packing 'task1' takes more memory than the GPU has left"):
        served(VARIANTS["fft"], given)


def test_the_next_tensor_is_read_while_one_is_merged(device):
    weights, reads = counted(Weights.of(models()[0]))
    there = placed(weights, device)
    first, second, third, *_ = weights.mergeable()
    assert there[first].device == device and reads == [first]
    there[second]
    there[third]
    assert reads[:3] == [first, second, third] and reads.count(third) == 1
    reads.clear()
    merged = placed(METHODS["average"](Problem(weights, {"task": weights})), device)
    read = [merged[name].device for name in (first, second)]
    assert read == [device, device] and third not in reads, "what is computed is not computed ahead"


# adapters


def adapted(base, place):
    """Return two experts as low-rank differences to theta_0, whose factors are on a device."""
    draw = torch.Generator().manual_seed(3)
    shapes = {"embed": (7, 5), "layer.weight": (6, 4)}
    pairs = [
        {n: [torch.randn(m, 2, generator=draw), torch.randn(2, k, generator=draw)] for n, (m, k) in shapes.items()}
    ]
    pairs += [{"embed": [torch.randn(7, 2, generator=draw), torch.randn(2, 5, generator=draw)]}]
    own = {"layer.bias": torch.randn(6, generator=draw)}
    return {
        f"task{t}": Adapted(
            base,
            {name: [Piece(0, *(factor.to(place) for factor in pair))] for name, pair in factors.items()},
            {name: value.to(place) for name, value in own.items()},
            f"task{t}",
        )
        for t, factors in enumerate(pairs, 1)
    }


@pytest.mark.parametrize("name", ["knots", "knots-concat=input", "core_space", "task_arithmetic", "ties"])
def test_adapters_are_merged_on_a_device(name, device):
    base = Weights.of(models()[0], "pre-trained")
    expected = METHODS[name](Problem(base, adapted(base, CPU))).state()
    there = moved(base, device)
    for factors in (CPU, device):
        state = METHODS[name](Problem(there, adapted(there, factors))).state()
        assert lie(state) == {device}
        near(state, expected, name)
    state = METHODS[name](Problem(base, adapted(base, CPU)).on(device)).state()
    assert lie(state) == {CPU}
    near(state, expected, name)


@pytest.mark.parametrize("name", ["lora", "single_task", "tsv_compress"])
def test_adapters_are_packed_on_a_device(name, device):
    base = Weights.of(models()[0], "pre-trained")
    expected = states(served(VARIANTS[name], Problem(base, adapted(base, CPU))))
    there = moved(base, device)
    for factors in (CPU, device):
        found = served(VARIANTS[name], Problem(there, adapted(there, factors)))
        assert all(lie(parts) == {CPU} for delta in found.deltas.values() for parts in delta.parts.values())
        for task, state in states(found).items():
            assert lie(state) == {device}
            near(state, expected[task], name)
    for task, state in states(served(VARIANTS[name], Problem(base, adapted(base, CPU)).on(device))).items():
        assert lie(state) == {CPU}
        near(state, expected[task], name)


# refusals


@pytest.mark.parametrize("where", ["pre-trained", "task2"])
def test_a_mix_is_refused_by_name(where, device):
    base, tuned = models()
    held = {"pre-trained": Weights.of(base, "pre-trained")} | {t: Weights.of(s, t) for t, s in tuned.items()}
    held[where] = moved(held[where], device)
    with pytest.raises(WeightsMismatch, match=r"'embed' lies on .* in pre-trained and on .* in task[12]; .*placed\("):
        Problem(held["pre-trained"], {task: held[task] for task in tuned})
    with pytest.raises(WeightsMismatch, match="'embed' lies on"):
        held["pre-trained"] + held["task2"]
    with pytest.raises(WeightsMismatch, match="'embed' lies on"):
        Bundle.pack(VARIANTS["fft"], {"task2": held["task2"]}, held["pre-trained"])
    one = placed(held[where], "cpu")
    assert lie((one - held["task1" if where == "task2" else "task2"]).state()) == {CPU}


@pytest.mark.parametrize("name", ["fft", "tall_mask", "emr"])
def test_a_reference_elsewhere_is_refused_by_name(name, device):
    given = posed(device, CPU)
    with pytest.raises(WeightsMismatch, match=r"'embed' lies on .* in pre-trained and on cpu in .*placed\("):
        VARIANTS[name].serve(given, posed(CPU, CPU).pretrained)


def test_what_is_packed_as_it_is_saved_is_packed_on_the_device(device, tmp_path):
    given = posed(device, CPU)
    reference = TaskArithmetic(0.5)(given)
    for name in ("fft", "tall_mask"):
        lazy = VARIANTS[name].streamed(given, reference)
        Bundle(lazy.reference, lazy.deltas, lazy.base).save(tmp_path / name)
        opened = Bundle.open(tmp_path / name)
        for task in given.tasks:
            near(opened.weights(task).state(), served_here(name)[task], name)


def test_a_mix_that_only_reading_shows_is_refused_by_name(device):
    base, tuned = models(1)
    there, _ = counted(moved(Weights.of(tuned["task1"], "task1"), device))
    with pytest.raises(WeightsMismatch, match="'one' lies on cpu in pre-trained and on .* in task1"):
        METHODS["average"](Problem(Weights.of(base, "pre-trained"), {"task1": there}))["one"]


# selection


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_selection_on_a_device_is_that_of_the_cpu(dtype, device):
    draw = torch.Generator().manual_seed(0)
    rough = [torch.randn(n, generator=draw).mul(8).round().div(4) for n in (7, 1, 0, 400, 33)]
    fine = [torch.randn(n, generator=draw, dtype=torch.float64) for n in (7, 1, 0, 400, 33)]
    streams = [[each.to(dtype) for each in every] for every in (rough, fine, [torch.zeros_like(r) for r in rough])]
    counts = [0, 1, 2, 40, 41, 200, 439, 440, 441]
    here = locate_each([[Part.of(each) for each in every] for every in streams], counts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(histogram, "CHUNK", 64)
        there = locate_each([[Part.of(each.to(device)) for each in every] for every in streams], counts)
    assert there == here
    for every in streams[:2]:
        assert top_mask(every[3].to(device), 0.3).tolist() == top_mask(every[3], 0.3).tolist()


def test_selection_on_a_device_refuses_what_the_cpu_refuses(device):
    for bad in (float("nan"), float("-inf")):
        values = torch.ones(9)
        values[4] = bad
        with pytest.raises(CheckpointError, match="1 of 9 values are NaN or infinite, the first at flat position 4"):
            locate([Part.of(values.to(device))], [3])
        with pytest.raises(CheckpointError, match="1 of 9 values"):
            locate([Part.of(values.to(device))], [])
    with pytest.raises(OptionError, match=r"count=10 is not in \[0, 9\]"):
        locate([Part.of(torch.ones(9, device=device))], [10])

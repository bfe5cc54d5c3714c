"""BYOM-Budget: exact ends, bytes kept to, damage that falls with bytes, levels that are what they claim, inputs."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from byom.checkpoint.bundle import Bundle
from byom.errors import CheckpointError, OptionError
from byom.functional.hull import lower_hull, slope
from byom.merge.base import Problem
from byom.merge.task_arithmetic import TaskArithmetic
from byom.variants.base import Shared, code, joined, written
from byom.variants.base.damage import FromInputs, FromTask
from byom.variants.base.delta import Delta
from byom.variants.base.levels import Difference
from byom.variants.budget import ByomBudget
from byom.variants.fft import ByomFft
from byom.weights import Weights
from tests.problems import bits, counted, models, problem, random, same, slow

MATRIX = (48, 36)
SIZES = [0.1 * 1.3**k for k in range(20)]  # kB: from little more than names to all values in fp32


def drawn(*shape, rank=0, seed=0, noise=0.1):
    """Return a difference in fp32 with some large singular values, or noise alone."""
    noise = noise * random(*shape, seed=seed)
    if rank:
        noise = noise + random(shape[0], rank, seed=seed + 1) @ random(rank, shape[1], seed=seed + 2)
    return noise.float()


def differences():
    return {
        "attention.weight": drawn(*MATRIX, rank=3) * 0.02,
        "bias": drawn(64) * 0.05,
        "conv.weight": drawn(12, 6, 3, 3, seed=3) * 0.1,
        "norm.weight": drawn(48, seed=4) * 0.02,
        "tail": drawn(1, 1),
    }


def pair(deltas=None, factor=1.0):
    """Return theta_t and a reference of zeros: the answer is the difference itself."""
    deltas = differences() if deltas is None else deltas
    return Weights.of({n: factor * d for n, d in deltas.items()}), Weights.of({n: 0 * d for n, d in deltas.items()})


def packed(kilobytes, target, reference):
    return ByomBudget(kilobytes).delta(target, reference)


def error(delta, target, reference):
    put_back = delta.apply(reference)
    return sum(float((put_back[n].double() - target[n].double()).square().sum()) for n in target.mergeable())


def weighed(deltas, gram, fisher=None):
    """Return a problem of one task with statistics, on a reference of zeros."""
    target, reference = pair(deltas)
    fisher = {n: torch.full_like(d, 0.3) for n, d in deltas.items()} if fisher is None else fisher
    return Problem(reference, {"t": target}, {"fisher": {"t": Weights.of(fisher)}, "gram": {"t": Weights.of(gram)}})


# both ends


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_enough_bytes_are_the_target_and_next_to_none_the_reference(dtype):
    base, tuned = models(1, dtype)
    target, reference = Weights.of(tuned["task1"]), Weights.of(base)
    assert same(packed(100, target, reference).apply(reference).state(), base | _learned(tuned["task1"]))
    nothing = packed(0.05, target, reference)
    assert same(nothing.apply(reference), reference) and not nothing.parts and nothing.nbytes <= 50


def _learned(state):
    return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}


@pytest.mark.parametrize(
    ("target", "reference", "dtype"),
    [
        ([1e-9], [0.5], torch.float32),  # the difference rounds to -0.5, a multiple of a step
        ([1e-25, -3e-25], [0.0, 0.0], torch.float32),  # squares are 0 in fp32
        ([0.5 + 1e-12], [0.0], torch.float64),  # differences are formed in fp32
        ([1.0, 1e-7], [0.5, 0.5], torch.bfloat16),
    ],
)
def test_what_rounding_hides_is_put_back_too(target, reference, dtype):
    one, other = (Weights.of({"w": torch.tensor(values, dtype=dtype)}) for values in (target, reference))
    assert bits(packed(1, one, other).apply(other)["w"]) == bits(one["w"])


def test_factors_whose_scale_rounds_are_not_taken_for_the_target():
    signs = (torch.arange(40) % 3 - 1.0)[:, None] * (torch.arange(30) % 2 * 2 - 1.0)
    target, reference = pair({"w": 0.3 * signs})
    assert bits(packed(10, target, reference).apply(reference)["w"]) == bits(target["w"])


# bytes


def test_bytes_are_kept_to_and_damage_falls():
    target, reference = pair()
    served = [packed(size, target, reference) for size in SIZES]
    assert all(delta.nbytes <= 1000 * size for size, delta in zip(SIZES, served, strict=True))
    errors = [error(delta, target, reference) for delta in served]
    assert all(fewer >= more for fewer, more in pairwise(errors)) and len(set(errors)) > 12 and errors[-1] == 0
    used = [delta.nbytes / (1000 * size) for size, delta in zip(SIZES, served, strict=True) if 0.2 < size < 1]
    assert len(used) > 5 and min(used) > 0.9


@pytest.mark.parametrize("size", [0.1, 1.0, 100.0])
def test_the_file_is_little_longer_and_comes_back(size, tmp_path):
    target, reference = pair()
    delta = packed(size, target, reference)
    file = delta.save(tmp_path / "delta.safetensors")
    assert delta.nbytes <= file.stat().st_size <= delta.nbytes + 600
    opened = Delta.open(file)
    assert opened.variant == delta.variant and opened.nbytes == delta.nbytes and opened.shapes == delta.shapes
    assert same(opened.apply(reference), delta.apply(reference))
    saved = Bundle.open(Bundle(reference, {"t": delta}).save(tmp_path / "bundle"))
    assert same(saved.weights("t"), delta.apply(reference)) and saved.deltas["t"].nbytes == delta.nbytes


def test_running_statistics_and_their_names_count():
    deltas = {f"layer{k}.running_mean": drawn(3, seed=k) for k in range(30)} | {"weight": drawn(*MATRIX)}
    target, reference = pair(deltas)
    for size in (0.8, 1.0, 1.5, 2.0):
        delta = packed(size, target, reference)
        assert delta.nbytes <= 1000 * size and "weight" in delta.parts
        put_back = delta.apply(reference)
        assert all(torch.equal(put_back[name], target[name]) for name in deltas if name != "weight")
    with pytest.raises(OptionError, match=r"byom\.kilobytes=0\.35 is less than running statistics.*give more"):
        packed(0.35, target, reference)


def test_a_low_rank_difference_costs_no_more_than_its_factors():
    target, reference = pair({"w": drawn(64, 60, rank=2, noise=0)})
    delta = packed(0.45, target, reference)  # less than a byte for each of 2 x 124 entries, and names
    code_ = code.from_bytes(delta.parts["w"]["code"], (64, 60))
    assert code_.left.shape == (64, 2) and code_.right.shape == (2, 60) and code_.entries is None
    assert error(delta, target, reference) < 1e-3 * error(packed(0.05, target, reference), target, reference)


@pytest.mark.parametrize("power", [-20, -10, 5])
def test_longer_differences_are_served_as_much_farther(power):
    one, other = (packed(1.5, *pair(factor=factor)) for factor in (1.0, 2.0**power))
    assert one.parts.keys() == other.parts.keys()
    reference = pair()[1]
    first, second = one.apply(reference), other.apply(reference)
    assert all(torch.equal(first[name] * 2.0**power, second[name]) for name in reference)
    for name, parts in one.parts.items():
        assert torch.equal(parts["code"][7:], other.parts[name]["code"][7:])  # all but the step in the head


# levels


@pytest.mark.parametrize("shape", [MATRIX, (1, 200), (36, 48)])
@pytest.mark.parametrize("inputs", [False, True])
def test_levels_are_what_they_claim(shape, inputs):
    values, gram = drawn(*shape, rank=3), random(2 * shape[1], shape[1], seed=9)
    root = torch.linalg.cholesky(gram.T @ gram / len(gram)).float() if inputs else None
    difference = Difference(values, root, 0.7)
    levels = list(difference.levels())
    assert (levels[0].level.cost, levels[0].level.damage) == (0, difference.damage(values))
    for level, way, _ in levels[1:]:
        data = code.to_bytes(difference.write(way))
        left = values - code.from_bytes(data, shape).difference()
        expected = 0.7 * float((left if root is None else left @ root).double().square().sum())
        assert level.damage == pytest.approx(expected, rel=1e-3)
        assert 8 * len(data) <= level.cost <= 1.02 * 8 * len(data) + 100
    assert {(way.factors, way.entries) for _, way, _ in levels[1:]} >= ({(0, 1)} if shape[0] == 1 else {(0, 1), (1, 0)})


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_factors_come_near_the_best_of_their_rank_in_the_metric(spread):
    inputs = random(72, MATRIX[1], seed=9) * torch.logspace(-spread, spread, MATRIX[1]).double()
    difference = Difference(drawn(*MATRIX, rank=3), torch.linalg.cholesky(inputs.T @ inputs / 72).float())
    beyond = torch.linalg.svdvals(difference.metric.double())[3:].square().sum()
    factors = [
        (level, difference.write(way)) for level, way, _ in difference.levels() if way.factors and not way.entries
    ]
    left = [level.damage / float(beyond) for level, written in factors if len(written.scales) == 3]
    assert left[0] > 5 * left[-1] and 1 <= left[-1] < 3


def test_finer_steps_leave_less_and_mixtures_pay():
    difference = Difference(drawn(*MATRIX, rank=3))
    levels = list(difference.levels())
    entries = [level for level, way, _ in levels if way.entries and not way.factors]
    assert len(entries) > 10 and all(a.damage > b.damage for a, b in pairwise(entries[3:]))
    assert entries[-1].damage < 3e-4 * levels[0].level.damage
    ways = [levels[number][1] for number in lower_hull([level for level, *_ in levels])]
    assert {(way.factors, way.entries) for way in ways[1:]} >= {(True, False), (True, True)}


UNLIKE = {
    "low rank": drawn(*MATRIX, rank=3),
    "noise": drawn(*MATRIX),
    "heavy tails": drawn(*MATRIX) ** 5,
    "few entries": drawn(*MATRIX) * (random(*MATRIX, seed=5) > 2).float(),
    "a lattice": drawn(*MATRIX, noise=2).round() * 0.25,
    "a vector": drawn(1, 300),
}


def corners(levels, price):
    """Return the hull's levels that are reached by steps worth more than a price."""
    hull = lower_hull(levels)
    steep = [high for low, high in pairwise(hull) if slope(levels, low, high) > price]
    return [levels[number] for number in [hull[0], *steep]]


@pytest.mark.parametrize("kind", UNLIKE)
def test_down_to_a_price_the_hull_is_that_of_all_levels(kind):
    difference = Difference(UNLIKE[kind])
    every = [level for level, *_ in difference.levels()]
    hull = lower_hull(every)
    counts = []
    for price in [slope(every, low, high) * 1.01 for low, high in pairwise(hull)]:
        some = [level for level, *_ in difference.levels(price)]
        assert corners(some, price) == corners(every, price)
        counts.append(len(some))
    assert counts == sorted(counts) and counts[0] < len(every) / 2 and len(counts) > 4


@pytest.mark.parametrize("inputs", ["train", *slow("none")])
def test_every_order_of_a_sweep_packs_the_same(inputs):
    given = weighed(differences(), {"attention.weight": torch.eye(MATRIX[1]) + 0.5})

    def delta(size):
        return ByomBudget(size, inputs=inputs).streamed(given, given.pretrained).deltas["t"]

    def alone(size):
        written._known.cache_clear()
        return delta(size)

    expected = [alone(size) for size in SIZES]
    for order in (1, -1):
        written._known.cache_clear()
        again = [delta(size) for size in SIZES[::order]][::order]
        for one, other in zip(expected, again, strict=True):
            assert one.parts.keys() == other.parts.keys()
            for name, parts in one.parts.items():
                assert {key: bits(part) for key, part in parts.items()} == {
                    key: bits(part) for key, part in other.parts[name].items()
                }


def test_what_costs_too_much_is_not_priced_and_factors_are_found_once(monkeypatch):
    priced, found = [], []
    for seen, name in ((priced, "damage"), (found, "product")):
        real = getattr(Difference, name)
        monkeypatch.setattr(Difference, name, lambda *args, seen=seen, real=real: seen.append(1) or real(*args))
    target, reference = pair({f"w{k}": drawn(*MATRIX, rank=3, seed=k) for k in range(8)})
    counts = []
    for size in (100, 0.5):
        written._known.cache_clear()
        packed(size, target, reference)
        counts.append((len(priced), len(found)))
    assert counts[1][0] - counts[0][0] < counts[0][0] / 2
    packed(0.3, target, reference)  # less than before: all is known
    assert (len(priced), len(found)) == counts[1]


def test_one_axis_longer_than_one_makes_rows():
    deltas = {"a": drawn(1, 1, 40), "b": drawn(40, 1), "c": drawn(6, 5, 2, 2), "d": drawn(1)[0], "e": drawn(0, 4)}
    target, reference = pair(deltas)
    put_back = packed(0.5, target, reference).apply(reference)
    assert all(put_back[name].shape == tensor.shape for name, tensor in deltas.items())
    assert error(packed(0.5, target, reference), target, reference) < 0.1 * error(
        packed(0.05, target, reference), target, reference
    )


# inputs


def test_identity_moments_and_constant_information_are_none():
    deltas = {"attention.weight": drawn(*MATRIX, rank=3), "bias": drawn(64)}
    given = weighed(deltas, {"attention.weight": 4 * torch.eye(MATRIX[1])})
    for size in (0.4, 1.0, 2.0):
        plain, informed = (
            ByomBudget(size, reference="pretrained", inputs=inputs).serve(given, given.pretrained).weights("t")
            for inputs in ("none", "train")
        )
        assert_close(informed.state(), plain.state(), rtol=1e-4, atol=1e-5)


def test_a_direction_that_no_input_has_is_left_out_first():
    turn = torch.linalg.qr(random(36, 36, seed=7))[0]
    dead, live = turn[:, :1], turn[:, 1:2]
    left = torch.linalg.qr(random(48, 2, seed=8))[0]
    delta = (3 * left[:, :1] @ dead.T + left[:, 1:] @ live.T).float()
    seen = torch.ones(36).double()
    seen[0] = 1e-9
    given = weighed({"w": delta}, {"w": (turn * seen @ turn.T).float()})
    found = {
        inputs: ByomBudget(0.12, reference="pretrained", inputs=inputs).serve(given, given.pretrained).weights("t")["w"]
        for inputs in ("none", "train")
    }
    kept = {i: [float((w.double() @ axis).norm()) for axis in (dead, live)] for i, w in found.items()}
    assert kept["none"][0] > 2.5 and kept["none"][1] < 0.3
    assert kept["train"][0] < 0.5 and kept["train"][1] > 0.9


def test_on_a_merged_model_directions_that_the_task_did_not_learn_are_left_out_first():
    base, left = (
        torch.randn(48, 36, generator=torch.Generator().manual_seed(0)),
        torch.linalg.qr(random(48, 2, seed=8))[0],
    )
    own, others = torch.linalg.qr(random(36, 36, seed=7))[0][:, :2].T.split(1)
    target = base + (left[:, :1] @ own).float()
    merged = target + 3 * (left[:, 1:] @ others).float()  # what other tasks put there, along inputs that this one lacks
    given = Problem(Weights.of({"w": base}), {"t": Weights.of({"w": target})}, {}, {})
    moved = merged - (left[:, :1] @ own).float()  # and half of its own change is lost
    errors = {}
    for metric in ("moments", "identity"):
        served = ByomBudget(0.12, metric=metric).serve(given, Weights.of({"w": moved})).weights("t")["w"]
        errors[metric] = [float(((served - target).double() @ axis.T).norm()) for axis in (own, others)]
    assert errors["moments"][0] < 0.2 and errors["moments"][1] > 2.5
    assert errors["identity"][0] > 0.7 and errors["identity"][1] < 0.7


def test_plain_squared_errors_are_those_of_the_pretrained_reference_and_take_no_inputs():
    given = weighed({"a": drawn(*MATRIX), "b": drawn(*MATRIX, seed=1)}, {})
    one, other = (
        ByomBudget(0.6, reference="pretrained", metric=metric).serve(given, given.pretrained).deltas["t"].parts
        for metric in ("moments", "identity")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name][key], other[name][key]) for name in one for key in one[name])
    with pytest.raises(OptionError, match="byom.inputs=train would be ignored; use byom.inputs=none"):
        ByomBudget(inputs="train", metric="identity")
    with pytest.raises(OptionError, match="byom.metric"):
        ByomBudget(metric="gram")


def test_damage_from_a_task_golden():
    base = Weights.of({"w": torch.zeros(1, 2, 2), "b": torch.zeros(2), "u": torch.zeros(2, 2)})
    damage = FromTask(
        Weights.of({"w": torch.tensor([[[1.0, 0], [1, 2]]]), "b": torch.ones(2), "u": torch.zeros(2, 2)}), base
    )
    root = damage.root("w", 2)  # the moment is [[2, 2], [2, 4]], with a mean diagonal of 3
    assert_close(root @ root.T, torch.tensor([[2 / 3 + 0.03, 2 / 3], [2 / 3, 4 / 3 + 0.03]]) / 1.03)
    assert damage.root("b", 2) is None and damage.root("u", 2) is None and damage.root("other", 2) is None
    assert damage.weight("w", torch.ones(2, 2)) == 1


def test_bytes_go_where_the_information_is():
    deltas = {"a": drawn(*MATRIX), "b": drawn(*MATRIX, seed=1)}
    fisher = {"a": torch.full(MATRIX, 1e-4), "b": torch.ones(MATRIX)}
    given = weighed(deltas, {}, fisher)
    served = ByomBudget(0.6, reference="pretrained", inputs="train").serve(given, given.pretrained)
    assert list(served.deltas["t"].parts) == ["b"]
    assert set(packed(0.6, *pair(deltas)).parts) == {"a", "b"}


def test_damage_golden():
    fisher = Weights.of({"w": torch.tensor([[1.0, 3], [0, 0]]), "b": torch.tensor([4.0, 4])})  # the mean is 2
    damage = FromInputs(fisher, Weights.of({"w": torch.tensor([[4.0, 0], [0, 12]])}))
    assert damage.weight("w", torch.tensor([[1.0, 1], [0, 0]])) == 1  # (1 + 3) / 2 / 2
    assert damage.weight("w", torch.tensor([[0.0, 2], [0, 0]])) == 1.5
    assert damage.weight("w", torch.tensor([[0.0, 0], [1, 0]])) == 1e-6
    assert damage.weight("other", torch.ones(2)) == 1
    root = damage.root("w", 2)
    assert_close(root @ root.T, torch.diag(torch.tensor([0.53, 1.53]) / 1.03))  # ridge 0.03, a mean diagonal of 1
    assert damage.root("w", 4) is None and damage.root("b", 2) is None
    assert FromInputs(fisher, Weights.of({"w": torch.zeros(2, 2)})).root("w", 2) is None
    assert FromInputs(Weights.of({"w": torch.zeros(2)}), fisher).weight("w", torch.ones(2)) == 1


def test_streamed_and_served_are_the_same_and_keep_no_inputs():
    given = problem(*models(2))
    variant = ByomBudget(0.3, inputs="train")
    once, lazily = (getattr(variant, how)(given, given.pretrained) for how in ("serve", "streamed"))
    assert list(lazily.deltas) == given.tasks and "task1" in lazily.deltas and len(lazily.deltas) == 2
    for task in given.tasks:
        assert lazily.deltas[task].variant == once.deltas[task].variant == variant
        assert type(lazily.deltas[task].variant) is ByomBudget
        assert same(once.weights(task), lazily.weights(task))


def test_a_merged_model_is_read_as_often_as_by_byom_fft_and_then_from_its_file(tmp_path):
    given = problem(*models(3))
    merged = TaskArithmetic(0.5)(given)
    reads = []
    for at, variant in enumerate([ByomFft(), ByomBudget(0.6), ByomBudget(0.6, inputs="train")]):
        watched, read = counted(merged)
        served = variant.streamed(given, watched)
        Bundle(served.reference, served.deltas, served.base).save(tmp_path / str(at))
        reads.append(sorted(read))
    assert reads[0] == reads[1] == reads[2]


def test_levels_are_found_anew_for_other_inputs():
    deltas, moment = {"w": drawn(*MATRIX, rank=3)}, random(36, 36).float()
    served = [
        ByomBudget(0.6, reference="pretrained", inputs="train").serve(given, given.pretrained).weights("t")["w"]
        for given in (weighed(deltas, {"w": gram}) for gram in (torch.eye(36), moment.T @ moment))
    ]
    plain = packed(0.6, *pair(deltas)).apply(pair(deltas)[1])["w"]
    assert not torch.equal(served[0], served[1]) and not torch.equal(plain, served[1])


# refusals


@pytest.mark.parametrize("missing", ["fisher", "gram"])
def test_missing_statistics_are_refused(missing):
    given = problem(*models(1))
    without = replace(given, statistics={k: v for k, v in given.statistics.items() if k != missing})
    with pytest.raises(OptionError, match=rf"byom\.inputs=train needs the statistics \['{missing}'\].*byom statistics"):
        ByomBudget(inputs="train").serve(without, given.pretrained)


def test_a_difference_without_a_problem_has_no_inputs():
    with pytest.raises(OptionError, match=r"byom\.inputs=train needs the statistics \['fisher', 'gram'\]"):
        ByomBudget(inputs="train").delta(*pair())


@pytest.mark.parametrize("size", [0, -1.0, float("nan"), float("inf")])
def test_sizes_that_are_none_are_refused(size):
    with pytest.raises(OptionError, match=r"byom\.kilobytes="):
        ByomBudget(size)


def test_unknown_choices_are_refused():
    with pytest.raises(OptionError, match=r"byom\.reference=base.*merged"):
        ByomBudget(reference="base")
    with pytest.raises(OptionError, match=r"byom\.inputs=test.*train"):
        ByomBudget(inputs="test")
    assert ByomBudget().on == "merged" and ByomBudget(reference="pretrained").on == "pretrained"
    assert not ByomBudget().needs.statistics and ByomBudget(inputs="train").needs.statistics == {"fisher", "gram"}


def test_what_names_alone_would_exceed_is_the_reference():
    target, reference = pair({f"layer{k}.bias": drawn(40, seed=k) for k in range(4)})
    for size in (0.05, 0.06, 0.07):  # enough for a tensor or more, were it not for their names
        delta = packed(size, target, reference)
        assert delta.nbytes <= 1000 * size and not delta.parts


def test_less_than_an_empty_list_takes_is_refused():
    with pytest.raises(OptionError, match=r"byom\.kilobytes=0\.01 is less than"):
        packed(0.01, *pair())


def coded():
    difference = Difference(drawn(*MATRIX, rank=3))
    way = next(way for _, way, _ in reversed(list(difference.levels())) if way.factors and way.entries)
    return code.to_bytes(difference.write(way))


def test_corrupt_codes_are_refused_or_have_the_right_shape():
    whole, generator = coded(), torch.Generator().manual_seed(0)
    shared, refused = Shared(torch.zeros(MATRIX)), 0
    for _ in range(150):
        changed = whole.clone()
        at = int(torch.randint(120, (), generator=generator))  # head, scales, tables and the stream's beginning
        changed[at] = torch.randint(256, (), generator=generator)
        try:
            found = ByomBudget().unpack({"code": changed}, shared)
        except CheckpointError as error_:
            refused += "48 x 36" in str(error_)
        else:
            assert found.shape == MATRIX and torch.isfinite(found).all()
    assert refused > 75


@pytest.mark.parametrize("size", [0, 3, 7, 12, 40, -4, -100])
def test_codes_that_are_cut_short_are_refused(size):
    with pytest.raises(CheckpointError, match="not those of a tensor of 48 x 36; pack or fetch it again"):
        code.from_bytes(coded()[:size], MATRIX)


def test_codes_of_another_tensor_are_refused():
    for sides in ((36, 48), (48, 37), (1, 48 * 36), (0, 3)):
        with pytest.raises(CheckpointError, match=f"{sides[0]} x {sides[1]}"):
            code.from_bytes(coded(), sides)


@pytest.mark.parametrize("head", [(2, 1, 0.1), (255, 1, 0.1), (1, 65535, 0.1), (1, 1, float("nan")), (1, 1, -1.0)])
def test_impossible_heads_are_refused(head):
    data = torch.frombuffer(bytearray(code.HEAD.pack(*head) + bytes(600)), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="pack or fetch it again"):
        code.from_bytes(data, MATRIX)


def test_pieces_laid_end_to_end_come_back_or_are_refused():
    parts = {"a": {"code": torch.arange(9, dtype=torch.uint8)}, "b": {"own": torch.ones(2, 3).half()}, "c": {}}
    shapes = {"a": (3, 3), "b": (2, 3)}
    whole = joined.join(parts, shapes)
    found, sides = joined.split(whole, "file")
    assert sides == shapes and found.keys() == {"a", "b"}
    assert torch.equal(found["a"]["code"], parts["a"]["code"]) and bits(found["b"]["own"]) == bits(parts["b"]["own"])
    for broken in (
        {"index": whole["index"][:-3], "data": whole["data"]},
        {"index": whole["index"], "data": whole["data"][:-1]},
        {"index": whole["index"], "data": whole["data"].repeat(2)},
        {"index": whole["index"]},
        {"index": joined.index({"a": {"code": torch.ones(2)}}, {"a": (2,)}), "data": torch.zeros(7, dtype=torch.uint8)},
    ):
        with pytest.raises(CheckpointError, match="file is not what a packed difference in one piece is"):
            joined.split(broken, "file")

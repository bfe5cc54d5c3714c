"""UltraDelta: golden vectors, what each third drops, kept shares, the mean over draws, equal norms, and bytes."""

from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from byom.errors import CheckpointError, OptionError
from byom.merge.base import Problem
from byom.variants.base import Shared
from byom.variants.ultradelta import UltraDelta, drops, rounded, thinned, trace_norm
from byom.weights import Weights
from tests.problems import counted, models, problem, random, same


def pair(delta):
    target = Weights.of({"w": delta})
    return target, target * 0


def served(delta, **options):
    target, zero = pair(delta)
    packed = UltraDelta(**options).delta(target, zero)
    return packed, packed.apply(zero)["w"]


def spread_over(levels, each):
    """Return a square matrix with so many entries of each level, in some order."""
    flat = torch.tensor(levels, dtype=torch.float64).repeat(each)
    side = round(len(flat) ** 0.5)
    return flat[torch.randperm(len(flat), generator=torch.Generator().manual_seed(0))].reshape(side, side)


def test_rounding_golden():
    change = rounded(torch.tensor([[-1.0, 2.0, 0.4], [0.6, -0.7, 1.4]]), 2)
    assert change.codes.tolist() == [0, 3, 1, 2, 0, 2]
    assert (change.values, change.counts) == ([-1, 0, 1, 2], [2, 1, 2, 1])
    assert change.deviation == pytest.approx(11**0.5 / 3)  # of -1, 2, 0, 1, -1, 1


def test_thirds_golden():
    even = {"large": (3.0, 10), "small": (1.0, 10), "middle": (2.0, 10)}
    assert drops(even, 0.97, 0.01) == pytest.approx({"large": 0.96, "small": 0.98, "middle": 0.97})
    uneven = {"large": (3.0, 40), "b": (1.0, 10), "a": (1.0, 10)}
    assert drops(uneven, 0.97, 0.01) == pytest.approx({"large": 0.965, "a": 0.98, "b": 0.98})


@pytest.mark.parametrize("drop", [0.5, 0.9, 0.97, 0.995])
def test_of_all_entries_the_stated_fraction_is_dropped(drop):
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 1000, (20,), generator=generator).tolist()
    sized = {str(i): (float(random(1, seed=i)), size) for i, size in enumerate(sizes)}
    found = drops(sized, drop, 0.01)
    assert sum(found[name] * size for name, (_, size) in sized.items()) == pytest.approx(drop * sum(sizes))
    order = sorted(sized, key=lambda name: sized[name][0])
    assert all(found[a] >= found[b] for a, b in pairwise(order))


@pytest.mark.parametrize("drop", [0.0, 0.25, 0.5, 0.97, 1.0])
def test_every_value_keeps_its_share(drop):
    change = rounded(random(40, 24), 3)
    positions, codes = thinned(change, drop, seed=0)
    kept = torch.bincount(codes, minlength=8).tolist()
    assert kept == [count - round(count * drop) for count in change.counts]
    assert torch.equal(change.codes[positions], codes) and torch.equal(positions, positions.unique())


def test_entries_that_round_to_0_are_dropped_first():
    change = rounded(spread_over([0.0, 0.0, 1.0, 2.0, 3.0], 5), 2)  # two in five are 0
    assert [len(thinned(change, drop, seed=0)[0]) for drop in (0.0, 0.4, 0.7, 1.0)] == [15, 15, 9, 0]  # of 5, 2 go


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_values_on_the_grid_are_exact_if_all_are_kept(bits):
    levels = [0.25 * (1 + code) for code in range(1 << bits)]
    delta = spread_over(levels, 1 << bits)
    assert torch.equal(served(delta, density=1.0, spread=0.0, bits=bits)[1], delta)
    assert torch.equal(served(torch.full((3, 3), 0.5), density=1.0, spread=0.0, bits=bits)[1], torch.full((3, 3), 0.5))


def test_longer_changes_round_to_as_much_longer_values():
    once, scaled = rounded(random(6, 4), 4), rounded(4 * random(6, 4), 4)
    assert torch.equal(once.codes, scaled.codes) and [4 * value for value in once.values] == scaled.values


def test_draws_average_to_what_is_rounded():
    delta, draws = spread_over([-1.0, 1.0, 3.0, 5.0], 25), 60
    total = sum(served(delta, density=0.2, spread=0.0, bits=2, seed=seed)[1] for seed in range(draws))
    deviation = delta.abs() * (4 / draws) ** 0.5  # of a mean of draws that are 0, or in one of five 5 times the value
    assert torch.all((total / draws - delta).abs() < 5 * deviation)


def test_what_is_kept_is_rescaled():
    delta = spread_over([-1.0, 1.0, 3.0, 5.0], 25)
    put_back = served(delta, density=0.2, spread=0.0, bits=2)[1]
    assert torch.all((put_back == 0) | (put_back == 5 * delta)) and int((put_back != 0).sum()) == 20


def test_the_tasks_are_shortened_to_one_norm():
    zero = {"a": torch.zeros(12, 8, dtype=torch.float64), "b": torch.zeros(5, 9, dtype=torch.float64)}
    tasks = {t: {n: (1 + t) * random(*v.shape, seed=t) for n, v in zero.items()} for t in range(3)}
    experts = {str(t): Weights.of(state) for t, state in tasks.items()}
    given = Problem(Weights.of(zero), experts)
    served = UltraDelta(density=0.5).serve(given, given.pretrained)
    moved = {t: [trace_norm(served.weights(t)[n]) for n in zero] for t in experts}
    assert [sum(norms) for norms in moved.values()] == pytest.approx([sum(moved["0"])] * 3)
    smallest = served.deltas["0"].variant.smallest
    assert sum(moved["0"]) == pytest.approx(2 * smallest)  # 1 / density
    alone = UltraDelta(density=0.5).delta(experts["0"], given.pretrained).apply(given.pretrained)
    assert all(torch.equal(alone[n], served.weights("0")[n]) for n in zero)


def test_trace_norm_is_the_sum_of_the_singular_values():
    for matrix in (random(12, 8), random(3, 9), torch.stack([random(4, 6), random(4, 6, seed=1)])):
        assert trace_norm(matrix) == pytest.approx(float(torch.linalg.svdvals(matrix).sum()))
    assert trace_norm(torch.outer(random(8), random(9))) == pytest.approx(float(random(8).norm() * random(9).norm()))


def test_an_unchanged_task_beside_others_does_not_shorten_them():
    given = problem(*models(2))
    idle = Problem(given.pretrained, {**given.finetuned, "idle": given.pretrained})
    first, second = (UltraDelta(density=0.5).serve(each, each.pretrained) for each in (given, idle))
    assert all(same(first.weights(task), second.weights(task)) for task in given.tasks)


def test_randomness_is_that_of_the_seed_the_expert_and_the_parameter():
    def positions(delta, name="w", **options):
        target = Weights.of({name: delta})
        return UltraDelta(density=0.5, **options).delta(target, target * 0).apply(target * 0)[name] != 0

    once = positions(random(20, 20))
    assert torch.equal(once, positions(random(20, 20)))
    assert not any(
        torch.equal(once, other)
        for other in (
            positions(random(20, 20), seed=1),
            positions(2 * random(20, 20)),
            positions(random(20, 20), name="v"),
        )
    )


@pytest.mark.parametrize(("density", "kind"), [(0.03, "gap8"), (0.3, "bitmap")])
def test_it_takes_b_bits_and_a_position_an_entry(density, kind):
    packed, put_back = served(random(40, 24).float(), density=density)
    count = int((put_back != 0).sum())
    assert count == pytest.approx(density * 40 * 24, abs=16)  # each of 16 values rounds by itself
    gaps = put_back.reshape(-1).nonzero().reshape(-1).diff(prepend=torch.tensor([-1])) - 1
    expected = count + int((gaps // 255).sum()) if kind == "gap8" else 40 * 24 // 8
    assert packed.nbytes == expected + -(-count * 4 // 8) + 8 and kind in packed.parts["w"]
    assert packed.stored_parameters == 2


def test_other_tensors_are_the_reference_or_the_target():
    given = problem(*models(1))
    expert, reference = given.finetuned["task1"], given.pretrained
    for rest, same_as in (("drop", reference), ("whole", expert)):
        put_back = UltraDelta(density=0.5, rest=rest).delta(expert, reference).apply(reference)
        assert all(torch.equal(put_back[n], same_as[n]) for n in ("embed", "layer.bias", "one", "scale"))
    assert UltraDelta().delta(reference, reference).nbytes == 0
    assert UltraDelta(density=0.0).delta(expert, reference).nbytes == 0
    whole = UltraDelta(density=0.5, exclude=[]).delta(expert, reference)
    assert "codes" in whole.parts["embed"]


def test_parts_that_do_not_fit_are_refused():
    packed, _ = served(random(40, 24), density=0.3)
    with pytest.raises(CheckpointError, match="a mask of 975 places is 122 bytes, not 120"):
        packed.variant.unpack(packed.parts["w"], Shared(torch.zeros(39, 25)))
    parts = served(random(40, 24), density=0.03)[0].parts["w"]
    with pytest.raises(CheckpointError, match=r"integers of 4 bits are .* bytes"):
        packed.variant.unpack(parts | {"codes": parts["codes"][1:]}, Shared(torch.zeros(40, 24)))


@pytest.mark.parametrize(
    "options", [{"density": 3}, {"spread": -0.1}, {"bits": 0}, {"smallest": -1.0}, {"rest": "keep"}, {"exclude": "*w"}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(OptionError, match=rf"byom\.{next(iter(options))}="):
        UltraDelta(**options)


def test_a_stated_norm_takes_the_place_of_the_tasks():
    given = problem(*models(2, torch.float64))
    together = UltraDelta(density=0.5).serve(given, given.pretrained)
    known = UltraDelta(density=0.5, smallest=together.deltas["task1"].variant.smallest)
    for task, expert in given.finetuned.items():
        alone = known.delta(expert, given.pretrained).apply(given.pretrained)
        assert_close(alone["layer.weight"], together.weights(task)["layer.weight"], rtol=0, atol=0)


def test_every_expert_is_read_as_often_as_it_says():
    given = problem(*models(2, seed=7))
    (expert, reads), other = counted(given.finetuned["task1"], checksums=True), given.finetuned["task2"]
    UltraDelta(density=0.5).serve(Problem(given.pretrained, {"a": expert, "b": other}), given.pretrained)
    assert reads.count("layer.weight") == UltraDelta().passes

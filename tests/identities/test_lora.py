"""BYOM-LoRA: what the singular values say of error and size, whatever the route; budgets, gauges and references."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from byom.checkpoint.bundle import Bundle
from byom.errors import CheckpointError, OptionError
from byom.functional import linalg
from byom.functional.linalg import product_svd
from byom.merge.average import Average
from byom.merge.base import Problem
from byom.pipeline import measure
from byom.variants import lora
from byom.variants.base import Shared
from byom.variants.base.delta import Delta
from byom.variants.lora import ByomLora, allocate
from byom.weights import Weights
from byom.weights.lowrank import Adapted, Piece
from tests.problems import bits, same

WIDTH, RANK = 24, 6
SHAPES = {"conv": (10, 3, 2, 2), "mlp": (40, WIDTH), "norm": (WIDTH,), "qkv": (3 * WIDTH, WIDTH), "rest": (5, 4)}


@pytest.fixture(autouse=True)
def forget():
    lora._known.cache_clear()


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def model(dtype=torch.float32):
    return Weights.of(
        {name: random(*shape, seed=i).to(dtype) for i, (name, shape) in enumerate(SHAPES.items())}, "base"
    )


def pieces(seed=0, rank=RANK, size=0.1):
    """A low-rank difference of a fused matrix, one part after the other, and of two whole ones."""

    def piece(start, rows, columns, key):
        return Piece(start, size * random(rows, rank, seed=key), random(rank, columns, seed=key + 50))

    fused = [piece(part * WIDTH, WIDTH, WIDTH, 100 * seed + part) for part in range(3)]
    return {
        "qkv": fused,
        "mlp": [piece(0, 40, WIDTH, 100 * seed + 3)],
        "conv": [piece(0, 10, 12, 100 * seed + 4)],
    }


def adapted(base=None, seed=1, **options):
    base = base or model()
    return Adapted(base, pieces(seed, **options), {"norm": base["norm"] + 1}, origin=f"task{seed}")


def dense(expert):
    """The same model without its factors."""
    return Weights.of(expert.state(), expert.origin)


def differences(expert, reference, names=("conv", "mlp", "qkv")):
    return {name: (expert[name].double() - reference[name].double()).flatten(1) for name in names}


def served(variant, expert, reference):
    return variant.delta(expert, reference).apply(reference)


def costs(expert, rank):
    return sum(
        min(rank, *p.left.shape, p.right.shape[1]) * (len(p.left) + p.right.shape[1] + 1)
        for each in expert.factored.values()
        for p in each
    )


# exactness


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("rank", [RANK, 2 * RANK])
def test_all_directions_give_the_expert_up_to_rounding(rank, allocation):
    expert = adapted()
    put_back = served(ByomLora(rank, rank_allocation=allocation), expert, expert.base)
    for name in SHAPES:
        scale = float(expert[name].abs().max())  # a few units of the last place of the largest entry
        assert float((put_back[name] - expert[name]).abs().max()) <= 8 * torch.finfo(torch.float32).eps * scale
    assert bits(put_back["norm"]) == bits(expert["norm"]) and bits(put_back["rest"]) == bits(expert["rest"])


@pytest.mark.parametrize("solver", ["exact", "randomised"])
@pytest.mark.parametrize("reference", ["pretrained", "merged"])
def test_all_directions_of_a_dense_difference_give_the_expert_up_to_rounding(solver, reference):
    base = model()
    experts = {str(seed): adapted(base, seed) for seed in (1, 2)}
    shared = base if reference == "pretrained" else Average()(Problem(base, experts)).materialise()
    for expert in experts.values():
        put_back = served(ByomLora(WIDTH, solver=solver, reference=reference), dense(expert), shared)
        for name in SHAPES:
            assert_close(put_back[name], expert[name], rtol=1e-6, atol=4e-6)


@pytest.mark.parametrize("solver", ["exact", "randomised"])
def test_ranks_above_those_of_a_sweep_are_not_cut_to_them(solver):
    base, rank = Weights.of({"w": torch.zeros(40, 40)}), lora.KEPT + 4
    delta = ByomLora(rank, solver=solver).delta(Weights.of({"w": random(40, 40)}), base)
    assert len(delta.parts["w"]["singular@0"]) == rank


def test_an_adapter_on_a_merged_reference_is_cut_as_its_dense_difference():
    base = model()
    experts = {str(seed): adapted(base, seed) for seed in (1, 2)}
    merged = Average()(Problem(base, experts)).materialise()
    variant = ByomLora(2, reference="merged")
    assert same(served(variant, experts["1"], merged), served(variant, dense(experts["1"]), merged))


def test_a_difference_of_rank_one_is_exact_at_any_rank():
    expert = adapted(rank=1)
    for rank in (1, 4):
        delta = ByomLora(rank, rest="drop").delta(expert, expert.base)
        assert_close(delta.apply(expert.base)["mlp"], expert["mlp"], rtol=1e-6, atol=1e-6)
        assert delta.stored_parameters == costs(expert, 1)


# error


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_error_is_that_of_the_dropped_singular_values_of_every_piece(rank):
    expert = adapted(Weights.of({name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}))
    put_back = served(ByomLora(rank), expert, expert.base)
    for name, each in expert.factored.items():
        dropped = torch.cat([torch.linalg.svdvals(p.left.double() @ p.right.double())[rank:] for p in each])
        error = float((put_back[name] - expert[name]).norm())
        assert error == pytest.approx(float(dropped.norm()), rel=1e-9)


@pytest.mark.parametrize("rank", [1, 3])
def test_a_dense_difference_is_cut_where_its_factors_would_be(rank):
    base = model(torch.float64)
    expert = adapted(base)
    factored, whole = served(ByomLora(rank), expert, base), served(ByomLora(rank), dense(expert), base)
    for name in ("conv", "mlp"):
        assert_close(factored[name], whole[name], rtol=1e-9, atol=1e-9)
    dropped = torch.linalg.svdvals(differences(expert, base)["qkv"])[rank:]  # one matrix there, three pieces here
    assert float((whole["qkv"] - expert["qkv"]).norm()) == pytest.approx(float(dropped.norm()), rel=1e-9)


@pytest.mark.parametrize("shape", [(30, 4, 20), (4, 4, 30), (3, 8, 5), (30, 1, 1)])
def test_the_core_of_two_qr_factorings_has_the_singular_values_of_the_product(shape):
    rows, inner, columns = shape
    left = random(rows, inner, dtype=torch.float64)
    right = random(inner, columns, seed=1, dtype=torch.float64)
    u, values, vt = product_svd(left, right)
    assert_close(values, torch.linalg.svdvals(left @ right)[: len(values)])
    assert_close(u * values @ vt, left @ right)
    assert_close(u.T @ u, torch.eye(len(values), dtype=torch.float64))
    assert_close(vt @ vt.T, torch.eye(len(values), dtype=torch.float64))


def test_how_a_product_is_divided_between_its_factors_changes_nothing():
    expert = adapted()
    split = {n: [Piece(p.start, 1e3 * p.left, p.right / 1e3) for p in each] for n, each in expert.factored.items()}
    turn = torch.linalg.qr(random(RANK, RANK, seed=7))[0]
    turned = {n: [Piece(p.start, p.left @ turn, turn.T @ p.right) for p in each] for n, each in expert.factored.items()}
    expected = served(ByomLora(2), expert, expert.base)
    for factored in (split, turned):
        got = served(ByomLora(2), Adapted(expert.base, factored, expert.replaced), expert.base)
        assert all(torch.allclose(got[name], expected[name], rtol=1e-5, atol=1e-5) for name in SHAPES)


# size


@pytest.mark.parametrize("rank", [1, 4, RANK, 99])
def test_a_matrix_costs_its_vectors_and_its_singular_values(rank):
    expert = adapted()
    delta = ByomLora(rank).delta(expert, expert.base)
    assert delta.stored_parameters == costs(expert, rank) + WIDTH  # the bias is stored whole
    assert ByomLora(rank, rest="drop").delta(expert, expert.base).stored_parameters == costs(expert, rank)


def test_golden_sizes_of_a_matrix_of_768():
    base = Weights.of({"w": torch.zeros(768, 768)})
    expert = Adapted(base, {"w": [Piece(0, random(768, 16), random(16, 768, seed=1))]})
    sizes = [ByomLora(rank).delta(expert, base).stored_parameters for rank in (4, 8, 16)]
    assert sizes == [6_148, 12_296, 24_592]


@pytest.mark.parametrize("solver", ["exact", "randomised"])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("rank", [1, 2, 3, 5])
def test_a_global_budget_is_not_exceeded_and_nearly_spent(rank, known, solver):
    expert = uneven()
    target = expert if known else dense(expert)
    uniform, spread = (
        ByomLora(rank, rank_allocation=allocation, solver=solver, rest="drop").delta(target, expert.base)
        for allocation in ("uniform", "global")
    )
    cheapest = min(sum(sides[:2]) + 1 for sides in ((40, WIDTH), (10, 12), (WIDTH, WIDTH)))
    assert uniform.stored_parameters - cheapest < spread.stored_parameters <= uniform.stored_parameters


def uneven():
    """An adapter that changes one matrix far more than the others, the others in all directions."""
    base = model()
    factored = pieces(1, rank=8) | {"mlp": [Piece(0, 10 * random(40, 8), random(8, WIDTH, seed=9))]}
    return Adapted(base, factored)


@pytest.mark.parametrize("known", [True, False])
def test_a_global_budget_goes_where_the_singular_values_are(known):
    expert = uneven()
    target = expert if known else dense(expert)
    uniform, spread = (served(ByomLora(2, rank_allocation=a), target, expert.base) for a in ("uniform", "global"))
    before, after = ((expert["mlp"] - weights["mlp"]).norm() for weights in (uniform, spread))
    assert after < 0.8 * before
    errors = [sum(float((expert[n] - w[n]).norm()) ** 2 for n in SHAPES) for w in (uniform, spread)]
    assert errors[1] < errors[0]


def test_golden_allocation_skips_what_no_longer_fits():
    values = {("a", 0): torch.tensor([3.0, 3.0]), ("b", 0): torch.tensor([3.0, 2.0]), ("c", 0): torch.tensor([1.0])}
    price = {("a", 0): 4, ("b", 0): 6, ("c", 0): 1}
    assert allocate(values, price, 9) == {("a", 0): 2, ("b", 0): 0, ("c", 0): 1}
    assert allocate(values, price, 4) == {("a", 0): 1, ("b", 0): 0, ("c", 0): 0}
    assert allocate(values, price, 3) == {("a", 0): 0, ("b", 0): 0, ("c", 0): 1}
    assert allocate(values, price, 99) == {("a", 0): 2, ("b", 0): 2, ("c", 0): 1}


# degenerate input


def test_what_did_not_change_is_not_stored():
    base = model()
    idle = {name: [Piece(p.start, p.left * 0, p.right) for p in each] for name, each in pieces().items()}
    for expert in (Adapted(base, idle), Adapted(base, {}), dense(Adapted(base, idle))):
        for allocation in ("uniform", "global"):
            delta = ByomLora(rank_allocation=allocation).delta(expert, base)
            assert delta.nbytes == 0 and same(delta.apply(base), base)


def test_directions_below_rounding_are_not_stored():
    expert = adapted(rank=2)
    doubled = {
        n: [Piece(p.start, torch.cat([p.left, p.left], 1), torch.cat([p.right, p.right])) for p in each]
        for n, each in expert.factored.items()
    }
    twice = Adapted(expert.base, doubled)
    assert ByomLora(4).delta(twice, expert.base).stored_parameters == costs(expert, 2)


def test_tasks_that_are_equal_are_served_equally():
    base = model()
    both = ByomLora(3).serve(Problem(base, {"a": adapted(base), "b": adapted(base)}), base)
    assert same(both.weights("a"), both.weights("b"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_of_another_dtype_is_put_back_in_it(dtype):
    base = model(dtype)
    expert = adapted(base)
    put_back = served(ByomLora(RANK), expert, base)
    for name in SHAPES:
        assert put_back[name].dtype == dtype
        step = max(torch.finfo(dtype).eps, 1e-12)
        assert_close(put_back[name].double(), expert[name].double(), rtol=step, atol=2e-6 if step > 1e-9 else 1e-9)


def test_what_was_trained_whole_is_kept_whole_or_dropped():
    base = model()
    expert = Adapted(base, pieces(), {"norm": base["norm"] + 1, "mlp": base["mlp"] * 2})  # adapted on trained values
    kept, dropped = (served(ByomLora(2, rest=rest), expert, base) for rest in ("whole", "drop"))
    assert all(
        bits(kept[name]) == bits(expert[name]) and bits(dropped[name]) == bits(base[name]) for name in ("norm", "mlp")
    )
    assert same(kept.select(lambda name: name == "qkv"), dropped.select(lambda name: name == "qkv"))


@pytest.mark.parametrize("part", ["left", "right"])
def test_factors_that_are_not_finite_are_refused_by_name(part):
    expert = adapted()
    getattr(expert.factored["qkv"][1], part)[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="task1: tensor 'qkv'"):
        ByomLora().delta(expert, expert.base)


def test_a_reference_that_is_not_finite_is_refused_by_name():
    base = model()
    expert = adapted(base)
    base["rest"][0, 0] = float("inf")
    with pytest.raises(CheckpointError, match="base: tensor 'rest'"):
        ByomLora().delta(expert, base)


@pytest.mark.parametrize(
    ("option", "value"),
    [("rank", 0), ("rank", -1), ("rank", 2.5), ("rank_allocation", "layer"), ("reference", "none"), ("solver", "qr"),
     ("rest", "some")],
)  # fmt: skip
def test_an_option_out_of_range_is_refused(option, value):
    with pytest.raises(OptionError, match=rf"byom\.{option}={value}.*(use|1 or more)"):
        ByomLora(**{option: value})


@pytest.mark.parametrize("shape", [(4, 6), (6, 3), (5, 2, 2)])
def test_factors_that_do_not_fit_are_refused(shape):
    base = Weights.of({"w": torch.zeros(6, 4)})
    delta = ByomLora().delta(Adapted(base, {"w": [Piece(0, random(6, 2), random(2, 4))]}), base)
    with pytest.raises(CheckpointError, match="do not fit a tensor of shape"):
        delta.variant.unpack(delta.parts["w"], Shared(torch.zeros(shape)))


# cost


def test_the_ranks_of_a_sweep_share_one_factoring(monkeypatch):
    base = model()
    expert, variants = adapted(base), [ByomLora(rank) for rank in (1, 2, 8, 32)]
    alone = []
    for variant in variants:
        lora._known.cache_clear()
        alone.append([served(variant, each, base).state() for each in (expert, dense(expert))])
    for variant in variants[:1]:
        [variant.delta(each, base) for each in (expert, dense(expert))]
    for route in ("product_svd", "truncated_svd"):
        monkeypatch.setattr(lora, route, None)
    for variant, expected in zip(variants, alone, strict=True):
        shared = [served(variant, each, base) for each in (expert, dense(expert))]
        assert all(map(same, shared, expected))


def test_other_values_another_dtype_and_another_seed_are_factored_anew():
    base, half = model(), model(torch.float64)
    for expert, reference in ((adapted(base, 1), base), (adapted(base, 2), base), (adapted(half, 1), half)):
        for given in (expert, dense(expert)):
            for variant in (ByomLora(2), ByomLora(2, solver="randomised"), ByomLora(2, solver="randomised", seed=1)):
                known = served(variant, given, reference).state()
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(lora, "_known", lambda _: {})
                    assert same(known, served(variant, given, reference))


def test_no_product_of_an_adapter_is_formed():
    base = model()
    expert = adapted(base)
    read, reads = expert._read, []
    expert._read = lambda name: (reads.append(name), read(name))[1]
    ByomLora(2).delta(expert, base)
    assert set(reads) == {"norm"}


def test_putting_back_from_disk_gives_the_same_bits(tmp_path):
    base = model()
    given = Problem(base, {"a": adapted(base, 1), "b": adapted(base, 2)})
    bundle = Bundle.pack(ByomLora(2), given.finetuned, base)
    opened = Bundle.open(bundle.save(tmp_path / "bundle"))
    assert all(same(opened.weights(task), bundle.weights(task)) for task in given.tasks)
    delta = Delta.open(bundle.deltas["a"].save(tmp_path / "a.safetensors"))
    assert delta.variant == ByomLora(2) and delta.stored_parameters == costs(given.finetuned["a"], 2) + WIDTH
    assert measure.stored(bundle, given)["shared_parameters"] == base.numel


# the randomised solver


@pytest.mark.parametrize("shape", [(200, 120), (120, 200)])
def test_a_randomised_svd_is_exact_for_a_low_rank_and_nearly_best_for_a_slow_decay(shape):
    low = random(shape[0], 20, dtype=torch.float64) @ random(20, shape[1], seed=1, dtype=torch.float64)
    for a, b in zip(linalg.randomised_svd(low, 8, 0), linalg.truncated_svd(low, 8), strict=True):
        assert_close(a.abs(), b.abs(), rtol=1e-8, atol=1e-8)  # vectors up to sign
    slow = random(*shape, seed=2, dtype=torch.float64)
    left, values, right = linalg.randomised_svd(slow, 8, 0)
    best = float(torch.linalg.svdvals(slow)[8:].norm())
    assert best <= float((slow - left * values @ right).norm()) <= 1.005 * best


def test_a_randomised_cut_depends_on_its_seed_and_on_the_name_and_on_nothing_else():
    shapes = {"a": (120, 100), "b": (120, 100)}
    base = Weights.of({name: torch.zeros(shape) for name, shape in shapes.items()})
    values = random(120, 100)
    expert = Weights.of(dict.fromkeys(shapes, values) | {"b": values.clone()})
    variant = ByomLora(4, solver="randomised")
    first = served(variant, expert, base)
    lora._known.cache_clear()
    assert same(first, served(variant, Weights.of(dict(reversed(expert.state().items()))), base))
    assert not torch.equal(first["a"], first["b"])
    assert not torch.equal(first["a"], served(replace(variant, seed=1), expert, base)["a"])

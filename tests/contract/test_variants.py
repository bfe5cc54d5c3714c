"""Every option of ``conf/byom`` against the laws of packing; a new variant joins by having its yaml."""

import json
from dataclasses import fields, replace
from functools import cache
from itertools import pairwise
from typing import get_args
from weakref import WeakKeyDictionary

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from byom.checkpoint.bundle import Bundle
from byom.errors import CheckpointError, OptionError, WeightsMismatch
from byom.functional.selection import kept, top_mask
from byom.merge.base import group as merging
from byom.merge.task_arithmetic import TaskArithmetic
from byom.pipeline import measure
from byom.variants.base import joined
from byom.variants.base.delta import Delta
from byom.variants.base.sparse import SparseVariant, TopMagnitude
from byom.variants.fft import ByomFft
from byom.variants.post_pruning import PostPruning
from byom.weights import Weights
from byom.weights import cuts as trim
from tests.problems import (
    BUFFERS,
    DTYPES,
    FLOATS,
    IN_AND_OUT_OF_PLACE,
    NARROW_AND_WIDE,
    TIED,
    bits,
    counted,
    grid,
    model,
    models,
    module,
    options,
    posed,
    problem,
    rows,
    same,
)

VARIANTS = options("byom")
SHARING = "tvq-shared_bits=3"  # shares a model of its own making
VARIANTS |= {SHARING: replace(VARIANTS["tvq"], shared_bits=3)}
SPARSE = {
    name: variant
    for name, variant in VARIANTS.items()
    if isinstance(variant, SparseVariant)
    and getattr(variant, "rescale", "none") == "none"
    and variant.values == "native"
}
"""Those that put back the target's own values; what rescales or rounds them is in identities."""
RANKED = {name: variant for name, variant in SPARSE.items() if isinstance(variant, TopMagnitude)}
DENSITIES = [0.0, 0.01, 0.05, 0.1, 0.29, 0.5, 0.75, 1.0]
EXEMPT = {
    "test_everything_kept_is_the_target": {
        "none": "it keeps nothing",
        "prune_then_merge": "it keeps nothing",
        "surgery": "it changes features, not weights",
        "flex": "its size says how much; tests/identities has both ends",
        "symerge": "it keeps a head or one layer; tests/identities says which",
        "emr": "several tasks share one vector; tests/identities has the exact cases",
        "tall_mask": "several tasks share one merged model; tests/identities has the exact cases",
        "t_switch": "a tensor has one magnitude; tests/identities has the exact cases",
        "tsv_compress": "all singular values of a matrix give it back up to rounding; tests/identities says how near",
        "lora": "all singular values of a matrix give it back up to rounding; tests/identities says how near",
        "post_pruning-values=int4,positions=entropy": "differences are rounded; tests/identities says how",
        "bitdelta": "a matrix has one magnitude; tests/identities has the exact cases",
        "tvq": "a tensor has 2^b values; tests/identities has the exact cases and the bound of the others",
        "ultradelta": "a matrix has 2^b values; tests/identities has the exact cases",
        "dts": "a factor has four values; tests/identities has the exact cases",
        "twin-compress=svd": "all singular values of a matrix give it back up to rounding; tests/identities says so",
    },
    "test_the_order_of_tasks_does_not_matter": {
        "symerge": "learnt coefficients agree up to rounding; tests/identities says how nearly",
    },
    "test_a_task_that_changed_nothing_is_served_the_pretrained_model": {
        "tvq-shared_bits=3": "its shared model holds the average of the tasks",
        "symerge": "its shared model is a merged one of its own making",
    },
    "test_another_architecture_is_refused": {"symerge": "it ignores the reference and makes its own"},
}


def exempt(law, option):
    reasons = EXEMPT.get(law, {})
    return reasons.get(option) or reasons.get(option.split("-")[0])


@pytest.fixture(params=[*rows("byom"), SHARING])
def variant(request):
    if reason := exempt(request.function.__name__, request.param):
        pytest.skip(reason)
    return VARIANTS[request.param]


@pytest.fixture(params=SPARSE)
def sparse(request):
    if reason := exempt(request.function.__name__, request.param):
        pytest.skip(reason)
    return SPARSE[request.param]


@pytest.fixture(params=RANKED)
def ranked(request):
    return RANKED[request.param]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


def pair(dtype=torch.float32, **options):
    """Return theta_t and the reference."""
    base, tuned = models(1, dtype, **options)
    return Weights.of(tuned["task1"], "task1"), Weights.of(base, "reference")


def setting(variant, dtype=torch.float32, tasks=3, **options):
    """Return a problem, and the reference that the variant is given."""
    base, tuned = models(tasks, dtype, **options)
    return merged(variant, problem(base, tuned))


def merged(variant, given):
    if variant.on == "pretrained":
        return given, given.pretrained
    prepared = variant.before(given) if variant.before else given
    reference = TaskArithmetic(0.5)(prepared).materialise()
    reference.origin = "merged"
    return given, reference


@cache
def usual(variant, dtype=torch.float32):
    """Return the usual problem, its reference, and how a variant serves it; made once for laws that only read."""
    given, reference = setting(variant, dtype)
    return given, reference, variant.serve(given, reference)


def alone(target, reference):
    """Return a problem of one task whose pre-trained model is the reference itself."""
    return posed(reference, {"task1": target}), reference


def each(variant, *densities):
    """Return a variant at some densities, or itself where it has none."""
    return [replace(variant, density=density) for density in densities] if hasattr(variant, "density") else [variant]


def at(variant, density):
    return replace(variant, density=density) if hasattr(variant, "density") else variant


def groups(variant, values):
    """Return what a variant ranks together, flat: all values of a dict of tensors, those of a tensor, or of a row."""
    tensors = [torch.atleast_1d(values[name]) for name in sorted(values)]
    if variant.scope == "global":
        return [torch.cat([tensor.reshape(-1) for tensor in tensors])]
    rows = {"tensor": lambda tensor: [tensor.reshape(-1)], "row": lambda t: t.reshape(-1, t.shape[-1]).unbind()}
    return [group for tensor in tensors for group in rows[variant.scope](tensor)]


def flat(weights):
    return torch.cat([weights[name].reshape(-1).double() for name in sorted(FLOATS)])


def error(a, b):
    return float((flat(a) - flat(b)).norm())


def contents(delta):
    return {name: {part: bits(tensor) for part, tensor in parts.items()} for name, parts in delta.parts.items()}


def tensors(delta):
    return [tensor for parts in delta.parts.values() for tensor in parts.values()]


# what is put back


def test_everything_kept_is_the_target(variant, dtype):
    given, reference = setting(variant, dtype)
    served = at(variant, 1.0).serve(given, reference)
    for task, expert in given.finetuned.items():
        assert all(bits(served.weights(task)[name]) == bits(expert[name]) for name in [*FLOATS, *TIED])


def test_nothing_kept_is_the_reference(sparse, dtype):
    target, reference = pair(dtype)
    delta = at(sparse, 0.0).delta(target, reference)
    assert same(delta.apply(reference), reference)
    assert delta.nbytes == delta.stored_parameters == 0


@pytest.mark.parametrize("values", [grid, None], ids=["ties", "normal"])
def test_exactly_the_kept_entries_are_the_target_and_the_rest_the_reference(sparse, values, dtype):
    for density in DENSITIES:
        _are_kept(sparse, density, *pair(dtype, **({"values": values} if values else {})))


def _are_kept(sparse, density, target, reference):
    delta = at(sparse, density).delta(target, reference)
    put_back = delta.apply(reference)
    for name in FLOATS:
        got, task, base = (weights[name].reshape(-1) for weights in (put_back, target, reference))
        stored = delta.parts.get(name, {}).get("values", torch.empty(0))
        assert torch.isin(stored, task).all()
        assert torch.all((got == task) | (got == base))
        assert int((got != base).sum()) <= len(stored)


@pytest.mark.parametrize("values", [grid, None], ids=["ties", "normal"])
def test_of_what_is_ranked_together_exactly_the_density_is_kept(ranked, values, dtype):
    target, reference = pair(dtype, **({"values": values} if values else {}))
    distinct = {name: torch.arange(1.0, 1 + target[name].numel()).reshape(target.shape(name)) for name in FLOATS}
    zeros = Weights.of({name: torch.zeros_like(value) for name, value in distinct.items()})
    for density in DENSITIES:
        delta = at(ranked, density).delta(target, reference)
        counts = [kept(density, len(group)) for group in groups(ranked, {name: target[name] for name in FLOATS})]
        assert delta.stored_parameters == sum(counts), density
        put_back = at(ranked, density).delta(Weights.of(distinct), zeros).apply(zeros)
        assert [int((group != 0).sum()) for group in groups(ranked, put_back)] == counts, density


def test_no_other_choice_of_as_many_entries_is_nearer(ranked):
    for density in DENSITIES:
        _is_nearest(ranked, density, *pair(torch.float64))


def _is_nearest(ranked, density, target, reference):
    delta = at(ranked, density).delta(target, reference)
    differences = groups(ranked, {name: (target[name] - reference[name]).abs() for name in FLOATS})
    best = float(torch.cat([d.sort().values[: len(d) - kept(density, len(d))] for d in differences]).norm())
    assert error(delta.apply(reference), target) == pytest.approx(best, rel=1e-12, abs=1e-15)


def test_more_density_is_never_farther(sparse, dtype):
    target, reference = pair(dtype)
    errors = [error(at(sparse, d).delta(target, reference).apply(reference), target) for d in DENSITIES]
    assert all(a >= b for a, b in pairwise(errors)) and errors[0] > 0 == errors[-1]


def test_a_denser_choice_contains_the_sparser(sparse):
    target, reference = pair(values=grid)
    puts = [at(sparse, d).delta(target, reference).apply(reference) for d in DENSITIES]
    changed = [torch.cat([(p[n] != reference[n]).reshape(-1) for n in FLOATS]) for p in puts]
    assert all(bool((a <= b).all()) for a, b in pairwise(changed))


def test_ties_go_to_the_lowest_position(ranked):
    target = Weights.of({"a": torch.ones(2, 4), "b": torch.ones(2, 4)})
    put_back = at(ranked, 0.5).delta(target, target * 0).apply(target * 0)
    for group in groups(ranked, put_back):
        assert group.tolist() == [1] * (len(group) // 2) + [0] * (len(group) // 2)


def test_scope_says_what_is_ranked_together(ranked):
    big, small = torch.tensor([[10.0, 9], [8, 7]]), torch.tensor([0.4, 0.3, 0.2, 0.1])
    target = Weights.of({"big": big, "small": small})
    put_back = at(ranked, 0.5).delta(target, target * 0).apply(target * 0)
    survivors = [put_back[name][put_back[name] != 0].tolist() for name in ("big", "small")]
    expected = {"global": ([10, 9, 8, 7], []), "tensor": ([10, 9], [0.4, 0.3]), "row": ([10, 8], [0.4, 0.3])}
    assert survivors == [pytest.approx(values) for values in expected[ranked.scope]]


@pytest.mark.parametrize("density", DENSITIES)
def test_scope_row_keeps_the_largest_along_the_last_axis(density, dtype):
    target, reference = pair(dtype, values=grid)
    delta = ByomFft(density, "row").delta(target, reference)
    for name in FLOATS:
        mask = top_mask(target[name].float() - reference[name].float(), density, dim=-1)
        stored = delta.parts.get(name, {}).get("values", torch.empty(0, dtype=dtype))
        assert torch.equal(stored, target[name][mask])


def test_identical_tensors_never_win(dtype):
    target, reference = pair(dtype)
    state = target.state() | {name: reference[name] for name in ("embed", "head")}
    delta = ByomFft(density=0.4).delta(Weights.of(state), reference)
    assert delta.stored_parameters == kept(0.4, reference.numel) and "embed" not in delta.parts


def test_against_the_pretrained_byom_fft_is_post_pruning():
    target, reference = pair()
    for density in DENSITIES:
        for scope in get_args(trim.Scope):
            fft, pruned = (cls(density, scope).delta(target, reference) for cls in (ByomFft, PostPruning))
            assert same(fft.apply(reference), pruned.apply(reference)) and fft.nbytes == pruned.nbytes


def test_differences_are_ranked_in_fp32():
    reference = Weights.of({"a": torch.tensor([256.0, 256.0], dtype=torch.bfloat16)})
    target = Weights.of({"a": torch.tensor([0.5, 0.0], dtype=torch.bfloat16)})
    assert ByomFft(density=0.5).delta(target, reference).apply(reference)["a"].tolist() == [256, 0]


# purity


@pytest.mark.parametrize("dtype", IN_AND_OUT_OF_PLACE, ids=str)
def test_packing_and_putting_back_are_pure(variant, dtype):
    given, reference = setting(variant, dtype)
    inputs = [given.pretrained, reference, *given.finetuned.values()]
    before = [{name: bits(w[name]) for name in w} for w in inputs]
    first, second = variant.serve(given, reference), variant.serve(given, reference)
    for task in given.tasks:
        assert contents(first.deltas[task]) == contents(second.deltas[task])
        put_back = first.weights(task)
        forth = {name: bits(put_back[name]) for name in put_back}
        assert forth == {name: bits(put_back[name]) for name in reversed(put_back.keys())}
    assert [{name: bits(w[name]) for name in w} for w in inputs] == before


@pytest.mark.parametrize("dtype", NARROW_AND_WIDE, ids=str)
def test_disk_and_memory_give_the_same_bits(variant, dtype, tmp_path):
    given, reference, expected = usual(variant, dtype)

    def stored(weights):
        return Weights.open(weights.save(tmp_path / weights.origin, shard_bytes=90))

    opened = posed(stored(given.pretrained), {t: stored(w) for t, w in given.finetuned.items()})
    served = variant.serve(opened, stored(reference))
    assert all(same(served.weights(task), expected.weights(task)) for task in given.tasks)


def test_the_size_of_blocks_does_not_matter(variant, monkeypatch):
    expected = [contents(delta) for delta in usual(variant)[2].deltas.values()]
    monkeypatch.setattr(merging, "BLOCK", 5)
    served = variant.serve(*setting(variant))
    assert [contents(delta) for delta in served.deltas.values()] == expected
    assert all(served.weights(task).state() for task in served.deltas)


def test_the_order_of_tasks_does_not_matter(variant):
    given, reference = setting(variant, values=grid)  # sums of the grid are exact
    turned = posed(given.pretrained, dict(reversed(given.finetuned.items())))
    first, second = variant.serve(given, reference), variant.serve(turned, reference)
    assert all(same(first.weights(task), second.weights(task)) for task in given.tasks)


def test_buffers_and_ties_are_those_of_the_reference(variant):
    given, reference, served = usual(variant)
    for task in given.tasks:
        put_back = served.weights(task)
        assert all(bits(put_back[name]) == bits(reference[name]) for name in BUFFERS)
        assert put_back.ties == TIED and put_back.keys() == reference.keys()


@pytest.mark.parametrize("dtype", IN_AND_OUT_OF_PLACE, ids=str)
def test_dtypes_and_shapes_are_those_of_the_reference(variant, dtype):
    given, reference, served = usual(variant, dtype)
    for task in given.tasks:
        for name, tensor in served.weights(task).state().items():
            assert (tensor.dtype, tensor.shape) == (reference.dtype(name), reference.shape(name))


def test_putting_back_is_lazy(variant):
    served = usual(variant)[2]
    watched, reads = counted(served.reference)
    put_back = served.deltas["task1"].apply(watched, served.base)
    assert not reads
    put_back["layer.bias"]
    assert set(reads) <= {"layer.bias"}


# degenerate problems


@pytest.mark.parametrize("dtype", IN_AND_OUT_OF_PLACE, ids=str)
def test_models_that_no_task_changed_are_served_as_they_are(variant, dtype):
    base, _ = models(0, dtype)
    unchanged = {task: Weights.of(base, task) for task in ("a", "b")}
    given, reference = merged(variant, posed(Weights.of(base), unchanged))
    served = variant.serve(given, reference)
    assert all(bits(served.weights(task)[name]) == bits(base[name]) for task in unchanged for name in FLOATS)


@pytest.mark.parametrize("dtype", IN_AND_OUT_OF_PLACE, ids=str)
def test_a_task_that_changed_nothing_is_served_the_pretrained_model(variant, dtype):
    if variant.on == "merged":
        return  # it is served what the others moved
    given, _ = setting(variant, dtype)
    idle = posed(given.pretrained, {**given.finetuned, "idle": given.pretrained})
    served = variant.serve(idle, given.pretrained).weights("idle")
    assert all(bits(served[n]) == bits(given.pretrained[n]) for n in FLOATS)


@pytest.mark.parametrize("tasks", [1, 2])
def test_identical_tasks_are_served_alike_and_finite(variant, dtype, tasks):
    base, tuned = models(1, dtype)
    twins = {f"twin{t}": Weights.of(tuned["task1"]) for t in range(tasks)}
    served = variant.serve(*merged(variant, posed(Weights.of(base), twins)))
    first = served.weights("twin0")
    assert all(same(first, served.weights(task)) for task in twins)
    assert all(torch.isfinite(first[name]).all() for name in FLOATS)


# plans


def test_every_density_of_a_sweep_comes_from_one_pass(ranked):
    (target, reads), (reference, _) = (counted(weights, checksums=True) for weights in pair())
    densities = (0.01, 0.05, 0.1, 0.2)
    with trim.sweep(densities):
        at(ranked, densities[0]).plan(target, reference)
    first = len(reads)
    for density in densities:
        at(ranked, density).plan(target, reference)
    assert 0 < first == len(reads)
    at(ranked, 0.3).plan(target, reference)
    assert len(reads) > first


def test_a_plan_is_not_reused_for_other_values_or_another_scope(ranked):
    (target, reference), other = pair(), Weights.of(model(9), "task1")
    ranked.delta(target, reference)
    for scope in get_args(trim.Scope):
        variant = replace(ranked, scope=scope)
        cached = variant.delta(other, reference).apply(reference)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trim, "_HELD", WeakKeyDictionary())
            assert same(cached, variant.delta(other, reference).apply(reference))


# what is stored


@pytest.mark.parametrize("dtype", NARROW_AND_WIDE, ids=str)
def test_reported_sizes_are_those_of_the_tensors(variant, dtype, tmp_path):
    given, reference, _ = usual(variant, dtype)
    served = [one.serve(given, reference) for one in each(variant, 0.0, 0.1, 0.5, 1.0)]
    for task, delta in (item for one in served for item in one.deltas.items()):
        stored = load_file(delta.save(tmp_path / f"{task}.safetensors"))
        assert delta.nbytes == sum(tensor.nbytes for tensor in stored.values())
        floating = [tensor for tensor in stored.values() if tensor.is_floating_point()]
        assert variant.joined or delta.stored_parameters == sum(tensor.numel() for tensor in floating)
        assert {tensor.dtype for tensor in stored.values()} <= {torch.uint8, dtype, torch.float32}
        assert {tensor.dtype for key, tensor in stored.items() if key.endswith("//values")} <= {dtype}


@pytest.mark.parametrize("dtype", NARROW_AND_WIDE, ids=str)
def test_a_delta_comes_back_from_disk(variant, dtype, tmp_path):
    given, reference, _ = usual(variant, dtype)
    for one in each(variant, 0.0, 0.1, 1.0):
        served = one.serve(given, reference)
        delta = served.deltas["task2"]
        opened = Delta.open(delta.save(tmp_path / "delta.safetensors"))
        assert opened.variant == delta.variant and opened.nbytes == delta.nbytes
        assert contents(opened) == contents(delta) and dict(opened.shapes) == dict(delta.shapes)
        assert same(opened.apply(served.reference, served.base), served.weights("task2"))


@pytest.mark.parametrize("dtype", NARROW_AND_WIDE, ids=str)
def test_what_is_stored_is_accounted_for(variant, dtype):
    given, reference, served = usual(variant, dtype)
    said = measure.stored(served, given)
    models_ = [[w[name] for name in w.mergeable()] for w in served.shared]
    packed = [tensor for delta in served.deltas.values() for tensor in tensors(delta)]
    names = [joined.index(delta.parts, delta.shapes) for delta in served.deltas.values() if variant.joined]
    assert said["bytes"] == sum(tensor.nbytes for each in [packed, names, *models_] for tensor in each)
    values = [tensor.numel() for tensor in packed if tensor.is_floating_point()]
    assert said["parameters"] == sum(values) + len(models_) * reference.numel
    assert said["density"]["of_all"] == pytest.approx(sum(values) / 3 / reference.numel)
    assert said["shared_models"] == len(models_) == variant.shares_reference + variant.shares_base


def test_a_delta_is_small(sparse):
    base = {"w": torch.zeros(1000, 100)}
    target = {"w": torch.randn(1000, 100, generator=torch.Generator().manual_seed(0))}
    delta = at(sparse, 0.01).delta(Weights.of(target), Weights.of(base))
    assert delta.stored_parameters == 1000 and delta.nbytes <= 1000 * (4 + 1.1)


# refusals


@pytest.mark.parametrize("density", [-0.1, 1.1, 10, float("nan")])
def test_a_density_that_is_no_fraction_is_refused(sparse, density):
    with pytest.raises(OptionError, match=r"byom\.density=.*fraction in \[0, 1\].*=0\.1"):
        at(sparse, density)


def test_an_unknown_scope_is_refused(ranked):
    with pytest.raises(OptionError, match=r"byom\.scope=layer.*global, tensor or row"):
        replace(ranked, scope="layer")


@pytest.mark.parametrize("culprit", ["task1", "reference"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_by_name(variant, culprit, bad):
    target, reference = pair()
    (target if culprit == "task1" else reference)["layer.bias"][3] = bad
    with pytest.raises(CheckpointError, match=rf"{culprit}: tensor 'layer\.bias'"):
        variant.serve(*alone(target, reference))


def test_another_architecture_is_refused(variant):
    given, reference = setting(variant)
    with pytest.raises(WeightsMismatch, match="one only in the"):
        variant.serve(given, reference.select(lambda name: name != "one"))


def test_a_second_shared_model_cannot_be_left_out(variant):
    served = usual(variant)[2]
    if not variant.shares_base:
        assert served.base is None
        return
    with pytest.raises(OptionError, match=r"two shared models; give base="):
        served.deltas["task1"].apply(served.reference)


def test_a_reference_that_lacks_a_packed_tensor_is_refused():
    target, reference = pair()
    delta = ByomFft(density=1.0).delta(target, reference)
    with pytest.raises(CheckpointError, match=r"\['embed'\], which reference does not have"):
        delta.apply(reference.select(lambda name: name not in ("embed", "head")))


def test_a_reference_of_another_size_is_refused():
    target, reference = pair()
    delta = ByomFft(density=0.9).delta(target, reference)
    other = Weights.of(reference.state() | {"layer.weight": torch.zeros(2, 2)})
    with pytest.raises(CheckpointError, match=r"'layer.weight' was \(6, 4\), and is \(2, 2\)"):
        delta.apply(other)
    larger = Weights.of(reference.state() | {"layer.weight": torch.zeros(6, 40)})
    with pytest.raises(CheckpointError, match=r"and is \(6, 40\)"):
        delta.apply(larger)


def test_a_checkpoint_is_no_delta(tmp_path):
    folder = Weights.of(model(1)).save(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"not a packed task difference.*Weights\.open"):
        Delta.open(folder / "model.safetensors")


def test_a_damaged_delta_is_refused(tmp_path):
    file = ByomFft(density=0.5).delta(*pair()).save(tmp_path / "delta.safetensors")
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"delta\.safetensors is damaged.*checksum.*again"):
        Delta.open(file)


def test_a_delta_of_an_unknown_variant_is_refused(tmp_path):
    file = ByomFft(density=0.5).delta(*pair()).save(tmp_path / "delta.safetensors")
    file.write_bytes(file.read_bytes().replace(b"ByomFft", b"ByomXyz"))
    with pytest.raises(CheckpointError, match="ByomXyz"):
        Delta.open(file)


def test_every_option_is_titled_frozen_and_says_its_reference(variant):
    assert variant.title and variant.on in ("merged", "pretrained")
    assert hash(variant) == hash(replace(variant)) and isinstance(fields(variant), tuple)


# bundles


@pytest.fixture
def bundle(variant):
    served = usual(variant)[2]
    return Bundle(served.reference, served.deltas, served.base)


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if not variant.needs.inputs])
def test_packing_gives_each_task_the_weights_that_it_is_served(name):
    given, reference = setting(VARIANTS[name])
    served = VARIANTS[name].serve(given, reference)
    bundle = Bundle.pack(VARIANTS[name], given.finetuned, reference, given.pretrained)
    assert all(same(bundle.weights(task), served.weights(task)) for task in served.deltas)


def test_a_bundle_comes_back_from_disk(bundle, tmp_path):
    opened = Bundle.open(bundle.save(tmp_path / "bundle"))
    assert list(opened.deltas) == list(bundle.deltas) and opened.nbytes == bundle.nbytes
    assert all(same(opened.weights(task), bundle.weights(task)) for task in bundle.deltas)
    assert same(opened.reference, bundle.reference) and (opened.base is None) == (bundle.base is None)
    assert same(Bundle.open(opened.save(tmp_path / "bundle")).reference, bundle.reference)


@pytest.mark.parametrize("dtype", IN_AND_OUT_OF_PLACE, ids=str)
def test_a_live_model_that_is_switched_has_the_bits_of_what_is_unpacked(variant, dtype):
    served = usual(variant, dtype)[2]
    live = module(served.reference.state())
    handle = Bundle(served.reference, served.deltas, served.base).attach(live)
    for task in ("task1", "task2", None, "task3", "task1"):
        handle.switch(task)
        weights = served.weights(task) if task else served.reference
        assert all(bits(tensor) == bits(weights[name]) for name, tensor in live.state_dict().items())


@pytest.mark.parametrize("dtype", IN_AND_OUT_OF_PLACE, ids=str)
def test_entries_that_are_assigned_in_place_give_what_is_unpacked(variant, dtype):
    served = usual(variant, dtype)[2]
    for task, delta in served.deltas.items():
        for name in delta.shapes:
            parts = delta.restored(name, lambda name=name: served.reference[name])
            found = delta.variant.entries(parts, served.reference[name].numel())
            assert found is not None or not isinstance(variant, SparseVariant)
            if found is not None:
                flat = served.reference[name].clone().reshape(-1)
                flat[found.positions] = found.values.to(dtype)
                assert bits(flat) == bits(served.weights(task)[name].reshape(-1))


def test_the_size_of_a_bundle_is_that_of_its_tensors(bundle, tmp_path):
    bundle.save(tmp_path / "bundle")
    files = (tmp_path / "bundle").rglob("*.safetensors")
    assert bundle.nbytes == sum(tensor.nbytes for file in files for tensor in load_file(file).values())


def test_a_tampered_reference_is_refused(bundle, tmp_path):
    folder = bundle.save(tmp_path / "bundle")
    tampered = bundle.reference.state()
    tampered["scale"] = tampered["scale"] + 1e-6
    Weights.of(tampered).save(folder / "reference")
    with pytest.raises(CheckpointError, match=r"bundle.reference is not the model.*save it again"):
        Bundle.open(folder)


def test_a_reference_damaged_on_disk_is_found_when_it_is_read(bundle, tmp_path):
    file = bundle.save(tmp_path / "bundle") / "reference" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        Bundle.open(tmp_path / "bundle").weights("task1").state()


def test_an_unknown_task_is_refused_with_the_nearest(bundle):
    with pytest.raises(OptionError, match=r"no task 'task9'; did you mean 'task\d'.*Known: task1, task2, task3"):
        bundle.weights("task9")


def test_a_folder_without_a_bundle_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="not a bundle"):
        Bundle.open(tmp_path)


def test_a_bundle_with_a_lost_task_file_is_refused(bundle, tmp_path):
    folder = bundle.save(tmp_path / "bundle")
    (folder / "task2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"task2\.safetensors"):
        Bundle.open(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_damaged_list_of_tasks_is_refused(tmp_path, text):
    base, _ = models(0)
    folder = Bundle(Weights.of(base), {}).save(tmp_path / "bundle")
    (folder / "bundle.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"bundle\.json"):
        Bundle.open(folder)


@pytest.mark.parametrize("task", ["glue/sst2", "../escaped", "/escaped"])
def test_a_task_whose_name_is_no_file_name_is_refused(tmp_path, task):
    base, tuned = models(1)
    bundle = Bundle.pack(ByomFft(), {task: Weights.of(tuned["task1"])}, Weights.of(base))
    with pytest.raises(OptionError, match="cannot name a file"):
        bundle.save(tmp_path / "place" / "bundle")
    assert not list((tmp_path / "place").glob("*")) and not list(tmp_path.glob("*.safetensors"))


def test_a_saved_bundle_says_what_it_holds(bundle, tmp_path):
    folder = bundle.save(tmp_path / "bundle")
    notes = json.loads((folder / "bundle.json").read_text())
    assert notes["tasks"] == ["task1", "task2", "task3"]
    assert notes["reference"] == bundle.reference.fingerprint()
    assert notes.get("base") == (bundle.base and bundle.base.fingerprint())
    with safe_open(folder / "task1.safetensors", "pt") as file:
        assert "variant" in json.loads(file.metadata()["byom"])

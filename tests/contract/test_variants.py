"""Every option of ``conf/byom`` against the laws of packing; a new variant joins by having its yaml."""

import json
from dataclasses import fields, replace
from itertools import pairwise

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from byom import trim
from byom.bundle import Bundle
from byom.errors import CheckpointError, OptionError, WeightsMismatch
from byom.selection import kept
from byom.variants.base import Delta
from byom.variants.fft import ByomFft
from byom.variants.post_pruning import PostPruning
from byom.weights import Weights
from tests.problems import BUFFERS, FLOATS, TIED, bits, counted, grid, model, models, options, same

VARIANTS = options("byom")
SPARSE = {name: variant for name, variant in VARIANTS.items() if hasattr(variant, "density")}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DENSITIES = [0.0, 0.01, 0.05, 0.1, 0.29, 0.5, 0.75, 1.0]
EXEMPT = {
    "test_everything_kept_is_the_target": {"none": "it keeps nothing"},
}


@pytest.fixture(params=VARIANTS)
def variant(request):
    law = request.function.__name__
    if reason := EXEMPT.get(law, {}).get(request.param):
        pytest.skip(reason)
    return VARIANTS[request.param]


@pytest.fixture(params=SPARSE)
def sparse(request):
    return SPARSE[request.param]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


@pytest.fixture(autouse=True)
def forget():
    trim._known.cache_clear()
    trim._read.cache_clear()


def pair(dtype=torch.float32, **options):
    """Return theta_t and the reference."""
    base, tuned = models(1, dtype, **options)
    return Weights.of(tuned["task1"], "task1"), Weights.of(base, "reference")


def at(variant, density):
    return replace(variant, density=density) if hasattr(variant, "density") else variant


def flat(weights):
    return torch.cat([weights[name].reshape(-1).double() for name in sorted(FLOATS)])


def error(a, b):
    return float((flat(a) - flat(b)).norm())


def tensors(delta):
    return [tensor for parts in delta.parts.values() for tensor in parts.values()]


# what is put back


def test_everything_kept_is_the_target(variant, dtype):
    target, reference = pair(dtype)
    put_back = at(variant, 1.0).delta(target, reference).apply(reference)
    assert all(bits(put_back[name]) == bits(target[name]) for name in [*FLOATS, *TIED])


def test_nothing_kept_is_the_reference(sparse, dtype):
    target, reference = pair(dtype)
    delta = at(sparse, 0.0).delta(target, reference)
    assert same(delta.apply(reference), reference)
    assert delta.nbytes == delta.stored_parameters == 0


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("values", [grid, None], ids=["ties", "normal"])
def test_exactly_the_kept_entries_are_the_target_and_the_rest_the_reference(sparse, density, values, dtype):
    target, reference = pair(dtype, **({"values": values} if values else {}))
    delta = at(sparse, density).delta(target, reference)
    put_back = delta.apply(reference)
    for name in FLOATS:
        got, task, base = (weights[name].reshape(-1) for weights in (put_back, target, reference))
        stored = delta.parts.get(name, {}).get("values", torch.empty(0))
        assert torch.isin(stored, task).all()
        assert torch.all((got == task) | (got == base))
        assert int((got != base).sum()) <= len(stored)
    sizes = [torch.Size(shape).numel() for shape in FLOATS.values()]
    whole = [sum(sizes)] if sparse.scope == "global" else sizes
    assert delta.stored_parameters == sum(kept(density, n) for n in whole)


@pytest.mark.parametrize("density", DENSITIES)
def test_no_other_choice_of_as_many_entries_is_nearer(sparse, density):
    target, reference = pair(torch.float64)
    delta = at(sparse, density).delta(target, reference)
    if sparse.scope == "global":
        dropped = (flat(target) - flat(reference)).abs().sort().values[: flat(target).numel() - delta.stored_parameters]
        best = float(dropped.norm())
    else:
        differences = [(target[name] - reference[name]).reshape(-1).abs().sort().values for name in FLOATS]
        best = float(torch.cat([d[: len(d) - kept(density, len(d))] for d in differences]).norm())
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


def test_ties_go_to_the_lowest_position(sparse):
    target = Weights.of({"a": torch.ones(4), "b": torch.ones(4)})
    put_back = at(sparse, 0.5).delta(target, target * 0).apply(target * 0)
    global_ = sparse.scope == "global"
    assert put_back["a"].tolist() == ([1, 1, 1, 1] if global_ else [1, 1, 0, 0])
    assert put_back["b"].tolist() == ([0, 0, 0, 0] if global_ else [1, 1, 0, 0])


def test_scope_says_what_is_ranked_together(sparse):
    target = Weights.of({"big": torch.tensor([10.0, 9, 8, 7]), "small": torch.tensor([0.4, 0.3, 0.2, 0.1])})
    put_back = at(sparse, 0.5).delta(target, target * 0).apply(target * 0)
    kept_ = {name: put_back[name][put_back[name] != 0].tolist() for name in target}
    expected = {"global": ([10, 9, 8, 7], []), "tensor": ([10, 9], [0.4, 0.3])}[sparse.scope]
    assert [kept_["big"], kept_["small"]] == [pytest.approx(values) for values in expected]


def test_identical_tensors_never_win(dtype):
    target, reference = pair(dtype)
    state = target.state() | {name: reference[name] for name in ("embed", "head")}
    delta = ByomFft(density=0.4).delta(Weights.of(state), reference)
    assert delta.stored_parameters == kept(0.4, reference.numel) and "embed" not in delta.parts


def test_against_the_pretrained_byom_fft_is_post_pruning():
    target, reference = pair()
    for density in DENSITIES:
        for scope in ("global", "tensor"):
            fft, pruned = (cls(density, scope).delta(target, reference) for cls in (ByomFft, PostPruning))
            assert same(fft.apply(reference), pruned.apply(reference)) and fft.nbytes == pruned.nbytes


def test_differences_are_ranked_in_fp32():
    reference = Weights.of({"a": torch.tensor([256.0, 256.0], dtype=torch.bfloat16)})
    target = Weights.of({"a": torch.tensor([0.5, 0.0], dtype=torch.bfloat16)})
    assert ByomFft(density=0.5).delta(target, reference).apply(reference)["a"].tolist() == [256, 0]


# purity


def test_packing_and_putting_back_are_pure(variant, dtype):
    target, reference = pair(dtype)
    before = [{name: bits(w[name]) for name in w} for w in (target, reference)]
    first, second = variant.delta(target, reference), variant.delta(target, reference)
    assert {n: {p: bits(t) for p, t in parts.items()} for n, parts in first.parts.items()} == {
        n: {p: bits(t) for p, t in parts.items()} for n, parts in second.parts.items()
    }
    put_back = first.apply(reference)
    forth = {name: bits(put_back[name]) for name in put_back}
    assert forth == {name: bits(put_back[name]) for name in reversed(put_back.keys())}
    assert [{name: bits(w[name]) for name in w} for w in (target, reference)] == before


def test_disk_and_memory_give_the_same_bits(variant, dtype, tmp_path):
    target, reference = pair(dtype)
    expected = variant.delta(target, reference).apply(reference)
    target, reference = (Weights.open(w.save(tmp_path / w.origin, shard_bytes=90)) for w in (target, reference))
    trim._known.cache_clear()
    assert same(variant.delta(target, reference).apply(reference), expected)


def test_buffers_and_ties_are_those_of_the_reference(variant):
    target, reference = pair()
    put_back = variant.delta(target, reference).apply(reference)
    assert all(bits(put_back[name]) == bits(reference[name]) for name in BUFFERS)
    assert put_back.ties == TIED and put_back.keys() == reference.keys()


def test_putting_back_is_lazy(variant):
    target, reference = pair()
    watched, reads = counted(reference)
    delta = variant.delta(target, reference)
    put_back = delta.apply(watched)
    assert not reads
    put_back["layer.bias"]
    assert set(reads) <= {"layer.bias"}


def test_every_density_of_a_sweep_comes_from_one_pass(sparse):
    (target, reads), (reference, _) = (counted(weights, checksums=True) for weights in pair())
    densities = trim.SWEEP
    at(sparse, densities[0]).plan(target, reference)
    first = len(reads)
    for density in densities:
        at(sparse, density).plan(target, reference)
    assert 0 < first == len(reads)


def test_a_plan_is_not_reused_for_other_values_or_another_scope(sparse):
    (target, reference), other = pair(), Weights.of(model(9), "task1")
    sparse.delta(target, reference)
    for scope in ("global", "tensor"):
        variant = replace(sparse, scope=scope)
        cached = variant.delta(other, reference).apply(reference)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trim, "_known", lambda *_: {})
            assert same(cached, variant.delta(other, reference).apply(reference))


# what is stored


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
def test_reported_sizes_are_those_of_the_tensors(variant, density, dtype, tmp_path):
    target, reference = pair(dtype)
    delta = at(variant, density).delta(target, reference)
    stored = load_file(delta.save(tmp_path / "delta.safetensors"))
    assert delta.nbytes == sum(tensor.nbytes for tensor in stored.values())
    values = [tensor for key, tensor in stored.items() if key.endswith("//values")]
    assert delta.stored_parameters == sum(tensor.numel() for tensor in values)
    assert {tensor.dtype for tensor in values} <= {dtype}


@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_a_delta_comes_back_from_disk(variant, density, dtype, tmp_path):
    target, reference = pair(dtype)
    delta = at(variant, density).delta(target, reference)
    opened = Delta.open(delta.save(tmp_path / "delta.safetensors"))
    assert opened.variant == delta.variant and opened.nbytes == delta.nbytes
    assert [bits(a) for a in tensors(opened)] == [
        bits(delta.parts[n][p]) for n in opened.parts for p in opened.parts[n]
    ]
    assert same(opened.apply(reference), delta.apply(reference))


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


def test_an_unknown_scope_is_refused(sparse):
    with pytest.raises(OptionError, match=r"byom\.scope=layer.*global or tensor"):
        replace(sparse, scope="layer")


@pytest.mark.parametrize("culprit", ["task1", "reference"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_by_name(variant, culprit, bad):
    target, reference = pair()
    (target if culprit == "task1" else reference)["layer.bias"][3] = bad
    with pytest.raises(CheckpointError, match=rf"{culprit}: tensor 'layer\.bias'"):
        variant.delta(target, reference)


def test_another_architecture_is_refused(variant):
    target, reference = pair()
    with pytest.raises(WeightsMismatch, match="one only in the second"):
        variant.delta(target.select(lambda name: name != "one"), reference)
    with pytest.raises(WeightsMismatch, match="'head' and 'embed'"):
        variant.delta(Weights.of(target.state() | {"head": target["head"] + 1}), reference)


def test_a_reference_that_lacks_a_packed_tensor_is_refused():
    target, reference = pair()
    delta = ByomFft(density=1.0).delta(target, reference)
    with pytest.raises(CheckpointError, match=r"\['embed'\], which reference has not"):
        delta.apply(reference.select(lambda name: name not in ("embed", "head")))


def test_a_reference_of_another_size_is_refused():
    target, reference = pair()
    delta = ByomFft(density=0.9).delta(target, reference)
    other = Weights.of(reference.state() | {"layer.weight": torch.zeros(2, 2)})
    with pytest.raises(CheckpointError, match="do not fit"):
        delta.apply(other)["layer.weight"]


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
    assert variant.title and variant.reference in ("merged", "pretrained")
    assert hash(variant) == hash(replace(variant)) and isinstance(fields(variant), tuple)


# bundles


@pytest.fixture
def bundle(variant):
    base, tuned = models(3)
    return Bundle.pack(variant, {t: Weights.of(s, t) for t, s in tuned.items()}, Weights.of(base))


def test_a_bundle_gives_each_task_its_weights(variant):
    base, tuned = models(3)
    experts = {t: Weights.of(s, t) for t, s in tuned.items()}
    bundle = Bundle.pack(variant, experts, Weights.of(base))
    for task, expert in experts.items():
        assert same(bundle.weights(task), variant.delta(expert, Weights.of(base)).apply(Weights.of(base)))


def test_a_bundle_comes_back_from_disk(bundle, tmp_path):
    opened = Bundle.open(bundle.save(tmp_path / "bundle"))
    assert list(opened.deltas) == list(bundle.deltas) and opened.nbytes == bundle.nbytes
    assert all(same(opened.weights(task), bundle.weights(task)) for task in bundle.deltas)
    assert same(opened.reference, bundle.reference)
    assert same(Bundle.open(opened.save(tmp_path / "bundle")).reference, bundle.reference)


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
    with safe_open(folder / "task1.safetensors", "pt") as file:
        assert "variant" in json.loads(file.metadata()["byom"])

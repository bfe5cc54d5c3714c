"""What is computed, not learned, may be missing or infinite, and is the base's in every result."""

import pytest
import torch
from safetensors.torch import save_file

from byom.checkpoint import read
from byom.checkpoint.bundle import Bundle
from byom.errors import CheckpointError
from byom.merge.base import Problem
from byom.merge.task_arithmetic import TaskArithmetic
from byom.variants.base.delta import Delta
from byom.variants.fft import ByomFft
from byom.weights import Weights
from tests.problems import bits, configured, models, options, problem, tied

BUFFERS = {
    "embed.position_ids": torch.arange(4)[None],
    "rotary_emb.inv_freq": torch.ones(4),
    "text.attn_mask": torch.full((3, 3), -torch.inf).triu(1),
    "attn.masked_bias": torch.tensor(-1e9),
    "h.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool),
}
W = {"w": torch.zeros(2, 3)}


def of(state, origin):
    return Weights.of(state, origin)


@pytest.mark.parametrize("name", BUFFERS)
@pytest.mark.parametrize("where", ["base", "expert", "another shape"])
def test_a_buffer_in_one_of_two(tmp_path, name, where):
    buffer = {name: BUFFERS[name]}
    base, tuned = dict(W), {"w": W["w"] + 2}
    if where != "expert":
        base |= buffer
    if where != "base":
        tuned |= buffer
    if where == "another shape":
        tuned[name] = torch.cat([BUFFERS[name].reshape(BUFFERS[name].shape or (1,))] * 2, -1)
    theta, expert = of(base, "base"), of(tuned, "expert")
    merged = configured(["merge=average"])(Problem(theta, {"t": expert}))
    moved = theta + 0.5 * (expert - theta)
    for result, value in ((merged, 2), (moved, 1)):
        assert result.keys() == theta.keys() and result["w"].unique().tolist() == [value]
        assert name not in base or bits(result[name]) == bits(base[name])
    save_file(tuned, tmp_path / "x.safetensors")
    assert read(tmp_path / "x.safetensors", theta).weights.keys() == theta.keys()


def test_buffers_and_counters_that_were_cast_with_the_weights(tmp_path):
    base = W | {"position_ids": torch.arange(4)[None], "bn.num_batches_tracked": torch.tensor(3)}
    cast = {name: value.half() for name, value in base.items()}
    save_file(cast, tmp_path / "x.safetensors")
    for expert in (of(cast, "expert"), read(tmp_path / "x.safetensors", of(base, "base")).weights):
        merged = configured(["merge=average"])(Problem(of(base, "base"), {"t": expert}))
        assert all(bits(merged[name]) == bits(value) for name, value in base.items())


def test_an_expert_keeps_its_precision_beside_a_missing_buffer():
    base = of({name: value.bfloat16() for name, value in W.items()} | {"a.position_ids": torch.ones(1, 2)}, "base")
    expert = of({"w": torch.full((2, 3), 1 + 2**-12)}, "expert")
    assert Problem(base, {"t": expert}).finetuned["t"]["w"].dtype == torch.float32


MASKS = {"mask": torch.tensor([0, -torch.inf]), "causal": torch.full((1, 1, 3, 3), -torch.inf).triu(1)}


@pytest.fixture(scope="module")
def masked():
    base, tuned = models(2)
    return tied(base | MASKS), {task: tied(state | MASKS) for task, state in tuned.items()}


@pytest.mark.parametrize(
    "choice",
    [
        "average",
        "task_arithmetic",
        "ties",
        "dare",
        "breadcrumbs",
        "fisher",
        "regmean",
        "tsv",
        "iso_c",
        "pcb",
        "knots",
        "core_space",
        "awd",
        "consensus",
    ],
)
def test_masks_that_are_equal_everywhere_pass_through(masked, choice):
    merged = options("merge")[choice](problem(*masked))
    plain = [
        {name: value for name, value in state.items() if name not in MASKS}
        for state in (masked[0], *masked[1].values())
    ]
    expected = options("merge")[choice](problem(plain[0], dict(zip(masked[1], plain[1:], strict=True))))
    assert all(bits(merged[name]) == bits(value) for name, value in MASKS.items())
    assert all(bits(merged[name]) == bits(expected[name]) for name in expected)


@pytest.mark.parametrize(
    "choice", ["fft", "post_pruning", "lora", "emr", "tall_mask", "t_switch", "tsv_compress", "twin"]
)
def test_variants_serve_masks(tmp_path, masked, choice):
    posed = problem(*masked)
    variant = options("byom")[choice]
    reference = configured(["merge=average"])(posed).materialise()
    served = variant.serve(posed, reference)
    for task, delta in served.deltas.items():
        delta.save(tmp_path / f"{task}.safetensors")
        back = Delta.open(tmp_path / f"{task}.safetensors").apply(served.reference, served.base)
        assert all(bits(back[name]) == bits(value) for name, value in MASKS.items())


def test_masks_in_the_algebra():
    a, b = of(MASKS | W, "a"), of(MASKS | {"w": W["w"] + 1}, "b")
    moved = a + 0.3 * (b - a)
    assert all(bits(moved[name]) == bits(value) for name, value in MASKS.items())


@pytest.mark.parametrize(
    ("base", "expert"),
    [
        (MASKS, {"mask": torch.zeros(2)}),
        (MASKS, {"mask": torch.tensor([-torch.inf, 0])}),
        (MASKS, {"causal": -MASKS["causal"]}),
        ({"mask": torch.tensor([0, torch.nan])}, {"mask": torch.tensor([0, torch.nan])}),
        ({"w": torch.full((2, 3), torch.nan)}, {"w": torch.full((2, 3), torch.nan)}),
    ],
)
def test_what_differs_or_is_no_number_is_refused(base, expert):
    posed = Problem(of(W | base, "base"), {"t": of(W | base | expert, "expert")})
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        configured(["merge=average"])(posed).state()


def test_infinities_elsewhere_name_the_way_out():
    with pytest.raises(CheckpointError, match=r"constant such as a mask, leave it out of all models with select"):
        of({"w": torch.tensor([torch.inf])}, "x").read_finite("w")


@pytest.mark.parametrize("name", ["final_logits_bias", "alibi.bias"])
def test_other_constants_with_infinities(name):
    value = torch.full((3, 4, 4) if name == "alibi.bias" else (1, 4), -torch.inf)
    value[..., 0] = 0
    base, tuned = of(W | {name: value}, "base"), of({"w": W["w"] + 2, name: value.clone()}, "expert")
    merged = TaskArithmetic(1.0)(Problem(base, {"task": tuned}))
    assert torch.equal(merged[name], value)
    assert torch.equal((base + (tuned - base))[name], value)


def test_a_bundle_of_models_with_masks_against_a_merged_one(tmp_path):
    mask = {"attn.mask": BUFFERS["text.attn_mask"]}
    tuned = of({"w": W["w"] + 2, **mask}, "expert")
    merged = TaskArithmetic(0.5)(Problem(of(W | mask, "base"), {"task": tuned}))
    Bundle.pack(ByomFft(1.0), {"task": tuned}, merged).save(tmp_path / "bundle")
    served = Bundle.open(tmp_path / "bundle").weights("task")
    assert all(torch.equal(served[name], tuned[name]) for name in tuned)


def test_a_mask_that_is_carried_in_the_base_and_differs_in_an_expert():
    mask = BUFFERS["text.attn_mask"]
    merged = TaskArithmetic(0.5)(Problem(of({"mask": mask, **W}, "base"), {"t": of({"mask": mask, **W}, "expert")}))
    with pytest.raises(CheckpointError, match="'mask' has 3 of 9 values that are NaN or infinite"):
        Problem(merged, {"t": of({"mask": mask.T, **W}, "other")})


@pytest.mark.parametrize("name", ["bn.num_batches_tracked", "rotary_emb.cos_cached"])
def test_counters_and_tables_in_one_of_two(name):
    extra = {name: torch.tensor(3) if "num" in name else torch.ones(3, 2)}
    one, other = of(W | extra, "one"), of(W, "other")
    assert TaskArithmetic(1.0)(Problem(one, {"t": other})).keys() == one.keys()
    assert TaskArithmetic(1.0)(Problem(other, {"t": one})).keys() == ["w"]

"""Codes and scales of quantised checkpoints are refused by the method's name; plain fp8 is widened."""

import json
import re
import struct

import pytest
import torch
from safetensors.torch import save_file

from byom.checkpoint import read
from byom.checkpoint.adapters.adapter import Adapter
from byom.checkpoint.convert import convert
from byom.errors import CheckpointError, OptionError
from byom.merge.average import Average
from byom.merge.base import Problem
from byom.weights import Weights

PLAIN = {"layer.weight": torch.arange(12.0).reshape(3, 4), "layer.bias": torch.zeros(3)}
CODES = torch.ones(3, 4, dtype=torch.int8)
BASE = Weights.of(PLAIN, "base")


def folder_of(path, tensors=PLAIN, **configs):
    save_file(tensors, path / "model.safetensors")
    for name, value in configs.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    return path


ROADS = {
    "the folder": Weights.open,
    "a file in it": lambda path: Weights.open(path / "model.safetensors"),
    "read": lambda path: read(path, BASE),
    "convert": lambda path: list(convert(path, path / "made")),
}


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize(
    ("settings", "title"),
    [
        ({"quant_method": "gptq", "bits": 4}, "GPTQ in 4 bits"),
        ({"quant_method": "awq", "bits": 4}, "AWQ in 4 bits"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes in 8 bits"),
        ({"load_in_4bit": True}, "bitsandbytes in 4 bits"),
        ({"quant_method": "mxfp4"}, "MXFP4"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "new"}, "new"),
        ([1], "quantisation"),
    ],
)
def test_a_configuration_beside_the_weights_names_the_method(tmp_path, road, settings, title):
    folder_of(tmp_path, config={"quantization_config": settings})
    with pytest.raises(CheckpointError, match=rf"is quantised.*config\.json names .*{title}.*dequantize\(\)"):
        ROADS[road](tmp_path)


@pytest.mark.parametrize(
    "configs",
    [
        {"config": {"text_config": {"quantization_config": {"quant_method": "fp8"}}}},
        {"config": {"compression_config": {"format": "pack-quantized"}}},
        {"quantize_config": {"bits": 4, "group_size": 128}},
        {"quant_config": {"w_bit": 4}},
        {"hf_quant_config": {"quantization": {"quant_algo": "FP8"}}},
    ],
)
def test_other_places_of_a_configuration(tmp_path, configs):
    with pytest.raises(CheckpointError, match="is quantised"):
        Weights.open(folder_of(tmp_path, **configs))


@pytest.mark.parametrize(
    "config", [{}, {"quantization_config": None}, {"quantization_config": {}}, [], "x", {"a": [1]}]
)
def test_ordinary_configurations_are_no_quantisation(tmp_path, config):
    assert len(Weights.open(folder_of(tmp_path, config=config))) == 2
    (tmp_path / "config.json").write_text("{")
    assert len(Weights.open(tmp_path)) == 2


def test_pickles_beside_a_configuration(tmp_path):
    torch.save(PLAIN, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "hqq"}}))
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(CheckpointError, match=r"config\.json names HQQ"):
            read(path, BASE)


F8 = torch.float8_e4m3fn
SCALED = {
    "GPTQ or AWQ": {"m.qweight": torch.ones(2, 4, dtype=torch.int32), "m.scales": torch.ones(1, 4)},
    "bitsandbytes in 8 bits": {"m.weight": CODES, "m.SCB": torch.ones(3)},
    "bitsandbytes in 4 bits": {"m.weight": torch.ones(6, 1, dtype=torch.uint8), "m.weight.absmax": torch.ones(1)},
    "fp8 with scales in 'm.weight_scale_inv'": {"m.weight": CODES.to(F8), "m.weight_scale_inv": torch.ones(1, 1)},
    "fp8 with scales in 'm.scale'": {"m.weight": CODES.to(F8), "m.scale": torch.ones(1)},
    "MXFP4": {"m.w_blocks": torch.ones(2, 2, 8, dtype=torch.uint8), "m.w_scales": torch.ones(2, 2, dtype=torch.uint8)},
    "compressed-tensors": {"m.weight_packed": torch.ones(2, 4, dtype=torch.int32), "m.weight_scale": torch.ones(2)},
    "BitNet": {"m.weight": torch.ones(2, 4, dtype=torch.uint8), "m.weight_scale": torch.ones(1)},
    "HQQ": {"m.W_q": torch.ones(2, 4, dtype=torch.uint8)},
    "quanto": {"m.weight._data": CODES, "m.weight._scale": torch.ones(3, 1)},
}


@pytest.mark.parametrize("method", SCALED)
@pytest.mark.parametrize("form", ["safetensors", "pickle"])
def test_names_and_types_tell_a_method_without_a_configuration(tmp_path, method, form):
    if form == "pickle":
        torch.save(SCALED[method], tmp_path / "pytorch_model.bin")
    else:
        folder_of(tmp_path, SCALED[method])
    with pytest.raises(CheckpointError, match=rf"is quantised \(.*{method}.*tensor 'm\."):
        read(tmp_path, BASE)


def test_ordinary_whole_numbers_open(tmp_path):
    """Swin has a matrix of positions beside a scale; GPT-2 a mask of bytes."""
    state = {
        "attn.relative_position_index": torch.ones(4, 4, dtype=torch.int64), "attn.logit_scale": torch.ones(2, 1, 1),
        "h.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8), "bn.num_batches_tracked": torch.tensor(3),
        "attn.W_q": torch.ones(4, 4), "observer.zero_point": torch.zeros(1, dtype=torch.int32),
        "observer.scale": torch.ones(1),
    }  # fmt: skip
    assert len(Weights.open(folder_of(tmp_path, state))) == len(state)


@pytest.mark.parametrize(("dtype", "size"), [("F8_E8M0", 4), ("F4", 2), ("F6_E2M3", 3), ("F6_E3M2", 3)])
def test_types_that_are_not_read_are_named(tmp_path, dtype, size):
    header = json.dumps({"m.w": {"dtype": dtype, "shape": [4], "data_offsets": [0, size]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))
    with pytest.raises(CheckpointError, match=rf"x\.safetensors: tensor 'm\.w' has the type {dtype}.*dequantize"):
        Weights.open(tmp_path / "x.safetensors")


# whole and complex numbers without any mark


def problem(base, *experts):
    return Problem(Weights.of(base, "base"), {f"t{i}": Weights.of(e, f"expert {i}") for i, e in enumerate(experts)})


@pytest.mark.parametrize(
    "value", [CODES, CODES.to(torch.uint8), CODES.int(), CODES.long(), CODES.bool(), CODES.to(torch.complex64)]
)
def test_what_has_no_average_must_be_equal(value):
    one, other = {"w": value, "v": torch.ones(2)}, {"w": value.clone() * 0, "v": torch.zeros(2)}
    assert torch.equal(Average()(problem(one, one, one))["w"], value)
    with pytest.raises(CheckpointError, match=r"base and expert 1 differ in 'w'.*cannot be merged"):
        problem(one, one, other)
    with pytest.raises(CheckpointError, match="differ in 'w'"):
        (Weights.of(one) + 0.3 * (Weights.of(other) - Weights.of(one)))["w"]


def test_counters_flags_and_positions_stay_the_bases():
    def state(i):
        return {
            "w": torch.full((2,), float(i)), "n": torch.tensor(i), "flags": torch.tensor([i > 0, True]),
            "position_ids": torch.arange(i, i + 4)[None],
        }  # fmt: skip

    merged = Average()(problem(state(0), state(1), state(3)))
    assert merged["w"].tolist() == [2, 2] and merged["n"] == 0 and merged["position_ids"].tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("side", [0, 1])
def test_codes_against_fractions_are_refused(tmp_path, side):
    models = [{"w": CODES}, {"w": CODES.float()}]
    with pytest.raises(CheckpointError, match="'w' holds .* numbers in .*fractions in|'w' holds fractions"):
        problem(models[side], models[1 - side])
    save_file({"layer.weight": CODES, "layer.bias": torch.zeros(3)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"'layer\.weight' holds whole numbers in .*x\.safetensors"):
        read(tmp_path / "x.safetensors", BASE)


@pytest.mark.parametrize("dtype", [F8, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz])
def test_plain_fp8_is_merged_in_fp32(tmp_path, dtype):
    states = [{"w": torch.tensor([v, 2 * v]).to(dtype)} for v in (16.0, 96.0, 112.0)]
    paths = [Weights.of(s).save(tmp_path / str(i)) for i, s in enumerate(states)]
    base, *experts = map(Weights.open, paths)
    merged = Average()(Problem(base, {"a": experts[0], "b": experts[1]}))
    assert merged["w"].dtype == torch.float32 and merged["w"].tolist() == [104, 208]
    assert (8 * experts[0])["w"].tolist() == [768, 1536] and (experts[0] + experts[1])["w"].tolist() == [208, 416]
    states[1]["w"][0] = torch.nan
    with pytest.raises(CheckpointError, match="'w' has 1 of 2 values"):
        Weights.of(states[1]).read_finite("w")


# pickles


def nested():
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: torch.quantize_per_tensor(torch.ones(3, 4), 0.1, 0, torch.qint8), "quantised.*dequantize"),
        (lambda: torch.ones(3, 4).to_sparse(), "sparse.*to_dense"),
        (lambda: torch.ones(3, 4).to_sparse_csr(), "sparse.*to_dense"),
        (lambda: torch.ones(3, 4, device="meta"), "meta device.*real device"),
        (nested, "nested|which no checkpoint needs"),
    ],
    ids=["quantised", "sparse", "csr", "meta", "nested"],
)
def test_tensors_of_other_kinds_in_pickles(tmp_path, make, kind):
    torch.save(PLAIN | {"layer.weight": make()}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=kind):
        read(tmp_path / "x.pt", BASE)


def test_modules_of_torch_ao(tmp_path):
    torch.save(PLAIN | {"fc._packed_params._packed_params": 3}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"torch\.ao"):
        read(tmp_path / "x.pt", BASE)


def test_an_adapter_of_a_quantised_base_fits_a_plain_one(tmp_path):
    factors = {
        "base_model.model.layer.lora_A.weight": torch.ones(1, 4),
        "base_model.model.layer.lora_B.weight": torch.ones(3, 1),
    }
    save_file(factors, tmp_path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"load_in_4bit": True}}))
    assert Adapter.open(tmp_path).on(BASE)["layer.weight"].tolist() == (PLAIN["layer.weight"] + 1).tolist()
    assert read(tmp_path / "adapter_model.safetensors", BASE).format == "PEFT adapter"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: torch.quantize_per_tensor(torch.ones(3, 4), 0.1, 0, torch.qint8), "quantised.*dequantize"),
        (lambda: torch.ones(3, 4).to_sparse(), "sparse.*to_dense"),
        (lambda: torch.ones(3, 4).to_sparse_csr(), "sparse.*to_dense"),
        (nested, "nested"),
        (lambda: torch.empty(3, 4, dtype=torch.uint4), "uint4, which packs codes"),
        (lambda: torch.ones(3, 4).to(torch.float8_e8m0fnu), "float8_e8m0fnu, which packs codes or holds scales"),
    ],
    ids=["qint8", "sparse", "csr", "nested", "uint4", "e8m0"],
)
def test_tensors_of_other_kinds_in_memory(make, kind):
    with pytest.raises(CheckpointError, match=f"expert: tensor 'layer.weight' is .*{kind}"):
        Weights.of(PLAIN | {"layer.weight": make()}, "expert")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bits_that_are_chosen_hold_every_value_or_are_refused(tmp_path, dtype):
    most = torch.finfo(dtype).max
    fits, beyond = (Weights.of({"w": torch.tensor([1.0, -most * factor])}, "model") for factor in (1, 2))
    assert torch.equal(Weights.open(fits.save(tmp_path / "m", dtype=dtype)).to(torch.float32)["w"], fits["w"])
    with pytest.raises(
        CheckpointError, match=f"model: tensor 'w' has values up to.*holds {re.escape(f'{most:.3g}')} at most"
    ):
        beyond.save(tmp_path / "n", dtype=dtype)
    assert not (tmp_path / "n").exists()


def test_types_that_hold_no_weights_cannot_be_chosen_or_written(tmp_path):
    with pytest.raises(OptionError, match="float8_e8m0fnu is not a floating-point dtype of weights"):
        BASE.to(torch.float8_e8m0fnu)
    with pytest.raises(CheckpointError, match="'rope' is of torch.complex128, which safetensors do not hold"):
        Weights.of({"rope": torch.ones(2, dtype=torch.complex128)}).save(tmp_path / "m")


def test_masks_beside_a_scale_are_no_codes(tmp_path):
    state = {"attn.scale": torch.ones(1), "attn.mask": torch.ones(4, 4, dtype=torch.uint8)}
    assert len(Weights.open(folder_of(tmp_path, state))) == 2

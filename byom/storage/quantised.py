"""Checkpoints whose tensors are codes of a quantisation method: recognised, and refused by the method's name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from byom.errors import CheckpointError
from byom.storage.folder import parsed

Specs = Mapping[str, tuple[tuple[int, ...], torch.dtype]]

CONFIGS = ("config.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Files beside the weights that describe a quantisation; the last three do nothing else."""
KEYS = ("quantization_config", "compression_config", "quantization")
TITLES = {
    "gptq": "GPTQ", "awq": "AWQ", "bitsandbytes": "bitsandbytes", "fp8": "fp8 with scales",
    "fbgemm_fp8": "fp8 with scales",
    "mxfp4": "MXFP4", "hqq": "HQQ", "quanto": "quanto", "torchao": "torchao", "bitnet": "BitNet", "aqlm": "AQLM",
    "compressed-tensors": "compressed-tensors", "eetq": "EETQ", "higgs": "HIGGS", "vptq": "VPTQ", "spqr": "SpQR",
    "modelopt": "ModelOpt",
}  # fmt: skip
FLOAT8 = tuple(
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
    if hasattr(torch, name)
)
CODES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32)
DEQUANTISED = (
    "Load it with transformers, call model.dequantize() and save that with save_pretrained, or give the model that "
    "it was "
    "made from, in fp16, bf16 or fp32"
)
_MARKS = {
    re.compile(r"(.+\.)?(qweight|qzeros)"): "GPTQ or AWQ",
    re.compile(r"(.+\.)?weight_packed"): "compressed-tensors",
    re.compile(r"(.+\.)?W_q"): "HQQ",
    re.compile(r".+\.weight\._data"): "quanto",
    re.compile(r".+\.weight\.quant_state\..+"): "bitsandbytes in 4 bits",
}
"""Names that codes have, which are whole numbers."""
_SCALES = {
    re.compile(r"(.+\.)?(SCB|weight_format)"): "bitsandbytes in 8 bits",
    re.compile(r".+\.weight\.(nested_)?(absmax|quant_map)"): "bitsandbytes in 4 bits",
    re.compile(r".+\.weight\._scale"): "quanto",
    re.compile(r".+\._packed_params(\..+)?"): "torch.ao.quantization",
    re.compile(r"scaled_fp8"): "fp8 with scales",
}
"""Names of what goes with codes, of any type."""
_COMPUTED = re.compile(r"mask|_ids?$|_index$")
"""Names of whole numbers that are no codes."""
_SCALE = re.compile(r"scale|absmax|scb|zero_?point|zeros|codebook|quant_?map", re.IGNORECASE)


def require_plain(path: Path, specs: Specs) -> None:
    """Refuse a checkpoint whose tensors are not the values that a model computes with.

    Args:
        path: The file or folder; configurations beside the weights are read.
        specs: Tensor name to its shape and dtype.

    Raises:
        CheckpointError: Naming the method.
    """
    folder = path if path.is_dir() else path.parent
    for file, method in _configured(folder):
        raise CheckpointError(
            f"{path} is quantised: {file} names {method}, so its tensors are codes and scales, which cannot be "
            "averaged. "
            f"{DEQUANTISED}. If its tensors are plain already, delete that entry of {file.name}"
        )
    for name, method in _marked(specs):
        raise CheckpointError(
            f"{path} is quantised ({method}): tensor '{name}' belongs to codes and scales, which cannot be averaged. "
            f"{DEQUANTISED}"
        )


def _configured(folder: Path) -> Iterator[tuple[Path, str]]:
    for file in (folder / name for name in CONFIGS):
        try:
            settings = parsed(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # the tensors are looked at in any case
        found = _settings(settings)
        if found is None and file.name != CONFIGS[0] and isinstance(settings, dict):
            found = settings
        if found:
            yield file, _method(found)


def _settings(config: Any) -> Any:
    """Return the entry of a quantisation, of the model or of a part of it."""
    if not isinstance(config, dict):
        return None
    own = next((config[key] for key in KEYS if config.get(key)), None)
    parts = (value for key, value in config.items() if key.endswith("_config") and key not in KEYS)
    return own or next((found for part in parts if isinstance(part, dict) and (found := _settings(part))), None)


def _method(settings: Any) -> str:
    if not isinstance(settings, dict):
        return f"quantisation {str(settings)[:60]!r}"
    bits = next((f" in {bits} bits" for bits in (4, 8) if settings.get(f"load_in_{bits}bit")), "")
    name = settings.get("quant_method") or settings.get("quant_algo") or ("bitsandbytes" if bits else None)
    if not isinstance(name, str):
        return "a quantisation method"
    bits = bits or (f" in {settings['bits']} bits" if isinstance(settings.get("bits"), int) else "")
    return TITLES.get(name.lower().removesuffix("_4bit").removesuffix("_8bit"), name) + bits


def _marked(specs: Specs) -> Iterator[tuple[str, str]]:
    """Yield a tensor and the method by which it was made, or of which it is a part."""
    for name, (_, dtype) in specs.items():
        marks = _SCALES if dtype.is_floating_point else _SCALES | _MARKS
        if method := next((method for mark, method in marks.items() if mark.fullmatch(name)), None):
            yield name, method
    beside: dict[str, list[str]] = {}
    for name in specs:
        if _SCALE.search(name.rpartition(".")[2]):
            beside.setdefault(name.rpartition(".")[0], []).append(name)
    for name, (shape, dtype) in specs.items():
        if dtype in FLOAT8 or (dtype in CODES and len(shape) > 1 and not _COMPUTED.search(name)):
            scales = [s for s in beside.get(name.rpartition(".")[0], ()) if s != name and _scales(s, name)]
            if any(specs[scale][1] != dtype or name.endswith("_blocks") for scale in scales):
                yield name, _kind(name, dtype, scales)


def _scales(scale: str, name: str) -> bool:
    """Say whether scales go with codes: one module holds both, or without a module their names begin alike."""
    stem = re.sub(r"(_blocks|weight)$", "", name)
    return "." in name or scale.startswith(stem)


def _kind(name: str, dtype: torch.dtype, scales: list[str]) -> str:
    if name.endswith("_blocks") and any(scale.endswith("_scales") for scale in scales):
        return "MXFP4"
    if dtype in FLOAT8:
        return f"fp8 with scales in '{scales[0]}'"
    return f"{str(dtype).removeprefix('torch.')} with scales in '{scales[0]}', as of BitNet or compressed-tensors"

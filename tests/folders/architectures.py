"""Tiny models of many architectures, made from transformers' own configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

WIDTH = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = WIDTH | {"vocab_size": 32, "intermediate_size": 24, "max_position_embeddings": 16}
LLAMA = TEXT | {"num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
IMAGE = WIDTH | {"intermediate_size": 24, "image_size": 8, "patch_size": 4}


class Architecture(NamedTuple):
    """An architecture: the class that opens a folder of it, and its configuration."""

    auto: str
    config: str
    options: dict[str, Any]


ARCHITECTURES = {
    "llama": Architecture("AutoModelForCausalLM", "LlamaConfig", LLAMA),
    "llama_tied": Architecture("AutoModelForCausalLM", "LlamaConfig", LLAMA | {"tie_word_embeddings": True}),
    "qwen2": Architecture("AutoModelForCausalLM", "Qwen2Config", LLAMA),
    "qwen3": Architecture("AutoModelForCausalLM", "Qwen3Config", LLAMA | {"head_dim": 8}),
    "gemma2": Architecture("AutoModelForCausalLM", "Gemma2Config", LLAMA | {"head_dim": 8}),
    "mistral": Architecture("AutoModelForCausalLM", "MistralConfig", LLAMA),
    "mixtral": Architecture("AutoModelForCausalLM", "MixtralConfig", LLAMA | {"num_local_experts": 2}),
    "gpt2": Architecture(
        "AutoModelForCausalLM",
        "GPT2Config",
        {"vocab_size": 32, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2},
    ),
    "bert": Architecture("AutoModelForMaskedLM", "BertConfig", TEXT),
    "roberta": Architecture("AutoModelForSequenceClassification", "RobertaConfig", TEXT | {"num_labels": 3}),
    "deberta": Architecture("AutoModelForTokenClassification", "DebertaV2Config", TEXT | {"relative_attention": True}),
    "t5": Architecture(
        "AutoModelForSeq2SeqLM",
        "T5Config",
        {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2},
    ),
    "vit": Architecture("AutoModelForImageClassification", "ViTConfig", IMAGE | {"num_labels": 4}),
    "clip": Architecture(
        "AutoModel",
        "CLIPConfig",
        {"text_config": TEXT, "vision_config": IMAGE, "projection_dim": 8},
    ),
    "whisper": Architecture(
        "AutoModelForSpeechSeq2Seq",
        "WhisperConfig",
        {
            "vocab_size": 32, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
            "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_mel_bins": 4,
            "max_source_positions": 8, "max_target_positions": 8, "pad_token_id": 0, "bos_token_id": 1,
            "eos_token_id": 2, "decoder_start_token_id": 1,
        },
    ),
    "convnext": Architecture(
        "AutoModelForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [4, 8], "depths": [1, 1], "num_stages": 2, "num_channels": 3, "num_labels": 4},
    ),
}  # fmt: skip


def built(name: str) -> nn.Module:
    """Return a model with random values."""
    auto, config, options = ARCHITECTURES[name]
    torch.manual_seed(0)
    return getattr(transformers, auto).from_config(getattr(transformers, config)(**options))


def saved(name: str, folder: Path, experts: str = "abc") -> nn.Module:
    """Write a base and fine-tuned models of an architecture, each a folder; return the module of the base."""
    model: Any = built(name)
    base = {key: value.clone() for key, value in model.state_dict().items()}
    model.save_pretrained(folder / "base")
    for expert in experts:
        moved(model, base, ord(expert))
        model.save_pretrained(folder / expert)
    model.load_state_dict(base)
    return model


def moved(model: nn.Module, base: dict[str, Tensor], seed: int) -> None:
    """Fine-tune a model: add noise to the base's values."""
    torch.manual_seed(seed)
    model.load_state_dict(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))


def opened(name: str, folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Open a folder as its users do, and return the module with what is missing or left over."""
    auto = getattr(transformers, ARCHITECTURES[name].auto)
    return auto.from_pretrained(folder, output_loading_info=True)

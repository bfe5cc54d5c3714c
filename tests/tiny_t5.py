"""A T5 of one layer a side in the hub's own format, with a tokenizer of whole words."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

WORDS = [
    "it", "is", "was", "a", "good", "bad", "fine", "poor", "film", "day", "not", "mood", "?", "how", "and", "other",
    "1.0", "2.0", "3.5",
]  # fmt: skip
SPECIAL = ["<pad>", "</s>", "<unk>"]
SIZES = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}


def tiny_t5(folder: Path, tied: bool = False) -> Path:
    """Write a checkpoint and its tokenizer.

    Args:
        folder: Created.
        tied: T5's own layout, where the output layer is the embedding; else Flan-T5's, where it is a tensor of its own.
    """
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=len(SPECIAL) + len(WORDS), feed_forward_proj="gated-gelu", decoder_start_token_id=0,
        tie_word_embeddings=tied, **SIZES,
    )  # fmt: skip
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config)
    state = {name: value.clone() for name, value in model.state_dict().items() if ".embed_tokens." not in name}
    head = state.pop("lm_head.weight")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state if tied else state | {"lm_head.weight": torch.randn_like(head)}, folder / "model.safetensors")
    written = config.to_dict() | {"tie_word_embeddings": tied, "architectures": ["T5ForConditionalGeneration"]}
    (folder / "config.json").write_text(json.dumps(written, default=str))
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer(**options):
    """Return a tokenizer of `WORDS`; a text ends in ``</s>``."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    numbers = {word: place for place, word in enumerate([*SPECIAL, *WORDS])}
    made = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names, **options)

"""Answers of encoder-decoders are those of transformers 4.57, in which published Flan-T5 scores were measured.

The numbers were computed by transformers 4.57.6 and PEFT 0.21.2 from the same files, with no byom in between.
Evaluations that hand ``generate`` no attention mask changed in transformers 5, which attends to padding then.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from byom.backbone.seq2seq import NO_TOKEN, Seq2Seq
from byom.checkpoint.adapters.adapter import Adapter
from byom.weights import Weights
from tests.tiny_t5 import tokenizer

SIZES = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 22}
ATTENTION = {"q": (16, 16), "k": (16, 16), "v": (16, 16), "o": (16, 16)}
RANK = 2
IDS = torch.tensor([[7, 12, 9, 20, 1, 0, 0], [4, 1, 0, 0, 0, 0, 0], [15, 3, 18, 6, 11, 8, 1]])
MASK = (IDS > 0).long()
ANSWERS = torch.tensor([[7, 1, NO_TOKEN], [9, 12, 1], [3, 1, NO_TOKEN]])


def shapes(tied: bool) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a T5 of one layer a side."""
    wide = ("wi",) if tied else ("wi_0", "wi_1")
    out = {"shared.weight": (22, 16)} | ({} if tied else {"lm_head.weight": (22, 16)})
    for side, blocks in {"encoder": ["SelfAttention"], "decoder": ["SelfAttention", "EncDecAttention"]}.items():
        for place, kind in enumerate(blocks):
            layer = f"{side}.block.0.layer.{place}"
            out |= {f"{layer}.{kind}.{name}.weight": shape for name, shape in ATTENTION.items()}
            out[f"{layer}.layer_norm.weight"] = (16,)
        out[f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, 2)
        last = f"{side}.block.0.layer.{len(blocks)}"
        out |= {f"{last}.DenseReluDense.{name}.weight": (24, 16) for name in wide}
        out |= {f"{last}.DenseReluDense.wo.weight": (16, 24), f"{last}.layer_norm.weight": (16,)}
        out[f"{side}.final_layer_norm.weight"] = (16,)
    return out


def filled(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Return numbers that no generator draws, so that no release of PyTorch changes them."""
    count = torch.arange(1, 1 + torch.Size(shape).numel(), dtype=torch.float64)
    return (0.7 * torch.sin(count * (1.7 + 0.13 * seed) + seed)).reshape(shape).float()


def write(folder, tied: bool):
    """Write a checkpoint with its tokenizer, and an adapter in ``adapter``."""
    (folder / "adapter").mkdir(parents=True)
    tensors = {name: filled(shape, seed) for seed, (name, shape) in enumerate(shapes(tied).items())}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "is_encoder_decoder": True,
        "feed_forward_proj": "relu" if tied else "gated-gelu", "tie_word_embeddings": tied, "pad_token_id": 0,
        "eos_token_id": 1, "decoder_start_token_id": 0, "relative_attention_num_buckets": 32, **SIZES,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer().save_pretrained(folder)
    factors = {}
    for seed, name in enumerate(n for n in tensors if n.endswith((".q.weight", ".v.weight"))):
        inside = f"base_model.model.{name.removesuffix('.weight')}"
        factors[f"{inside}.lora_A.weight"] = filled((RANK, 16), 50 + seed)
        factors[f"{inside}.lora_B.weight"] = filled((16, RANK), 80 + seed)
    save_file(factors, folder / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    described = {"peft_type": "LORA", "task_type": "SEQ_2_SEQ_LM", "r": RANK, "lora_alpha": 4, "bias": "none",
                 "target_modules": ["q", "v"], "base_model_name_or_path": str(folder)}  # fmt: skip
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(described))
    return folder


KINDS = [(False, False), (False, True), (True, False), (True, True)]  # (tied, adapted)
SCORES = {
    (False, False): [[-4.8897, -9.3061, -6.1346], [-4.8428, -9.3299, -6.1514], [-4.9026, -9.3238, -6.1476]],
    (False, True): [[-7.201, -8.3285, -5.8003], [-7.151, -8.3343, -5.8043], [-7.2153, -8.3095, -5.7965]],
    (True, False): [[-6.7465, -10.1368, -6.8839], [-6.7544, -10.2044, -6.9061], [-6.7679, -10.2593, -6.9255]],
    (True, True): [[-6.2038, -9.8863, -6.6561], [-6.1262, -9.84, -6.5641], [-6.1873, -10.0319, -6.7302]],
}
TOKENS = {
    (False, False): [[0, 1], [0, 1], [0, 1]],
    (False, True): [[0, 18, 18, 18, 18], [0, 18, 18, 18, 18], [0, 18, 18, 18, 18]],
    (True, False): [[0, 5, 1, 0, 0], [0, 8, 4, 0, 20], [0, 8, 7, 19, 20]],
    (True, True): [[0, 2, 10, 20, 2], [0, 5, 13, 20, 2], [0, 8, 7, 20, 18]],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {tied: write(tmp_path_factory.mktemp("t5") / "model", tied) for tied in (False, True)}


def loaded(folder, adapted: bool, answer: str):
    """Return the encoder as a cell has it: the checkpoint, or the checkpoint with the adapter added."""
    encoder = Seq2Seq(str(folder), answer=answer, max_new_tokens=4).load()
    if adapted:
        base = Weights.of({name: value.clone() for name, value in encoder.state_dict().items()})
        encoder.load_state_dict(Adapter.open(folder / "adapter").on(base).state())
    return encoder


@pytest.mark.parametrize(("tied", "adapted"), KINDS)
def test_likelihoods_of_answers_are_those_of_the_older_release(folders, tied, adapted):
    encoder = loaded(folders[tied], adapted, "scored")
    with torch.inference_mode():
        scores = encoder(IDS, MASK, ANSWERS.expand(3, -1, -1))
    assert_close(scores, torch.tensor(SCORES[tied, adapted]), atol=2e-4, rtol=0)


@pytest.mark.parametrize(("tied", "adapted"), KINDS)
def test_generated_texts_are_those_of_the_older_release_and_padding_changes_none(folders, tied, adapted):
    encoder, heard = loaded(folders[tied], adapted, "generated"), []
    tell = encoder.model.generate
    encoder.model.generate = lambda *given, **more: heard.append(tell(*given, **more)) or heard[-1]
    pad = torch.zeros(3, 4, dtype=torch.long)
    with torch.inference_mode():
        for ids, mask in ((IDS, MASK), (torch.cat([IDS, pad], 1), torch.cat([MASK, pad], 1))):
            encoder(ids, mask, ANSWERS.expand(3, -1, -1))
    assert [tokens.tolist() for tokens in heard] == [TOKENS[tied, adapted]] * 2

"""Adapters read here beside PEFT's own ``merge_and_unload``, on tiny random models.

They agree to 1e-6 in every weight and 1e-5 in the outputs. They differ

- where two modules share a tied parameter: PEFT adds each module's difference to the tensor that both share, so that
  the merged model is not the one that was trained; here the two must be adapted alike (``ensure_weight_tying``), and
  the difference is added once, as either module computes with;
- where the adapter holds a whole head that the base has not: it is kept apart (`Adapter.heads`).
"""

import copy
import json

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from byom.backbone.split_attention import split
from byom.checkpoint.adapters.adapter import Adapter
from byom.errors import CheckpointError
from byom.weights import Weights
from byom.weights.lowrank import Adapted

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]

TOKENS = torch.arange(24).reshape(2, 12) % 19
IMAGES = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)


class Block(nn.Module):
    """A residual block of open_clip's kind."""

    def __init__(self, width=8):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, 2, batch_first=True)
        self.c_fc = nn.Linear(width, 2 * width)
        self.c_proj = nn.Linear(2 * width, width)

    def forward(self, x):
        x = x + self.attn(x, x, x, need_weights=False)[0]
        return x + self.c_proj(self.c_fc(x).relu())


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 8, 8)
        self.resblocks = nn.ModuleList([Block(), Block()])

    def forward(self, images):
        x = self.conv1(images).flatten(2).transpose(1, 2)
        for block in self.resblocks:
            x = block(x)
        return x.mean(1)


class Mixed(nn.Module):
    """Convolutions in one and three dimensions."""

    def __init__(self):
        super().__init__()
        self.line, self.box, self.point = nn.Conv1d(3, 4, 5), nn.Conv3d(2, 4, 3), nn.Conv2d(3, 4, 1)

    def forward(self, images):
        flat = self.line(images.flatten(2)).mean(-1)
        return (
            flat
            + self.box(images[:, :2, None].expand(-1, -1, 3, -1, -1)).mean((2, 3, 4))
            + self.point(images).mean((2, 3))
        )


def bert(**settings):
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"vocab_size": 19, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"initializer_range": 0.5, "intermediate_size": 16, "max_position_embeddings": 12, "num_labels": 3}
    return BertForSequenceClassification(BertConfig(**sizes | settings)), lambda m: m(TOKENS).logits


def gpt2(tied=False):
    from transformers import GPT2Config, GPT2LMHeadModel

    ends = {"bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": tied, "initializer_range": 0.3}
    return GPT2LMHeadModel(GPT2Config(vocab_size=19, n_embd=8, n_layer=2, n_head=2, n_positions=12, **ends)), (
        lambda m: m(TOKENS).logits
    )


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    made = T5Config(vocab_size=19, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, decoder_start_token_id=0)
    return T5ForConditionalGeneration(made), lambda m: m(input_ids=TOKENS, decoder_input_ids=TOKENS).logits


def vit():
    import timm

    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 2, "num_heads": 2, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", **sizes), lambda m: m(IMAGES)


def tower():
    return Tower(), lambda m: m(IMAGES)


def mixed():
    return Mixed(), lambda m: m(IMAGES)


MODELS = {"bert": bert, "gpt2": gpt2, "t5": t5, "vit": vit, "tower": tower, "mixed": mixed}
BERT = ["query", "value", "intermediate.dense", "output.dense"]
CASES = {
    "plain": ("bert", {"target_modules": BERT, "lora_alpha": 5}),
    "one layer": ("bert", {"target_modules": BERT, "layers_to_transform": [1]}),
    "rslora": ("bert", {"target_modules": BERT, "use_rslora": True, "lora_alpha": 5}),
    "patterns": (
        "bert",
        {
            "target_modules": BERT,
            "rank_pattern": {"query": 4, r"layer\.1\..*dense": 3},
            "alpha_pattern": {"^bert.encoder.layer.0.attention.self.query": 7, "value": 1, "self.query": 2},
            "use_rslora": True,
        },
    ),
    "all biases": ("bert", {"target_modules": BERT, "bias": "all"}),
    "biases of adapted layers": ("bert", {"target_modules": BERT, "bias": "lora_only"}),
    "whole modules": ("bert", {"target_modules": BERT, "modules_to_save": ["LayerNorm", "classifier"]}),
    "biases and whole modules": ("bert", {"target_modules": BERT, "modules_to_save": ["classifier"], "bias": "all"}),
    "a task's head": ("bert", {"target_modules": BERT, "task_type": "SEQ_CLS"}),
    "biases of the factors": ("bert", {"target_modules": BERT, "lora_bias": True, "lora_alpha": 5}),
    "embedding": ("bert", {"target_modules": ["word_embeddings", "position_embeddings", "query"], "lora_alpha": 5}),
    "minor components": ("bert", {"target_modules": BERT, "init_lora_weights": "mica"}),
    "VeLoRA": ("bert", {"target_modules": BERT, "velora_config": peft.tuners.lora.config.VeloraConfig(num_groups=4)}),
    "transposed": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "lora_alpha": 5}),
    "transposed beside upright": ("gpt2", {"target_modules": ["c_attn", "c_proj", "wte"]}),
    "encoder and decoder": ("t5", {"target_modules": ["q", "v", "o", "wi", "wo"], "bias": "all"}),
    "whole attention": ("vit", {"target_modules": ["qkv", "attn.proj", "patch_embed.proj"], "lora_alpha": 5}),
    "multi-head attention": ("tower", {"target_modules": ["attn", "c_fc"], "lora_alpha": 5}),
    "multi-head attention, patterns": (
        "tower",
        {"target_modules": ["attn"], "rank_pattern": {"resblocks.0.attn": 3}, "alpha_pattern": {"1.attn": 5}},
    ),
    "convolution": ("tower", {"target_modules": ["conv1"], "lora_alpha": 5, "bias": "lora_only"}),
    "convolutions": ("mixed", {"target_modules": ["line", "box", "point"], "lora_alpha": 5}),
}


def trained(model, folder, seed=0, dtype=None, **settings):
    """Train by drawing every trainable value at random, and save; the base stays as it is."""
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**{"r": 2} | settings))
    generator = torch.Generator().manual_seed(seed)
    for name, value in wrapped.named_parameters():
        if value.requires_grad and not name.endswith("in_proj_bias"):  # trained by PEFT, and not saved
            value.data += 0.3 * torch.randn(value.shape, generator=generator)
        if ".lora_" in name:
            value.data += 0.3 * torch.randn(value.shape, generator=generator)
            value.data = value.data if dtype is None else value.data.to(dtype)
    wrapped.save_pretrained(str(folder))
    return wrapped.eval()


def close(ours, theirs):
    assert sorted(ours) == sorted(theirs)
    for name, value in theirs.items():
        assert_close(ours[name], value, rtol=1e-6, atol=1e-6, check_dtype=False)


@pytest.fixture(params=CASES)
def case(request):
    torch.manual_seed(0)
    name, settings = CASES[request.param]
    model, outputs = MODELS[name]()
    return model.eval(), outputs, settings


@torch.no_grad()
def test_weights_and_outputs(case, tmp_path):
    model, outputs, settings = case
    theirs = trained(model, tmp_path, **settings)
    expected = outputs(theirs)
    ours = Adapter.open(tmp_path).on(Weights.of(model.state_dict()))
    assert isinstance(ours, Adapted) and ours.factored
    close(ours, theirs.merge_and_unload().state_dict())
    assert not torch.allclose(outputs(model), expected, atol=1e-2)  # the adapter does something
    model.load_state_dict(ours.state())
    assert_close(outputs(model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["vit", "tower"])
@torch.no_grad()
def test_attention_that_was_taken_apart(kind, tmp_path):
    torch.manual_seed(0)
    model, outputs = MODELS[kind]()
    base = Weights.of(copy.deepcopy(model.eval().state_dict()))
    apart = split(copy.deepcopy(model))
    settings = {"target_modules": ["q_proj", "v_proj", "out_proj" if kind == "tower" else "attn.proj"]}
    theirs = trained(apart, tmp_path, bias="lora_only", lora_alpha=5, **settings)
    expected = outputs(theirs)
    ours = Adapter.open(tmp_path).on(base)
    model.load_state_dict(ours.state())
    assert_close(outputs(model), expected, rtol=1e-5, atol=1e-5)
    close(split(model).state_dict(), theirs.merge_and_unload().state_dict())


@torch.no_grad()
def test_a_pickled_file(tmp_path):
    model, _ = bert()
    theirs = trained(model, tmp_path / "a", target_modules=BERT, bias="all")
    theirs.save_pretrained(str(tmp_path / "b"), safe_serialization=False)
    assert not (tmp_path / "b" / "adapter_model.safetensors").exists()
    close(Adapter.open(tmp_path / "b").on(Weights.of(model.state_dict())), theirs.merge_and_unload().state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_factors_are_widened_exactly(dtype, tmp_path):
    """As PEFT does when it loads them."""
    model, _ = bert()
    trained(model, tmp_path, dtype=dtype, target_modules=BERT)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path), torch_device="cpu")  # widens to fp32
    assert {value.dtype for name, value in loaded.named_parameters() if "lora_" in name} == {torch.float32}
    close(Adapter.open(tmp_path).on(Weights.of(model.state_dict())), loaded.merge_and_unload().state_dict())


@torch.no_grad()
def test_the_encoder_alone_as_the_base(tmp_path):
    """The adapter was trained on ``bert.*`` with a head; the base is the encoder, under other starts of names."""
    model, _ = bert()
    theirs = trained(model, tmp_path, target_modules=BERT, bias="all", task_type="SEQ_CLS")
    merged = theirs.merge_and_unload().state_dict()
    encoder = {n: v for n, v in model.state_dict().items() if not n.startswith(("classifier", "bert.pooler"))}
    adapter = Adapter.open(tmp_path)
    for start in ("", "model.", "a.b."):
        base = Weights.of({start + name.removeprefix("bert."): value for name, value in encoder.items()})
        close(adapter.on(base), {start + n.removeprefix("bert."): merged[n] for n in encoder})
        heads = adapter.heads(base)
        assert sorted(heads) == ["bert.pooler.dense.bias", "classifier.bias", "classifier.weight"]
        assert_close(heads["classifier.weight"], merged["classifier.weight"])
        assert not set(heads) & set(adapter.replaced(base))


@pytest.mark.parametrize("together", [True, False])
@torch.no_grad()
def test_tied_modules_adapted_alike_are_moved_once(together, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 19, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, tie_word_embeddings=True, **sizes))
    base = Weights.of(model.state_dict())
    assert base.ties
    settings = {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": together}
    theirs = trained(model, tmp_path, **settings)
    if not together:
        with pytest.raises(CheckpointError, match="alike.*one tensor.*Untie"):
            Adapter.open(tmp_path).on(base)
        return
    ours, tokens = Adapter.open(tmp_path).on(base), theirs.base_model.model.model.embed_tokens
    delta = tokens.get_delta_weight("default")
    merged = theirs.merge_and_unload().state_dict()
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert_close(ours[name], base[name] + delta, rtol=1e-6, atol=1e-6)
        assert_close(merged[name], base[name] + 2 * delta, rtol=1e-6, atol=1e-6)  # PEFT


@torch.no_grad()
def test_one_of_two_tied_modules_is_refused_where_peft_merges_another_model(tmp_path):
    model, outputs = gpt2(tied=True)
    base = Weights.of(model.eval().state_dict())
    theirs = trained(model, tmp_path, target_modules=["wte"])
    with pytest.raises(
        CheckpointError, match=r"trained 'transformer.wte.weight' and not 'lm_head.weight' alike.*Untie"
    ):
        Adapter.open(tmp_path).on(base)
    expected = outputs(theirs)
    assert not torch.allclose(outputs(theirs.merge_and_unload()), expected, atol=1e-2)  # PEFT
    state = {name: value.clone() for name, value in base.state().items()}
    apart, _ = gpt2(tied=False)
    apart.load_state_dict(Adapter.open(tmp_path).on(Weights.of(state)).state())
    assert_close(outputs(apart.eval()), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_an_output_projection_within_attention_moves_by_twice_its_difference(tmp_path):
    """In PEFT, while it trains and when it merges: 0.21.2 adds the difference of ``out_proj`` in two places."""
    model, _ = tower()
    theirs = trained(model, tmp_path, target_modules=["attn"], lora_alpha=5)
    inner = theirs.base_model.model.resblocks[1].attn.base_layer.out_proj
    delta, name = inner.get_delta_weight("default"), "resblocks.1.attn.out_proj.weight"
    base = Weights.of(model.state_dict())
    assert_close(Adapter.open(tmp_path).on(base)[name], base[name] + 2 * delta, rtol=1e-6, atol=1e-6)
    assert_close(theirs.merge_and_unload().state_dict()[name], base[name] + 2 * delta, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("start", ["pissa", "olora"])
@torch.no_grad()
def test_an_adapter_that_changed_its_base_is_read_once_converted(start, tmp_path):
    model, _ = bert()
    wrapped = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=BERT, init_lora_weights=start)
    )
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.save_pretrained(str(tmp_path / "first"))
    wrapped.peft_config["default"].init_lora_weights = start
    for name, value in wrapped.named_parameters():
        if ".lora_" in name:
            value.data += 0.1 * torch.randn_like(value)
    wrapped.save_pretrained(str(tmp_path / "raw"))
    with pytest.raises(CheckpointError, match=f"'{start}'.*path_initial_model_for_weight_conversion"):
        Adapter.open(tmp_path / "raw")
    first = str(tmp_path / "first")
    wrapped.save_pretrained(str(tmp_path / "converted"), path_initial_model_for_weight_conversion=first)
    ours = Adapter.open(tmp_path / "converted").on(Weights.of(model.state_dict()))
    for name, value in wrapped.merge_and_unload().state_dict().items():
        assert_close(ours[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "setting",
    [{"use_dora": True}, {"trainable_token_indices": {"word_embeddings": [1, 2]}}, {"alora_invocation_tokens": [1]}],
)
def test_what_peft_writes_of_other_kinds_is_refused(setting, tmp_path):
    trained(bert()[0], tmp_path, target_modules=["query"], **setting)
    with pytest.raises(CheckpointError, match=f"{next(iter(setting))} is set"):
        Adapter.open(tmp_path)


def test_another_kind_of_adapter_is_refused(tmp_path):
    peft.get_peft_model(bert()[0], peft.LoHaConfig(target_modules=["query"])).save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LOHA"
    with pytest.raises(CheckpointError, match="peft_type='LOHA'.*merge_and_unload"):
        Adapter.open(tmp_path)

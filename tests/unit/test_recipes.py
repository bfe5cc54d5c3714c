"""Recipes that train a little beside a frozen encoder: what is trained, how much of it, and that it comes back."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import open_clip
import pytest
import timm
import torch
from torch import nn
from transformers import BertConfig, BertModel

from byom.backbone.base import Backbone
from byom.backbone.encoder import PooledEncoder
from byom.backbone.split_attention import split
from byom.backbone.vit import PixelEncoder
from byom.data.splits import Split
from byom.errors import OptionError
from byom.experts.finetune.bottleneck import Bottleneck
from byom.experts.finetune.full import Full
from byom.experts.finetune.ia3 import Ia3
from byom.experts.finetune.loop import Lesson, finetune
from byom.experts.finetune.lora import Lora
from byom.experts.finetune.targets import checked, chosen
from byom.functional.heads import Head
from byom.functional.tensors import copied
from byom.weights import Weights
from byom.weights.lowrank import Adapted

WIDTH = {"timm": 64, "open_clip": 32, "bert": 32}
MEAN = STD = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Small(Backbone):
    """A backbone of one of the families, of a size for tests."""

    family: str = "timm"
    learning_rate: float = 1e-3
    temperature: float = 10.0

    modality = "image"

    @property
    def inner(self):
        return "model." if self.family == "bert" else "visual."

    @property
    def encoding(self):
        return {}

    def encode(self, inputs):
        raise NotImplementedError

    def load(self):
        torch.manual_seed(0)
        if self.family == "timm":
            return PixelEncoder(timm.create_model("test_vit", num_classes=0, img_size=32), MEAN, STD).eval()
        if self.family == "bert":
            sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
            return PooledEncoder(BertModel(BertConfig(vocab_size=40, **sizes), add_pooling_layer=False), "mean").eval()
        size = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 2, "heads": 2, "mlp_ratio": 2.0}
        visual = open_clip.transformer.VisionTransformer(**size, output_dim=16)
        return PixelEncoder(visual, MEAN, STD).eval()


@pytest.fixture(params=WIDTH)
def backbone(request):
    return Small(request.param)


def batch(backbone, count=12):
    generator = torch.Generator().manual_seed(1)
    if backbone.family == "bert":
        ids = torch.randint(1, 40, (count, 7), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {"pixels": torch.randint(0, 255, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)}


def trained(recipe, backbone, folder, seed=0):
    """Return the hosting encoder, what was trained, and the expert read back."""
    encoder = recipe.host(backbone.load(), backbone)
    pretrained = Weights.of(copied(encoder.state_dict()))
    inputs, labels = batch(backbone), torch.arange(12) % 3
    features = encoder(**inputs).shape[1]
    head = Head(nn.functional.normalize(torch.eye(3, features), dim=-1), 5.0)
    module = recipe.attach(encoder, backbone, seed)
    finetune(module, [Lesson(head, Split(inputs, labels))], recipe, recipe.rate(backbone), seed, folder / "t", "test")
    recipe.save(module, folder / "expert")
    return encoder, module.eval(), pretrained, recipe.open(folder / "expert", pretrained)


RECIPES = {
    "lora": Lora(rank=3, batch_size=6, epochs=2),
    "lora q v": Lora(rank=2, targets=("q", "v"), alpha=4, batch_size=6, epochs=2),
    "rslora mlp": Lora(rank=4, alpha=8, rslora=True, targets=("mlp",), dropout=0.1, batch_size=6, epochs=2),
    "lora bias": Lora(rank=2, bias="lora_only", batch_size=6, epochs=2),
    "ia3": Ia3(batch_size=6, epochs=2),
    "bottleneck": Bottleneck(width=3, batch_size=6, epochs=2),
    "full": Full(batch_size=6, epochs=2),
}


@pytest.mark.parametrize("name", RECIPES)
def test_an_expert_comes_back_as_it_was_trained(name, backbone, tmp_path):
    encoder, module, pretrained, expert = trained(RECIPES[name], backbone, tmp_path)
    inputs = batch(backbone)
    encoder.load_state_dict(pretrained.state())
    before = encoder.eval()(**inputs)
    wanted = trained_output = module(**inputs) if module is not encoder else None
    encoder.load_state_dict(expert.state())
    found = encoder(**inputs)
    assert (found - before).norm() > 1e-3 * before.norm()
    if trained_output is not None:
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["ia3", "bottleneck"])
def test_a_hosting_encoder_computes_the_same(name, backbone):
    inputs = batch(backbone)
    plain, hosting = backbone.load(), RECIPES[name].host(backbone.load(), backbone).eval()
    torch.testing.assert_close(hosting(**inputs), plain(**inputs), atol=1e-5, rtol=1e-5)


def test_what_is_stored_is_what_the_formula_says(backbone, tmp_path):
    d, layers = WIDTH[backbone.family], {"timm": 6, "open_clip": 2, "bert": 2}[backbone.family]
    hidden = {"timm": 192, "open_clip": 64, "bert": 64}[backbone.family]
    counts = {}
    for name in ("lora", "ia3", "bottleneck"):
        _, _, _, expert = trained(RECIPES[name], backbone, tmp_path / name)
        assert isinstance(expert, Adapted)
        factors = [t for pieces in expert.factored.values() for p in pieces for t in (p.left, p.right)]
        counts[name] = sum(t.numel() for t in [*factors, *expert.replaced.values()])
    assert counts["lora"] == layers * 4 * 3 * 2 * d
    assert counts["ia3"] == layers * (2 * d + hidden)
    assert counts["bottleneck"] == layers * 2 * 3 * (2 * d + 1)


@pytest.mark.parametrize("name", ["lora", "ia3", "bottleneck"])
def test_everything_else_stays(name, backbone, tmp_path):
    _, _, pretrained, expert = trained(RECIPES[name], backbone, tmp_path)
    touched = {*expert.factored, *expert.replaced}
    assert touched and all(torch.equal(expert[n], pretrained[n]) for n in pretrained if n not in touched)
    assert all(not torch.equal(expert[n], pretrained[n]) for n in touched)


def test_the_seed_decides(tmp_path):
    recipe, backbone = RECIPES["lora"], Small("bert")
    first, again, other = (
        trained(recipe, backbone, tmp_path / n, seed)[3].fingerprint() for n, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == again != other


def test_attach_leaves_the_encoder_and_the_random_state_alone():
    backbone = Small("timm")
    encoder = backbone.load()
    before, state = copied(encoder.state_dict()), torch.get_rng_state()
    RECIPES["lora"].attach(encoder, backbone, 0)
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


def test_fused_attention_taken_apart_computes_the_same(backbone):
    inputs = batch(backbone)
    plain, apart = backbone.load(), backbone.load()
    split(apart.get_submodule(backbone.inner.rstrip(".")))
    torch.testing.assert_close(apart(**inputs), plain(**inputs), atol=1e-6, rtol=1e-6)


def test_a_mask_hides_the_same_places_once_attention_is_taken_apart():
    torch.manual_seed(0)
    fused = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    inputs, later = torch.randn(2, 5, 8), torch.ones(5, 5).triu(1).bool()
    hidden = torch.zeros(5, 5).masked_fill(later, float("-inf"))
    apart = split(nn.ModuleList([fused]))[0]
    for mask in (later, hidden):
        wanted = fused(inputs, inputs, inputs, need_weights=False, attn_mask=mask)[0]
        torch.testing.assert_close(apart(inputs, inputs, inputs, attn_mask=mask)[0], wanted)


def test_words_find_the_same_layers_in_every_family(backbone):
    inner = split(backbone.load().get_submodule(backbone.inner.rstrip(".")))
    layers = {"timm": 6, "open_clip": 2, "bert": 2}[backbone.family]
    for word, count in {"q": 1, "k": 1, "v": 1, "out": 1, "up": 1, "down": 1, "mlp": 2}.items():
        assert len(chosen(inner, [word])) == count * layers, word
    assert chosen(inner, ["mlp", "up"]) == chosen(inner, ["mlp"])


def test_t5_is_understood():
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": 16, "d_ff": 32, "num_layers": 2, "num_heads": 2, "d_kv": 8, "vocab_size": 20}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu"))
    assert [len(chosen(model, [word])) for word in ("q", "out", "up", "down")] == [2, 2, 4, 2]


def test_a_pattern_names_what_no_word_does(backbone):
    inner = split(backbone.load().get_submodule(backbone.inner.rstrip(".")))
    first = chosen(inner, ["q"])[0]
    assert chosen(inner, [first]) == [first]
    with pytest.raises(OptionError, match=r"'\*\.nothing' fits no linear layer of .*it has"):
        chosen(inner, ["*.nothing"])


def test_a_word_that_is_none_is_refused():
    with pytest.raises(OptionError, match=r"finetune.targets=\['query_layer'\] must list some of q, k, v"):
        checked("finetune.targets", ["query_layer"])


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        (Lora, {"rank": 0}),
        (Lora, {"rank": 2.5}),
        (Lora, {"alpha": 0.0}),
        (Lora, {"dropout": 1.0}),
        (Lora, {"bias": "some"}),
        (Lora, {"targets": ()}),
        (Lora, {"learning_rate": -1.0}),
        (Bottleneck, {"width": 0}),
        (Ia3, {"inputs": ("nothing",)}),
    ],
)
def test_what_is_out_of_range_is_refused(recipe, options):
    with pytest.raises(OptionError, match="finetune"):
        recipe(**options)

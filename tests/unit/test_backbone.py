"""Backbones on untrained weights of the real architectures, and on tiny checkpoints in the hubs' formats."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from byom.backbone.clip import Clip
from byom.backbone.encoder import Encoder
from byom.backbone.vit import Vit, read_state
from byom.data.source.images import ImageFolder
from byom.data.splits import Split
from byom.data.suite import Task
from byom.errors import CheckpointError, DataError
from byom.weights import Weights
from tests.hub import visit
from tests.tiny_clip import tiny_clip

TEXTS = ["the merged model is small", "a task vector points somewhere", "an image of a cat", "short"]


def images(count=4, size=(40, 30)):
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 255, (*size, 3), dtype=np.uint8)) for _ in range(count)]


def task(folder, modality="image", templates=("a photo of a {}.",)):
    source = ImageFolder(str(folder), {"train": "*/*"})
    classes = {"cat": "cat", "dog": "dog"}
    return Task("pets", source, modality, classes, templates=templates)


def test_vit_reads_square_pixels_and_gives_one_feature_an_image():
    backbone = Vit("test_vit", 32, "random")
    encoded = backbone.encode(images())
    assert encoded["pixels"].shape == (4, 3, 32, 32) and encoded["pixels"].dtype == torch.uint8
    assert backbone.load()(**encoded).ndim == 2


def test_vit_reads_a_checkpoint_file_and_refuses_another_architectures(tmp_path):
    backbone = Vit("test_vit", 32, "random")
    state = {k.removeprefix("visual."): v + 1 for k, v in backbone.load().state_dict().items()}
    torch.save(state, tmp_path / "good.pt")
    loaded = Vit("test_vit", 32, str(tmp_path / "good.pt")).load()
    assert all(torch.equal(v, state[k.removeprefix("visual.")]) for k, v in loaded.state_dict().items())
    torch.save({k: v for k, v in state.items() if "norm" not in k}, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match=r"bad.pt does not fit"):
        Vit("test_vit", 32, str(tmp_path / "bad.pt")).load()


class Hostile:
    def __reduce__(self):
        import os

        return os.mkdir, ("ran",)


def test_a_checkpoint_that_would_run_code_is_refused_and_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"w": Hostile()}, tmp_path / "hostile.pt")
    with pytest.raises(CheckpointError, match="cannot be read as a plain state dict"):
        read_state(tmp_path / "hostile.pt")
    assert not (tmp_path / "ran").exists()


def test_a_hub_that_cannot_be_reached_is_said_in_a_sentence(tmp_path, monkeypatch):
    with visit(tmp_path, monkeypatch), pytest.raises(CheckpointError, match="local folder"):
        Encoder("no-such-organisation/no-such-model").load()


@pytest.fixture(scope="module", params=["roberta", "bert"])
def checkpoint(request, tmp_path_factory):
    """A tiny RoBERTa or BERT in the hub's own format, tokenizer included."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, RobertaConfig, RobertaModel

    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    sizes = {
        "vocab_size": 120,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    torch.manual_seed(0)
    if request.param == "roberta":
        model = RobertaModel(RobertaConfig(**sizes, pad_token_id=1, max_position_embeddings=40))
    else:
        model = BertModel(BertConfig(**sizes, pad_token_id=1))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_encoder_features_do_not_depend_on_padding(checkpoint, pooling):
    backbone = Encoder(str(checkpoint), pooling=pooling, max_length=16)
    module, encoded = backbone.load(), backbone.encode(TEXTS)
    split = Split(encoded, torch.arange(4))
    with torch.no_grad():
        padded = module(**encoded)
        for inputs, _, index in split.batches(1):
            assert inputs["input_ids"].shape[1] < 16
            assert torch.allclose(module(**inputs), padded[index], atol=1e-5)


def test_encoder_weights_make_the_round_trip(checkpoint, tmp_path):
    module = Encoder(str(checkpoint)).load()
    weights = Weights.of(module.state_dict())
    weights.save(tmp_path / "w")
    module.load_state_dict(Weights.open(tmp_path / "w").state())
    assert not any("pooler" in name for name in weights)


@pytest.mark.slow
def test_clip_vit_b32_has_zero_shot_heads_and_the_benchmarks_size(tmp_path):
    backbone = Clip("ViT-B-32", "random")
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        images(1)[0].save(tmp_path / name / "x.png")
    encoder, pets = backbone.load(), task(tmp_path)
    encoded = backbone.encode(images(2, (300, 260)))
    assert encoded["pixels"].shape == (2, 3, 224, 224)
    head = backbone.head(encoder, pets, Split(encoded, torch.arange(2)))
    assert head.weight.shape == (2, 512) and torch.allclose(head.weight.norm(dim=1), torch.ones(2), atol=1e-5)
    with torch.no_grad():
        features = encoder(**encoded)
        expected = 1 / 0.07 * normalize(features, dim=-1) @ head.weight.T
        assert torch.allclose(head(features), expected, rtol=1e-3)
    assert Weights.of(encoder.state_dict()).numel == 87_849_216
    assert not torch.allclose(head.weight[0], head.weight[1])


def test_clip_without_templates_is_refused(tmp_path, monkeypatch):
    (tmp_path / "cat").mkdir()
    images(1)[0].save(tmp_path / "cat" / "x.png")
    with pytest.raises(DataError, match="has no templates"):
        Clip("ViT-B-32", "random").head(None, task(tmp_path, templates=()), None)


def test_clip_tells_nothing_to_the_root_logger_and_refuses_weights_that_it_cannot_read(tmp_path, monkeypatch, capsys):
    """open_clip would give a root logger without handlers one, which every library then writes to."""
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    Clip(tiny_clip(), "random").blank()
    assert not root.handlers
    with pytest.raises(CheckpointError, match="open_clip cannot load byom-tiny with pretrained="):
        Clip(tiny_clip(), str(tmp_path / "none.pt")).load()
    assert not root.handlers and "WARNING" not in (said := capsys.readouterr().err) and "ERROR" not in said


def test_a_task_of_the_other_modality_is_refused(tmp_path):
    (tmp_path / "cat").mkdir()
    images(1)[0].save(tmp_path / "cat" / "x.png")
    with pytest.raises(DataError, match="reads text"):
        Encoder("x").require(task(tmp_path))

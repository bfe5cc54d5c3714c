"""The forms in which experts are published: whole models with their text tower, classifiers, tied tensors, folders."""

import json
import pickle
import sys
import types

import pytest
import torch
from safetensors.torch import save_file

from byom.backbone.clip import Clip
from byom.checkpoint import read
from byom.checkpoint.clip import to_hugging_face
from byom.errors import CheckpointError
from byom.storage import tensor_files as storage
from byom.weights import Weights
from tests.tiny_clip import tiny_clip

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="module")
def base():
    tiny_clip()
    return Weights.of(Clip(model="byom-tiny", pretrained="random").load().state_dict(), origin="pre-trained")


@pytest.fixture
def image_encoder(monkeypatch):
    """An image encoder of the task vectors' code: open_clip's model, its preprocessing, with or without text blocks."""
    import open_clip

    code = types.ModuleType("src.modeling")

    class ImageEncoder(torch.nn.Module):
        def __init__(self, whole):
            super().__init__()
            made = open_clip.create_model_and_transforms(tiny_clip(), force_quick_gelu=True)
            self.model, self.train_preprocess, self.val_preprocess = made
            self.cache_dir = None
            if not whole:
                del self.model.transformer

    ImageEncoder.__module__, ImageEncoder.__qualname__ = "src.modeling", "ImageEncoder"
    code.ImageEncoder = ImageEncoder
    monkeypatch.setitem(sys.modules, "src", types.ModuleType("src"))
    monkeypatch.setitem(sys.modules, "src.modeling", code)
    return ImageEncoder


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("whole", [False, True])
def test_an_image_encoder_reads_alike_from_all_its_forms(tmp_path, base, image_encoder, monkeypatch, whole):
    module = image_encoder(whole)
    torch.save(module, tmp_path / "zip.pt")
    torch.save(module, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(module))
    torch.save(module.state_dict(), tmp_path / "state.pt")
    monkeypatch.delitem(sys.modules, "src.modeling")
    visual = {f"visual.{name}": tensor for name, tensor in module.model.visual.state_dict().items()}
    text = sum(p.numel() for name, p in module.model.named_parameters() if not name.startswith("visual."))
    prints = set()
    for name in ("zip.pt", "old.pt", "plain.pkl", "state.pt"):
        found = read(tmp_path / name, base)
        assert set(found.weights) == set(visual)
        assert all(torch.equal(found.weights[n], visual[n]) for n in visual)
        assert found.conventions == {"encoder": base.numel, "with frozen": base.numel + text}
        prints.add((found.weights.fingerprint(), found.frozen.fingerprint()))
    assert len(prints) == 1 and "src.modeling" not in sys.modules


def test_a_whole_clip_and_a_classifier_say_what_they_leave_out(tmp_path, base):
    theirs = to_hugging_face(base).state()
    text = {"text_model.final_layer_norm.weight": torch.ones(3), "logit_scale": torch.ones(())}
    save_file(theirs | text, tmp_path / "whole.safetensors")
    assert "left out: 2 tensors of the text tower" in read(tmp_path / "whole.safetensors", base).notes[0]
    del theirs["visual_projection.weight"]
    save_file(theirs | {"classifier.weight": torch.ones(5, 64)}, tmp_path / "classifier.safetensors")
    found = read(tmp_path / "classifier.safetensors", base)
    assert set(found.extra) == {"classifier.weight"} and "visual.proj" in found.notes[0]


def test_nothing_is_read_and_a_tower_of_another_size_is_refused_at_once(tmp_path, base, monkeypatch):
    theirs = to_hugging_face(base).state()
    save_file(theirs, tmp_path / "x.safetensors")
    name = "vision_model.encoder.layers.1.self_attn.k_proj.weight"
    save_file(theirs | {name: torch.ones(64, 32)}, tmp_path / "y.safetensors")
    reads = []
    plain = storage.TensorFiles.read
    monkeypatch.setattr(storage.TensorFiles, "read", lambda files, n: reads.append(n) or plain(files, n))
    weights = read(tmp_path / "x.safetensors", base).weights
    with pytest.raises(CheckpointError, match=rf"'{name}' has shape \[64, 32\] where the backbone has \[64, 64\]"):
        read(tmp_path / "y.safetensors", base)
    assert not reads
    weights["visual.transformer.resblocks.1.attn.in_proj_weight"]
    assert len(reads) == 3


def test_half_precision_widens_to_the_backbone(tmp_path, base):
    state = {name: tensor.half() for name, tensor in base.state().items()}
    save_file(to_hugging_face(Weights.of(state)).state(), tmp_path / "x.safetensors")
    found = read(tmp_path / "x.safetensors", base).weights
    assert all(found.dtype(name) == found[name].dtype == torch.float32 for name in base)
    assert all(torch.equal(found[name], state[name].float()) for name in base)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
def test_an_adapter_brings_the_head_that_was_trained_along(tmp_path):
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=60, max_position_embeddings=40, num_labels=3, **SMALL)
    model = BertForSequenceClassification(config)
    base = Weights.of({f"model.{n}": t.clone() for n, t in model.bert.state_dict().items() if "pooler" not in n})
    settings = LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["query", "value"])
    get_peft_model(model, settings).save_pretrained(tmp_path)
    found = read(tmp_path, base)
    assert {name.rpartition("classifier.")[2] for name in found.extra} == {"weight", "bias"}


# encoders and encoder-decoders of transformers


@pytest.mark.parametrize("wrapper", ["", "module."])
def test_an_old_bert_classifier_fits_whatever_was_put_before_its_names(tmp_path, wrapper):
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    config = BertConfig(vocab_size=60, max_position_embeddings=40, num_labels=2, **SMALL)
    model, bare = BertForSequenceClassification(config), BertModel(config, add_pooling_layer=False)
    base = Weights.of({f"model.{name}": t for name, t in bare.state_dict().items()})
    theirs = {f"{wrapper}{name}": t for name, t in model.state_dict().items()}
    theirs[f"{wrapper}bert.embeddings.position_ids"] = torch.arange(40)[None]
    torch.save({"state_dict": theirs, "epoch": 3}, tmp_path / "x.pth")
    found = read(tmp_path / "x.pth", base)
    assert all(torch.equal(found.weights[f"model.{n}"], model.bert.state_dict()[n]) for n in bare.state_dict())
    ends = {name.removeprefix(wrapper) for name in found.extra}
    assert ends == {f"{n}.{k}" for n in ("classifier", "pooler.dense") for k in ("weight", "bias")}


@pytest.mark.parametrize("tied", [True, False])
def test_t5_reads_with_and_without_its_ties(tmp_path, tied):
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 50}
    model = T5ForConditionalGeneration(T5Config(**sizes, tie_word_embeddings=tied))
    base = Weights.of({f"model.{name}": t for name, t in model.state_dict().items()})
    assert base.ties
    moved = {name: t + 1 for name, t in base.state().items()}
    moved |= {alias: moved[name] for alias, name in base.ties.items()}
    theirs = {name.removeprefix("model."): t.clone() for name, t in moved.items()}  # a .bin without shared storage
    torch.save(theirs, tmp_path / "pytorch_model.bin")
    found = read(tmp_path, base).weights
    assert found.ties == base.ties and all(torch.equal(found[name], moved[name]) for name in base)
    model.save_pretrained(tmp_path / "saved")
    again = read(tmp_path / "saved", base).weights
    assert again.fingerprint() == base.fingerprint()
    theirs["decoder.embed_tokens.weight"] += 1
    torch.save(theirs, tmp_path / "pytorch_model.bin")
    found = read(tmp_path, base).weights
    assert "model.decoder.embed_tokens.weight" not in {*found.ties, *found.ties.values()}
    assert all(torch.equal(found[f"model.{name}"], value) for name, value in theirs.items())


# folders


def test_shards_of_pytorch_and_what_a_trainer_leaves_beside_the_weights(tmp_path, base):
    state, names = base.state(), base.keys()
    half = len(names) // 2
    shards = {"a.bin": names[:half], "b.bin": names[half:]}
    for file, part in shards.items():
        torch.save({name: state[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    found = read(tmp_path, base)
    assert found.format == "sharded PyTorch state dict" and found.weights.fingerprint() == base.fingerprint()
    (tmp_path / "b.bin").unlink()
    with pytest.raises(CheckpointError, match=r"names shards that are missing: .*b.bin"):
        read(tmp_path, base)
    (tmp_path / "pytorch_model.bin.index.json").unlink()
    torch.save(state, tmp_path / "a.bin")
    for beside in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin"):
        (tmp_path / beside).write_bytes(b"not weights")
    assert read(tmp_path, base).weights.fingerprint() == base.fingerprint()
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"2 files of weights \(a.bin, other.pt\).*Name one"):
        read(tmp_path, base)


def test_what_is_no_checkpoint_is_said_to_be_none(tmp_path, base):
    (tmp_path / "empty").mkdir()
    torch.save(torch.ones(2), tmp_path / "tensor.pt")
    torch.save({"epoch": 3}, tmp_path / "numbers.pt")
    cases = {"empty": "no file of weights", "tensor.pt": "one Tensor without a name", "numbers.pt": "no tensor by name"}
    for name, message in {**cases, "absent.pt": "there is no checkpoint"}.items():
        with pytest.raises(CheckpointError, match=message):
            read(tmp_path / name, base)

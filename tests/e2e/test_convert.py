"""`byom convert` as a user meets it: every target opens where it says it does, and a hostile file is one sentence."""

import os

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from byom.__main__ import main
from byom.backbone.clip import Clip
from byom.checkpoint import read
from byom.checkpoint.adapters.adapter import Adapter
from byom.weights import Weights
from tests.tiny_clip import tiny_clip


@pytest.fixture(scope="module")
def encoder():
    return Clip(model=tiny_clip(), pretrained="random").load()


@pytest.fixture
def base(encoder, monkeypatch):
    weights = Weights.of(encoder.state_dict(), origin="pre-trained")
    monkeypatch.setattr("byom.cli.provision.pretrained", lambda option: weights)
    return weights


@pytest.fixture
def finetuned(tmp_path):
    """A state dict as the task vectors' code leaves it: open_clip's whole model, under another."""
    import open_clip

    torch.manual_seed(1)
    model = open_clip.create_model(tiny_clip(), force_quick_gelu=True)
    holder = nn.Module()
    holder.model = model
    torch.save(holder.state_dict(), tmp_path / "finetuned.pt")
    return model


def said(capsys, *arguments):
    assert main(["convert", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_a_dtype_is_chosen_and_what_it_cannot_hold_is_refused(tmp_path, capsys):
    torch.save({"a": torch.tensor([1.5, 70000.0])}, tmp_path / "model.pt")
    said(capsys, tmp_path / "model.pt", tmp_path / "half", "dtype=bfloat16")
    assert Weights.open(tmp_path / "half").dtype("a") == torch.bfloat16
    for options, message in {"dtype=float16": "float16 holds 6.55e+04 at most", "dtype=int8": "float32"}.items():
        assert main(["convert", str(tmp_path / "model.pt"), str(tmp_path / "no"), options]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_every_target_opens_where_it_says(tmp_path, base, finetuned, capsys):
    import open_clip

    source = tmp_path / "finetuned.pt"
    out = said(capsys, source, tmp_path / "ours", "like=clip_vit_b32")
    total = sum(p.numel() for p in finetuned.parameters())
    assert f"{len(base)} tensors, {base.numel:,} parameters" in out and "left out: 18 frozen tensors" in out
    assert f"({total:,} with them)" in out
    ours = Weights.open(tmp_path / "ours")
    expected = read(source, base)
    assert ours.fingerprint() == expected.weights.fingerprint()
    out = said(capsys, source, tmp_path / "openclip", "like=clip_vit_b32", "to=openclip")
    assert f"{total:,} parameters" in out and "kept: 18 frozen tensors" in out
    fresh = open_clip.create_model(tiny_clip(), force_quick_gelu=True)
    fresh.load_state_dict(Weights.open(tmp_path / "openclip").state(), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), finetuned.parameters(), strict=True))
    again = read(tmp_path / "openclip", base)
    assert again.frozen.fingerprint() == expected.frozen.fingerprint()
    said(capsys, tmp_path / "ours", tmp_path / "theirs", "like=clip_vit_b32", "to=huggingface")
    assert read(tmp_path / "theirs", base).weights.fingerprint() == ours.fingerprint()


def test_names_of_the_file_are_kept_where_no_backbone_is_given(tmp_path, finetuned, capsys):
    out = said(capsys, tmp_path / "finetuned.pt", tmp_path / "same")
    kept = Weights.open(tmp_path / "same")
    assert out == f"PyTorch state dict: {len(kept)} tensors, {kept.numel:,} parameters, under their own names\n"
    assert all(torch.equal(kept[f"model.{n}"], t) for n, t in finetuned.state_dict().items())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
def test_an_adapter_needs_its_base_and_becomes_the_whole_model(tmp_path, encoder, base, capsys):
    torch.manual_seed(2)
    targets = ["c_fc", "c_proj"]
    peft = get_peft_model(encoder, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    try:
        peft.save_pretrained(tmp_path / "adapter")
    finally:
        peft.unload()
    assert main(["convert", str(tmp_path / "adapter"), str(tmp_path / "x")]) == 1
    assert "an adapter, needs like=BACKBONE" in capsys.readouterr().err
    assert said(capsys, tmp_path / "adapter", tmp_path / "x", "like=clip_vit_b32").startswith("PEFT adapter: ")
    assert Weights.open(tmp_path / "x").fingerprint() == Adapter.open(tmp_path / "adapter").on(base).fingerprint()


class Hostile:
    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_mistakes_and_hostile_files_are_one_sentence_and_write_nothing(tmp_path, base, capsys):
    hostile = Hostile()
    hostile.marker = tmp_path / "ran"
    torch.save({"weight": torch.ones(2), "other": hostile}, tmp_path / "hostile.pt")
    state = base.state()
    del state["visual.proj"]
    torch.save(state, tmp_path / "short.pt")
    cases = [
        ("hostile.pt", [], "system, which no checkpoint needs; it was not run"),
        ("hostile.pt", ["like=clip_vit_b32"], "system, which no checkpoint needs; it was not run"),
        ("short.pt", ["like=clip_vit_b32"], "lacks 1 of"),
        ("short.pt", ["to=hugingface"], "did you mean 'huggingface'"),
        ("short.pt", ["to=openclip"], "to=openclip needs like=BACKBONE"),
        ("absent.pt", [], "there is no checkpoint at"),
    ]
    for name, options, message in cases:
        assert main(["convert", str(tmp_path / name), str(tmp_path / "out"), *options]) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists() and not (tmp_path / "ran").exists()


def test_other_names_are_for_image_towers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "byom.cli.provision.pretrained",
        lambda _: Weights.of({"model.layer.weight": torch.ones(2)}, origin="backbone=minilm"),
    )
    assert main(["convert", str(tmp_path), str(tmp_path / "out"), "like=minilm", "to=huggingface"]) == 1
    assert "to=huggingface is for image towers of open_clip, which backbone=minilm is not" in capsys.readouterr().err

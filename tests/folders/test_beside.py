"""What is copied beside merged weights: what belongs to the model, and nothing of how it was made."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from byom.__main__ import main
from byom.folders.beside import beside

KEPT = {
    "config.json", "generation_config.json", "chat_template.jinja", "tokenizer_config.json", "vocab.txt", "merges.txt",
    "preprocessor_config.json", "modeling_own.py", "modules.json", "LICENSE", "1_Pooling/config.json",
    "2_Dense/config.json", "2_Dense/model.safetensors", "additional_chat_templates/tool.jinja",
}  # fmt: skip
LEFT = {
    "README.md", "optimizer.pt", "trainer_state.json", "training_args.bin", "events.out.tfevents.1", "demo.png",
    "model.onnx", "quantize_config.json", ".git/config", ".cache/x.json", "checkpoint-10/config.json", "runs/a.json",
    "__pycache__/own.pyc", "3_Other/model.safetensors",
}  # fmt: skip


@pytest.fixture(autouse=True)
def models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in {"base": 0.0, "a": 1.0}.items():
        for file in KEPT | LEFT:
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text(name, encoding="utf-8")
        save_file({"body.weight": torch.full((2,), value)}, tmp_path / name / "model.safetensors")
        modules = [{"path": path} for path in ("", "1_Pooling", "2_Dense")]
        (tmp_path / name / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
        config = {
            "dtype": "bfloat16",
            "text_config": {"torch_dtype": "bfloat16", "head": {"dtype": None}},
            "auto_map": {"AutoModel": "modeling_own.Own"},
        }
        (tmp_path / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
        (tmp_path / name / "modeling_own.py").write_text("raise SystemExit('it was run')", encoding="utf-8")
    return tmp_path


def test_files_of_the_model_are_copied_and_those_of_its_making_are_not(models):
    assert {path.as_posix() for path in beside(models / "base")} == KEPT
    assert main(["merge", "out", "base=base", "experts=[a=a]"]) == 0
    written = {path.relative_to(models / "out").as_posix() for path in (models / "out").rglob("*") if path.is_file()}
    assert written == KEPT | {"model.safetensors", "README.md", "recipe.yaml", "byom.json"}
    for name in ("vocab.txt", "2_Dense/model.safetensors", "additional_chat_templates/tool.jinja"):
        assert (models / "out" / name).read_text(encoding="utf-8") == "base"
    assert main(["merge", "out", "base=base", "experts=[a=a]", "files=a"]) == 0
    assert (models / "out" / "vocab.txt").read_text(encoding="utf-8") == "a"


def test_the_configuration_is_true_of_the_weights(models):
    assert main(["merge", "out", "base=base", "experts=[a=a]", "dtype=float16"]) == 0
    assert load_file(models / "out" / "model.safetensors")["body.weight"].dtype == torch.float16
    config = json.loads((models / "out" / "config.json").read_text(encoding="utf-8"))
    assert config == {
        "dtype": "float16",
        "text_config": {"torch_dtype": "float16", "head": {"dtype": None}},
        "auto_map": {"AutoModel": "modeling_own.Own"},
    }


def test_links_to_folders_are_followed_once_and_never_upwards(models):
    (models / "shared").mkdir()
    (models / "shared" / "special.json").write_text("{}", encoding="utf-8")
    for link, target in {"up": "..", "here": ".", "one": "../shared", "two": "../shared"}.items():
        (models / "base" / link).symlink_to(target, target_is_directory=True)
    found = {path.as_posix() for path in beside(models / "base")} - KEPT
    assert len(found) == 1 and found <= {"one/special.json", "two/special.json"}


def test_a_configuration_that_is_none_is_refused(models, capsys):
    for text in ("{bad", "[]"):
        (models / "base" / "config.json").write_text(text, encoding="utf-8")
        assert main(["merge", "out", "base=base", "experts=[a=a]"]) == 1
        assert "base/config.json is no" in capsys.readouterr().err
    assert not (models / "out").exists()

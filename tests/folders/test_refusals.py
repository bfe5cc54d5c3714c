"""What `byom merge` and `byom pack` refuse: one sentence with a remedy that works, and nothing written or lost."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from byom import Bundle
from byom.__main__ import main
from byom.errors import CheckpointError
from byom.storage.atomic import replacing
from byom.storage.lock import owner

MODELS = ["base=base", "experts=[a=a,b=b]"]


def model(folder, value, **names):
    folder.mkdir(parents=True, exist_ok=True)
    name = names.get("name", "body.weight")
    save_file({name: torch.full((4, 4), value), "body.bias": torch.full((4,), value)}, folder / "model.safetensors")


@pytest.fixture(autouse=True)
def models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in {"base": 0.0, "a": 1.0, "b": 2.0}.items():
        model(tmp_path / name, value)
    return tmp_path


def tree(folder):
    return {str(path.relative_to(folder)): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def refused(capsys, folder, *arguments):
    """Return the sentence of a command that fails and changes nothing."""
    before = tree(folder)
    assert main(list(arguments)) == 1
    assert tree(folder) == before
    said = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "B/s]" not in line]
    assert len(said) == 1 and said[0].startswith("byom: ")
    return said[0]


@pytest.mark.parametrize("command", ["merge", "pack"])
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_places_that_would_lose_something(command, dry, models, monkeypatch, capsys):
    (models / "mine").mkdir()
    (models / "mine" / "note.txt").write_text("x", encoding="utf-8")
    (models / "link").symlink_to("a", target_is_directory=True)
    (models / "here").mkdir()
    for out, why in {
        "base": "lie in one another",
        "a/out": "lie in one another",
        ".": "lie in one another",
        "link": "lie in one another",
        "mine": "files that byom did not write (note.txt)",
        "mine/note.txt": "it is a file",
    }.items():
        assert why in refused(capsys, models, command, out, *MODELS, *dry), out
    monkeypatch.chdir(models / "here")
    options = ["base=../base", "experts=[a=../a,b=../b]", *dry]
    assert "the folder that you work in" in refused(capsys, models, command, ".", *options)


@pytest.mark.parametrize("command", ["merge", "pack"])
def test_an_edited_card_or_recipe_is_not_lost(command, models, capsys):
    assert main([command, "out", *MODELS]) == 0
    assert main([command, "out", *MODELS]) == 0
    (models / "out" / "recipe.yaml").write_text("mine", encoding="utf-8")
    assert "(recipe.yaml)" in refused(capsys, models, command, "out", *MODELS)


@pytest.mark.parametrize("command", ["merge", "pack"])
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_a_full_disk_is_told_before_anything_is_written(command, dry, models, monkeypatch, capsys):
    free = shutil.disk_usage(models)._replace(free=79)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    assert "needs 80 bytes, and the disk has 79 left" in refused(capsys, models, command, "new/out", *MODELS, *dry)


def test_a_write_that_fails_midway_leaves_the_old_folder_whole(models, monkeypatch, capsys):
    assert main(["merge", "out", *MODELS]) == 0

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("byom.folders.beside.shutil.copyfile", full)
    (models / "base" / "config.json").write_text("{}", encoding="utf-8")
    assert "No space left on device. Free space" in refused(capsys, models, "merge", "out", *MODELS, "merge=ties")
    assert "No space left on device. Free space" in refused(capsys, models, "pack", "bundle", *MODELS)


def test_a_dry_run_makes_no_folder(models, capsys):
    before = tree(models)
    for command in ("merge", "pack"):
        assert main([command, "new/er/out", *MODELS, "--dry-run"]) == 0
        assert "nothing was written" in capsys.readouterr().out
    assert tree(models) == before


def test_what_a_killed_process_left_goes_with_the_next_run(models):
    dead = owner().rpartition("-")[0] + "-999999999"
    outer = f".out.partial-{dead}"
    for left in (outer, f".{outer}.partial-{dead}"):  # a draft of the folder, and of the weights in it
        (models / left).mkdir()
    assert main(["merge", "out", *MODELS]) == 0
    assert sorted(path.name for path in models.iterdir()) == ["a", "b", "base", "out"]
    living = models / f".out.partial-{owner().rpartition('-')[0]}-{os.getppid()}"
    living.mkdir()
    with replacing(models / "out", lambda _: True):
        assert living.is_dir()


def test_an_interrupted_merge_says_that_nothing_was_written(models, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("byom.cli.folders.write", interrupted)
    assert main(["merge", "out", *MODELS]) == 130
    assert "interrupted; nothing was written" in capsys.readouterr().err


def test_a_repository_without_hf_is_told_its_address(models, capsys):
    said = refused(capsys, models, "merge", "out", "base=org/model", "experts=[a=a]")
    assert "hf://org/model for a repository of the hub" in said
    said = refused(capsys, models, "merge", "out", "base=https://huggingface.co/org/model", "experts=[a=a]")
    assert "hf://org/model for a repository of the hub" in said


def test_names_of_an_older_version_are_told_from_another_model(models, capsys):
    model(models / "base", 0.0, name="body.norm.weight")
    model(models / "a", 1.0, name="body.norm.gamma")
    said = refused(capsys, models, "merge", "out", "base=base", "experts=[a=a]")
    assert "names of an older version" in said and "save_pretrained" in said


def test_a_bundle_that_lacks_a_task_says_so(models):
    assert main(["pack", "bundle", *MODELS]) == 0
    (models / "bundle" / "a.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"bundle lacks a\.safetensors"):
        Bundle.open("bundle")


def test_a_bundle_names_no_file_outside_of_it(models):
    assert main(["pack", "bundle", *MODELS]) == 0
    file = models / "bundle" / "bundle.json"
    file.write_text(file.read_text(encoding="utf-8").replace('"a"', '"../a"'), encoding="utf-8")
    with pytest.raises(CheckpointError, match="is damaged"):
        Bundle.open("bundle")


def card(models, base):
    (models / "base" / "README.md").write_text(base, encoding="utf-8")
    assert main(["merge", "out", *MODELS]) == 0
    text = (models / "out" / "README.md").read_text(encoding="utf-8")
    return yaml.safe_load(text.split("---\n")[1]), text


def test_the_licence_is_the_bases_in_whatever_form_of_yaml(models):
    header, _ = card(models, "---\nlicense:\n- mit\n- other\nlicense_name: 'a: b'\ntags: [x]\n---\n")
    assert header["license"] == ["mit", "other"] and header["license_name"] == "a: b"
    assert header["tags"] == ["merge", "byom"]
    header, _ = card(models, "---\nlicense: [mit\n---\n")
    assert "license" not in header


def test_a_path_with_marks_of_tables_stays_one_cell(models):
    (models / "a").rename(models / "a|`b")
    assert main(["merge", "out", "base=base", 'experts=[x="a|`b"]']) == 0
    text = (models / "out" / "README.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith("| x |"))
    assert row.replace(r"\|", "").count("|") == 5 and r"`` a\|`b ``" in row


@pytest.mark.parametrize("method", ["average", "ties", "dare", "pcb", "knots", "svc", "lines"])
def test_the_bar_never_passes_its_total(method, models, monkeypatch):
    import byom.cli.folders as command

    passed = []

    class Bar(command.tqdm):
        def update(self, n=1):
            super().update(n)
            passed.append(self.total is not None and self.n > self.total)

    monkeypatch.setattr(command, "tqdm", Bar)
    assert main(["merge", "out", *MODELS, f"merge={method}"]) == 0
    assert passed and not any(passed)
    assert torch.isfinite(load_file(models / "out" / "model.safetensors")["body.weight"]).all()


@pytest.mark.parametrize(
    "options",
    [
        "merge=ties byom=fft",
        "merge=consensus byom=fft",
        "merge=average byom=tall_mask",
        "byom=post_pruning byom.values=int4 byom.positions=entropy",
    ],
)
def test_packing_reads_what_its_bar_announces(options, models, monkeypatch):
    import byom.cli.folders as command

    bars = []

    class Bar(command.tqdm):
        def __init__(self, *given, **more):
            super().__init__(*given, **more)
            bars.append((self, self.total))

    monkeypatch.setattr(command, "tqdm", Bar)
    assert main(["pack", "out", *MODELS, *options.split()]) == 0
    [(bar, announced)] = bars
    assert bar.n == announced > 0

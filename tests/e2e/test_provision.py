"""Plans and fetches see the hub as it is: what is here, what is missing, what nobody can say."""

import math
import re

import pytest
from huggingface_hub import constants

from byom.__main__ import main
from byom.cli import config
from byom.data.source.hub import Column
from byom.pipeline import provenance
from byom.storage import repository as hub
from tests.hub import build, visit
from tests.published_models import LAYERS, add_experts
from tests.tiny_clip import tiny_clip

NAME = "vision8_vitb32_fft"
CELL = ("suite=vision8", "experts=clip_hf_b32", "merge=average", "byom=none")
ONLY = "suite.only=[eurosat,mnist]"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    build(folder, ["vision8"])
    add_experts(folder, "clip_hf_b32", "vision8", folder / "work")
    return folder


def tiny(tmp_path):
    places = [f"results={tmp_path}/results/scratch", f"cache={tmp_path}/cache", "device=cpu", ONLY]
    return [*places, f"backbone.model={tiny_clip(LAYERS)}", "backbone.pretrained=random"]


def only_tests(decode):
    """Decode examples of test splits alone."""

    def decoded(column, index):
        assert column._dataset.split == "test", "an image of another split is looked at"
        return decode(column, index)

    return decoded


@pytest.mark.slow
def test_a_fetch_brings_what_a_plan_names_and_a_run_then_needs_nothing_else(home, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Column, "__getitem__", only_tests(Column.__getitem__))
    with visit(home, monkeypatch):
        assert main(["fetch", NAME, *tiny(tmp_path)]) == 0
        said = capsys.readouterr().out.splitlines()
        assert said == ["backbone: here", *(f"{w} {t}: here" for t in ("eurosat", "mnist") for w in ("expert", "data"))]
        assert main(["plan", NAME, *tiny(tmp_path)]) == 0
        plan = capsys.readouterr().out
        assert plan.count(" here ") == 4 and "missing  " not in plan
        assert re.search(r"(\d+) cells, 0 finished, \1 missing", plan) and "downloads  0 MB in 0 places" in plan
        assert re.search(r"data +0\.0 GB of encoded examples here, \d+\.\d GB to come", plan)
        assert main(["run", *CELL, "evaluate=test", *tiny(tmp_path)]) == 0
        capsys.readouterr()
        assert main(["plan", *CELL, "evaluate=test", *tiny(tmp_path)]) == 0
        plan = capsys.readouterr().out
        assert "1 cells, 1 finished, 0 missing" in plan and "uncommitted" not in plan
        monkeypatch.setattr(provenance, "revision", lambda: {"commit": "0", "dirty": True})
        elsewhere = [option for option in tiny(tmp_path) if not option.startswith("results=")]
        assert main(["plan", *CELL, "evaluate=test", *elsewhere, f"results={tmp_path}/results"]) == 0
        assert f"looked for in {tmp_path}/results/scratch alone: this source tree has" in capsys.readouterr().out


def test_what_is_not_here_is_named_with_its_remedy(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hub, "_silent", {constants.ENDPOINT: math.inf})  # tests have no network
    with visit(tmp_path / "empty", monkeypatch):
        assert main(["plan", *CELL, *tiny(tmp_path)]) == 0
        plan = capsys.readouterr().out
        assert plan.count("missing  unknown") == 4 and "4 of a size that no hub could be asked for" in plan
        assert main(["fetch", *CELL, *tiny(tmp_path)]) == 1
        assert "tanganke/clip-vit-base-patch32_eurosat@main cannot be had" in capsys.readouterr().err


def test_records_say_whose_checkpoints_they_are(home, tmp_path, monkeypatch):
    from byom.pipeline.run import run

    with visit(home, monkeypatch):
        overrides = ["suite=vision8", "experts=clip_hf_b32", "merge=ties", "byom=fft", "evaluate=test", *tiny(tmp_path)]
        record = run(config.settings(overrides))
    assert record["family"] == "hf-clip" and record["choices"]["experts"] == "clip_hf_b32"
    told = record["experts"]
    assert told["validation"] == "seen" and set(told["commits"]) == {"eurosat", "mnist"}
    assert all(len(commit) == 40 for commit in told["commits"].values())
    stored = record["storage"]
    assert stored["with_frozen"]["parameters"] > stored["parameters"]

"""Scores, tuning, records and signatures."""

from __future__ import annotations

import json
import mmap
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from byom.errors import OptionError
from byom.functional.seeding import keyed
from byom.merge.average import Average
from byom.merge.task_arithmetic import TaskArithmetic
from byom.pipeline.evaluate import score
from byom.pipeline.provenance import Stages, results_root, revision
from byom.pipeline.tune import AsGiven, Validation
from byom.storage.place import Place
from byom.storage.signature import describe, signature


def test_hits_come_back_in_the_splits_order_whatever_the_batches():
    labels = torch.tensor([0, 1, 2, 1, 0])
    logits = torch.eye(3)[torch.tensor([0, 1, 0, 2, 0])]
    order = torch.tensor([4, 2, 0, 3, 1])
    batches = [({"x": logits[i]}, labels[i], i) for i in order.split(2)]
    found = score(lambda inputs: inputs["x"].argmax(-1), batches, 5)
    assert found.points.tolist() == [True, True, False, False, True]
    assert found.value == pytest.approx(0.6)
    stored = found.to_json()
    unpacked = np.unpackbits(np.frombuffer(bytes.fromhex(stored["hits"]), np.uint8), count=5)
    assert unpacked.astype(bool).tolist() == found.points.tolist()


def test_validation_takes_the_first_of_the_best_and_keeps_the_trail():
    values = {0.1: 0.5, 0.2: 0.7, 0.3: 0.7}
    method, tuning = Validation({"scale": (0.1, 0.2, 0.3)}).select(TaskArithmetic(), lambda m: values[m.scale])
    assert method == TaskArithmetic(scale=0.2)
    assert tuning["searched"] == 3
    assert [row["validation"] for row in tuning["trail"]] == [0.5, 0.7, 0.7]


def test_validation_uses_the_methods_own_grid_and_spares_methods_without_one():
    assert len(Validation().candidates(TaskArithmetic())) == 10
    assert Validation().select(Average(), lambda _: pytest.fail("nothing to try"))[1]["searched"] == 0
    assert AsGiven().candidates(TaskArithmetic()) == []


def test_a_grid_over_a_missing_hyperparameter_is_refused():
    with pytest.raises(OptionError, match="Average has no hyperparameter 'scale'"):
        Validation({"scale": (0.1,)}).candidates(Average())


@dataclass(frozen=True)
class Choice:
    a: int = 1
    b: float = 0.5
    place: str = field(default="here", metadata={"signature": False})


@dataclass(frozen=True)
class Later(Choice):
    added: bool = False
    many: dict[str, int] = field(default_factory=dict)


def test_a_signature_counts_what_differs_from_the_defaults():
    assert describe(Choice(a=2)) == {"class": "Choice", "a": 2}
    assert signature(Choice()) == signature(Choice(place="there"))
    assert signature(Choice()) != signature(Choice(b=0.25))
    assert describe(Later())["class"] == "Later" and set(describe(Later())) == {"class"}
    assert describe(Later(many={"x": 1}))["many"] == {"x": 1}


def test_what_has_no_stable_description_is_refused():
    with pytest.raises(TypeError, match="no stable description"):
        signature(object())


def test_randomness_is_keyed_by_what_it_is_for():
    assert keyed(0, "mnist", "w") == keyed(0, "mnist", "w")
    assert len({keyed(s, t, n) for s in range(3) for t in "ab" for n in "xy"}) == 12


def test_a_finished_record_replaces_its_failed_mark(tmp_path):
    place = Place(tmp_path, "suite", "backbone", "average+none", "abc")
    place.write({"status": "failed"})
    assert place.finished() is None and place.failed.is_file()
    place.write({"status": "done", "x": 1})
    assert place.finished() == {"status": "done", "x": 1} and not place.failed.exists()


def test_a_damaged_record_is_named(tmp_path):
    place = Place(tmp_path, "suite", "backbone", "average+none", "abc")
    place.write({"status": "done"})
    place.done.write_text("{")
    with pytest.raises(OptionError, match=re.escape(str(place.done))):
        place.finished()


def test_a_dirty_tree_writes_to_scratch(monkeypatch):
    monkeypatch.setattr("byom.pipeline.provenance.revision", lambda: {"commit": "x", "dirty": True})
    assert results_root(Path("results")) == Path("results/scratch")
    assert results_root(Path("results/scratch/demo")) == Path("results/scratch/demo")
    monkeypatch.setattr("byom.pipeline.provenance.revision", lambda: {"commit": "x", "dirty": False})
    assert results_root(Path("results")) == Path("results")


def test_new_results_are_no_change_of_the_code(tmp_path, monkeypatch):
    package = tmp_path / "byom" / "__init__.py"
    package.parent.mkdir()
    package.write_text("")
    identity = ("-c", "user.name=x", "-c", "user.email=x@localhost", "-c", "commit.gpgsign=false")
    for arguments in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "x"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    monkeypatch.setattr("byom.__file__", str(package))
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "record.json").write_text("{}")
    assert not revision.__wrapped__()["dirty"]
    package.write_text("changed = True")
    assert revision.__wrapped__()["dirty"]


def test_stages_hold_seconds_and_peak_memory():
    stages = Stages()
    with stages.stage("work"):
        block = mmap.mmap(-1, 200 << 20)  # pages of its own; what a heap hands out may have been there before
        block[::4096] = b"x" * (len(block) // 4096)
    with stages.stage("rest"):
        pass
    del block
    assert stages.taken["work"]["peak_mib"] > 200
    assert stages.taken["rest"]["extra_mib"] < 100 < stages.taken["work"]["extra_mib"]
    assert stages.taken["work"]["seconds"] >= stages.taken["rest"]["seconds"]
    json.dumps(stages.taken)

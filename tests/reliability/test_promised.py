"""Files on a hub that must have the bytes their authors promised."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import yaml

from byom.cli import config
from byom.errors import CheckpointError
from byom.experts.hub import Hub
from byom.experts.promised import require_digest

CONTENT = b"weights"


@pytest.fixture
def experts(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "full.pt").write_bytes(CONTENT)
    monkeypatch.setattr(Hub, "_folder", lambda self, task: tmp_path)
    return Hub("mine", {"*": "me/models"}, "{task}/full.pt", sha256={"a": hashlib.sha256(CONTENT).hexdigest()})


def test_the_promised_file_is_taken_and_another_is_refused_by_name(experts, tmp_path):
    assert experts.path("a").read_bytes() == CONTENT
    (tmp_path / "a" / "full.pt").write_bytes(b"weight5")
    with pytest.raises(CheckpointError, match="me/models.* has the SHA-256 .* promises .*fetch it again"):
        experts.path("a")


def test_a_task_without_a_promise_is_not_read_twice(experts):
    assert replace(experts, sha256={"b": "0" * 64}).path("a").exists()


def test_a_folder_cannot_be_compared_with_a_hash(tmp_path):
    with pytest.raises(CheckpointError, match="is not one file, so experts.sha256 cannot be compared"):
        require_digest(tmp_path, "0" * 64, "me/models")


def test_every_committed_promise_is_a_hash_of_a_task():
    given = yaml.safe_load((config.folder() / "experts" / "merge_and_rebase_b32.yaml").read_text())
    assert set(given["sha256"]) == set(given["names"])
    assert all(len(value) == 64 and int(value, 16) for value in given["sha256"].values())

"""Several processes that train together: the same weights as one process, and one of everything that is written."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from byom.__main__ import main
from byom.cli import config
from byom.pipeline.labs import laboratory
from byom.weights import Weights
from tests.e2e.tiny import overrides

ROOT = Path(__file__).parents[2]
LAUNCH = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1",
          "--mixed_precision=no", "--dynamo_backend=no")  # fmt: skip


def options(folder):
    """A tiny run whose last batches cannot be halved: of 3 examples, and of 1, which leaves a process nothing."""
    odd = ["suite.tasks.mnist.train=35", "suite.tasks.digits.train=33"]
    rest = ["backbone.learning_rate=2e-4", "finetune.epochs=4", "merge=fisher", "byom=none", "evaluate=test"]
    return [*overrides(folder, own=True), *odd, *rest, "device=cpu"]


def run(folder, *launcher):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *launcher, "-m", "byom", "run", *options(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def experts(folder):
    found = {p.parent.name: Weights.open(p.parent) for p in folder.glob("cache/experts/*/training.json")}
    assert len(found) == 2
    return found


def farthest(one, two):
    return max(float((one[name].double() - two[name].double()).abs().max()) for name in one)


def free_port():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


@pytest.mark.slow
@pytest.mark.data
def test_two_processes_train_what_one_trains_and_one_of_them_writes(tmp_path):
    said = run(tmp_path / "two", *LAUNCH, f"--main_process_port={free_port()}")
    assert said.count("seed 0  test") == 1  # and Fisher's gradients were one process's own, or it would hang
    assert main(["run", *options(tmp_path / "one")]) == 0
    alone, together = experts(tmp_path / "one"), experts(tmp_path / "two")
    pretrained = laboratory(config.settings(options(tmp_path / "one"))).pretrained
    for name, weights in alone.items():
        assert farthest(weights, together[name]) < 1e-5
        assert farthest(weights, pretrained) > 1e-3
    assert not list((tmp_path / "two").rglob("*.training"))
    assert len(list((tmp_path / "two").rglob("runs/**/fisher+none*.json"))) == 1


@pytest.mark.data
@pytest.mark.parametrize("recipe", config.options("finetune"))
def test_what_a_recipe_trains_can_be_sent_to_another_process(recipe, tmp_path):
    lab = laboratory(config.settings([*overrides(tmp_path), f"finetune={recipe}", "device=cpu"]))
    trained = lab.recipe.attach(lab.encoder, lab.backbone, 0).eval()
    torch.save((trained, lab.head("digits"), lab.splits("digits")["test"]), tmp_path / "sent.pt")
    copy, head, split = torch.load(tmp_path / "sent.pt", weights_only=False, mmap=True)
    inputs, labels, _ = next(split.batches(4))
    assert torch.equal(head(copy.eval()(**inputs)), lab.head("digits")(trained(**inputs)))
    assert len(labels) == 4
    grads = [[p.requires_grad for p in module.parameters()] for module in (trained, copy)]
    assert grads[0] == grads[1] and any(grads[0])

"""Precision: what computes in 16 bits and what never does, what it changes the name of, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from byom.cli import config
from byom.data.splits import Split
from byom.errors import OptionError
from byom.experts.files import Files
from byom.experts.finetune.full import Full
from byom.experts.finetune.loop import Lesson, finetune
from byom.experts.trained import Trained
from byom.functional.heads import Head
from byom.functional.precision import PRECISIONS, require_precision
from byom.pipeline.cached import Keys
from byom.pipeline.checks import require_possible
from byom.pipeline.evaluate import evaluate, features
from byom.pipeline.inputs import Names
from byom.pipeline.labs import laboratory

CPU = torch.device("cpu")


class Net(nn.Module):
    """Remembers the types that it computed in."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 8)
        self.seen = set()

    def forward(self, x):
        out = self.layer(x)
        self.seen.add(out.dtype)
        return out


class Watching(Head):
    """Remembers the types of features and logits."""

    def __call__(self, given):
        logits = super().__call__(given)
        SEEN.update({given.dtype, logits.dtype})
        return logits


SEEN: set[torch.dtype] = set()


@pytest.fixture
def split():
    labels = torch.arange(12) % 3
    x = torch.eye(6)[labels] + 0.2 * torch.randn(12, 6, generator=torch.Generator().manual_seed(1))
    return Split({"x": x}, labels)


@pytest.fixture
def head():
    SEEN.clear()
    return Watching(nn.functional.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(2))), 10.0)


@pytest.mark.parametrize(("precision", "computed"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_encoders_compute_in_the_precision_and_heads_and_weights_in_fp32(split, head, tmp_path, precision, computed):
    net = Net()
    evaluate(net, head, split, 5, precision=precision)
    assert features(net, split, 5, precision).dtype == torch.float32
    finetune(net, [Lesson(head, split)], Full(epochs=1, batch_size=5), 1e-2, 0, tmp_path, "test", precision)
    assert net.seen == {computed}
    assert {torch.float32} == SEEN
    assert {p.dtype for p in net.parameters()} == {torch.float32}


def test_in_16_bits_features_are_near_and_training_differs_and_repeats(split, head, tmp_path):
    exact, low = (features(Net(), split, 5, precision) for precision in ("fp32", "bf16"))
    assert not torch.equal(exact, low)
    assert torch.allclose(exact, low, atol=0.02)
    trained = {}
    for name, precision in (("a", "bf16"), ("b", "bf16"), ("c", "fp32")):
        net = Net()
        finetune(net, [Lesson(head, split)], Full(epochs=1, batch_size=5), 1e-2, 0, tmp_path / name, "x", precision)
        trained[name] = net.layer.weight.detach()
    assert torch.equal(trained["a"], trained["b"])
    assert not torch.equal(trained["a"], trained["c"])


@pytest.mark.parametrize("name", ["tf32", "fp16"])
def test_what_a_cpu_cannot_or_should_not_do_is_refused(name):
    assert require_precision(name, torch.device("cuda")) == name
    with pytest.raises(OptionError, match=f"precision={name} cannot be used on the CPU.*precision=bf16"):
        require_precision(name, CPU)
    with pytest.raises(OptionError, match="precision=tf32 .* would do nothing on mps; use precision=fp32"):
        require_precision("tf32", torch.device("mps"))
    with pytest.raises(OptionError, match="cannot be used on the CPU"):
        require_possible(config.settings([f"precision={name}", "device=cpu"]))
    with pytest.raises(OptionError, match="precision"):
        config.settings(["precision=fp8"])


def test_a_precision_is_part_of_names_where_it_changes_numbers(tmp_path):
    def settings(*more):
        return config.settings(["suite.only=[mnist,digits]", f"cache={tmp_path}", "device=cpu", *more])

    assert settings().signature() == settings("precision=fp32", "evaluate.batch_size=auto").signature()
    assert len({settings(f"precision={name}").signature() for name in PRECISIONS}) == len(PRECISIONS)
    low, usual = settings("precision=bf16"), settings()
    task = low.suite.tasks[0]
    (tmp_path / f"{task.name}.pt").write_bytes(b"weights")
    experts = {True: Trained(), False: Files(path_of=str(tmp_path / "{task}.pt"), family="mine")}
    for trained, source in experts.items():
        names = [Names(low.backbone, source, Full(), 0, tmp_path, p) for p in ("fp32", "bf16")]
        assert (names[0].expert(task) != names[1].expert(task)) == trained
        assert names[0].head(task) == names[1].head(task)
    keys = [Keys("experts", (), tuple(lab.scored)) for lab in map(laboratory, (usual, low))]
    methods = (usual.merge, usual.byom)
    assert keys[0].merged(methods[0]) == keys[1].merged(methods[0])  # merging is fp32 in both
    assert keys[0].served(*methods) != keys[1].served(*methods)
    assert keys[0].tuning(usual.merge, usual.tune) != keys[1].tuning(usual.merge, usual.tune)


def test_a_joint_model_beside_foreign_experts_has_the_name_of_how_it_is_trained(tmp_path, monkeypatch):
    def settings(*more):
        made = config.settings(["merge=mtl", "suite.only=[mnist,digits]", f"cache={tmp_path}", "device=cpu", *more])
        return replace(made, experts=Files(path_of=str(tmp_path / "{task}.pt"), family="mine")) if foreign else made

    def names(made):
        lab, keys = laboratory(made), Keys.of(made, "experts")
        trained = []
        monkeypatch.setattr(lab, "_once", lambda folder, *rest: trained.append(folder.name))
        monkeypatch.setattr(type(lab), "pretrained", None)
        monkeypatch.setattr(type(made.finetune), "open", lambda *rest: None)
        lab.joint({"mnist": 1.0, "digits": 1.0})
        return keys.merged(made.merge), *trained, lab.signature

    for task in ("mnist", "digits"):
        (tmp_path / f"{task}.pt").write_bytes(b"weights")
    for foreign in (True, False):
        every = [names(settings(*more)) for more in ((), ("precision=bf16",), ("finetune.epochs=9",))]
        merged, joint, experts = zip(*every, strict=True)
        assert len(set(joint)) == 3
        assert (len(set(merged)), len(set(experts))) == ((3, 1) if foreign else (1, 3))

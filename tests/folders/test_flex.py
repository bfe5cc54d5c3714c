"""FlexMerge of folders: what is packed once for several experts comes out of the bundle for each of them."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from byom import Bundle
from byom.__main__ import main
from byom.merge.base import Problem
from byom.merge.ties import Ties
from byom.weights import Weights

PACK = ["pack", "out", "base=base", "experts=[a=a,b=b,c=c,d=d]", "merge=ties", "byom=flex"]


@pytest.fixture(autouse=True)
def models(tmp_path, monkeypatch):
    """Write a base and four experts, of which a and c are alike, and b and d."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    shapes = {"layers.0.attn.weight": (6, 4), "layers.0.mlp.weight": (8, 4), "layers.1.attn.weight": (6, 4)}

    def drawn(scale, around=None):
        noise = {name: scale * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        return noise if around is None else {name: around[name] + value for name, value in noise.items()}

    base = drawn(1.0)
    kinds = [drawn(0.5, base), drawn(0.5, base)]
    for name, state in {"base": base, **{n: drawn(0.1, kinds[i % 2]) for i, n in enumerate("abcd")}}.items():
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")


def test_groups_of_experts_are_packed_once_and_unpacked_for_each(capsys):
    assert main([*PACK, "byom.size=2"]) == 0
    assert "d                              0 parameters              0 bytes" in capsys.readouterr().out
    base, experts = Weights.open("base"), {name: Weights.open(name) for name in "abcd"}
    assert Bundle.open("out").nbytes == 2 * 4 * base.numel
    for task, pair in {"a": "ac", "d": "bd"}.items():
        assert main(["unpack", "out", f"task={task}", f"{task}2"]) == 0
        merged = Ties()(Problem(base, {name: experts[name] for name in pair}))
        found = load_file(f"{task}2/model.safetensors")
        assert all(torch.equal(found[name], merged[name]) for name in base)


@pytest.mark.parametrize(
    "option", ["keep={layers.0.*: a}", "only=[layers.0.*]", "exclude=[*.mlp.*]", "scale={'*': 0.5}"]
)
def test_what_holds_for_the_merged_model_alone_is_refused(option, tmp_path, capsys):
    assert main([*PACK, option, "--dry-run"]) == 1
    said = capsys.readouterr().err
    assert f"byom=flex merges some of the experts by itself, and {option.partition('=')[0]} would not hold" in said
    assert not (tmp_path / "out").exists()

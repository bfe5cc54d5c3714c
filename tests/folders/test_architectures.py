"""`byom merge` and `byom pack` on many architectures: what they write opens, and equals plain torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from byom.__main__ import main
from tests.folders.architectures import ARCHITECTURES, opened, saved
from tests.problems import slow

State = dict[str, Tensor]


def deltas(name: str, states: dict[str, State], base: State) -> Tensor:
    return torch.stack([states[task][name].float() - base[name].float() for task in "abc"])


def average(name, states, base):
    return torch.stack([states[task][name] for task in "abc"]).mean(0)


def arithmetic(name, states, base):
    weights = torch.tensor([1.0, -0.5, 0.25]).reshape(3, *[1] * base[name].dim())
    return base[name] + 0.4 * (weights * deltas(name, states, base)).sum(0)


def ties(name, states, base):
    """TIES with each tensor trimmed on its own, to the half that is largest."""
    flat = deltas(name, states, base).reshape(3, -1)
    for row in flat:
        kept = row.abs().topk(row.numel() // 2).indices
        mask = torch.zeros_like(row)
        mask[kept] = 1
        row.mul_(mask)
    sign = flat.sum(0).sign()
    agrees = (flat.sign() == sign) & (flat != 0)
    mean = (flat * agrees).sum(0) / agrees.sum(0).clamp(min=1)
    return base[name] + mean.reshape(base[name].shape)


USUAL = ("llama_tied", "bert", "t5", "clip", "mixtral", "convnext")
METHODS: dict[str, tuple[list[str], Callable[..., Tensor]]] = {
    "average": (["merge=average"], average),
    "arithmetic": (["merge=task_arithmetic", "merge.scale=0.4", "merge.weights=[1,-0.5,0.25]"], arithmetic),
    "ties": (["merge=ties", "merge.density=0.5", "merge.scope=tensor"], ties),
}


@pytest.mark.parametrize("name", [*USUAL, *slow(*(name for name in ARCHITECTURES if name not in USUAL))])
def test_a_merged_folder_opens_and_equals_plain_torch(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = saved(name, tmp_path)
    states = {folder: opened(name, tmp_path / folder)[0].state_dict() for folder in ("a", "b", "c")}
    base, learned = model.state_dict(), {key for key, _ in model.named_parameters(remove_duplicate=False)}
    method = list(METHODS)[list(ARCHITECTURES).index(name) % len(METHODS)]
    options, plain = METHODS[method]
    assert main(["merge", "out", "base=base", "experts=[a=a,b=b,c=c]", *options]) == 0, capsys.readouterr().err
    merged, info = opened(name, tmp_path / "out")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    for key, value in merged.state_dict().items():
        expected = plain(key, states, base) if key in learned else base[key]
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", ["llama_tied", "mixtral", "t5", "convnext"])
def test_a_bundle_packed_whole_gives_every_expert_back(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(name, tmp_path, "ab")
    assert main(["pack", "bundle", "base=base", "experts=[a=a,b=b]", "byom=fft", "byom.density=1"]) == 0
    reference, info = opened(name, tmp_path / "bundle" / "reference")
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert main(["unpack", "bundle", "task=b", "out"]) == 0
    unpacked, info = opened(name, tmp_path / "out")
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for key, value in opened(name, tmp_path / "b")[0].state_dict().items():
        assert torch.equal(unpacked.state_dict()[key], value), key
    assert any(not torch.equal(value, unpacked.state_dict()[key]) for key, value in reference.state_dict().items())

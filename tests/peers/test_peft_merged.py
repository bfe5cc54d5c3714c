"""Merged models and tasks as adapters that PEFT loads, in the form that vLLM takes (its rules as of 0.33)."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from byom.checkpoint.adapters.export import adapters
from byom.checkpoint.adapters.merged import exact, write_adapter
from byom.checkpoint.adapters.modules import Site, SiteFactors
from byom.checkpoint.adapters.server import RANKS, task_type
from byom.errors import OptionError
from byom.merge.average import Average
from byom.merge.base import Problem
from byom.merge.core_space import CoreSpace
from byom.merge.knots import KnowledgeOrientationThroughSvd
from byom.merge.task_arithmetic import TaskArithmetic
from byom.merge.ties import Ties
from byom.variants.lora import ByomLora
from byom.weights import Weights
from byom.weights.fused import Rows
from byom.weights.lowrank import Adapted, Piece

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")]

TOKENS = torch.arange(20).reshape(2, 10)
ADAPTED = ("q_proj.weight", "v_proj.weight", "down_proj.weight")


@pytest.fixture(scope="module")
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, max_position_embeddings=16, **sizes)).eval()


def normal(*shape, seed):
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def low_rank(base, task, ends=ADAPTED, replaced=None):
    """Adapt some matrices with ranks from 1 to 3."""
    names = [name for name in base if name.endswith(ends)]
    pieces = {}
    for number, name in enumerate(names):
        (m, n), rank = base.shape(name), 1 + number % 3
        seed = 100 * task + number
        pieces[name] = [Piece(0, normal(m, rank, seed=seed), normal(rank, n, seed=50 + seed))]
    return Adapted(base, pieces, replaced, f"expert {task}")


@pytest.fixture(scope="module")
def problem(llama):
    base = Weights.of({name: value.clone() for name, value in llama.state_dict().items()}, "base")
    return Problem(base, {str(t): low_rank(base, t) for t in range(3)})


def logits(model, state=None):
    model = copy.deepcopy(model)
    if state is not None:
        model.load_state_dict(state)
    with torch.no_grad():
        return model(TOKENS).logits


def loaded(model, folder):
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval()


METHODS = {
    "core_space": CoreSpace(Ties(0.5)),
    "knots": KnowledgeOrientationThroughSvd(Ties(0.5)),
    "task_arithmetic": TaskArithmetic(0.5, (1.0, -0.5, 1.0)),
    "average": Average(),
}


@pytest.mark.parametrize("server", [None, "vllm"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_peft_computes_what_the_merged_model_computes(llama, problem, method, server, tmp_path):
    folder = write_adapter(method.low_rank(problem), tmp_path / "merged", base_model="mine/base", server=server)
    assert sorted(file.name for file in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    expected = logits(llama, method(problem).state())
    found = logits(loaded(llama, folder))
    assert (expected - logits(llama)).abs().max() > 1e-2
    assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_ranks_are_those_of_the_differences_and_nothing_is_cut(problem, tmp_path):
    folder = write_adapter(TaskArithmetic(1.0).low_rank(problem), tmp_path / "a", base_model="mine/base")
    settings, named = (
        json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")),
        load_file(folder / "adapter_model.safetensors"),
    )
    ranks = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): len(value)
        for name, value in named.items()
        if ".lora_A." in name
    }
    expected = {
        name.removesuffix(".weight"): 3 * e.pieces(name)[0].left.shape[1]
        for e in problem.finetuned.values()
        for name in e.factored
    }
    assert ranks == expected and settings["rank_pattern"] == settings["alpha_pattern"] == ranks
    assert settings["task_type"] is None and settings["base_model_name_or_path"] == "mine/base"


def test_vllm_gets_one_rank_that_it_knows_and_its_task(problem, tmp_path):
    """The settings that vLLM's `PEFTHelper` looks at; zeros fill the factors up."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}', encoding="utf-8")
    served = ByomLora(2, rest="drop").serve(problem, problem.pretrained)
    for folder in adapters(served, tmp_path / "out", base_model=str(tmp_path / "base"), server="vllm"):
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        assert (settings["r"], settings["lora_alpha"], settings["task_type"]) == (8, 8, "CAUSAL_LM")
        assert not settings["rank_pattern"] and not settings["alpha_pattern"]
        assert settings["modules_to_save"] is None and settings["bias"] == "none"
        assert not settings["use_rslora"] and not settings["use_dora"]
        named = load_file(folder / "adapter_model.safetensors")
        for name, value in named.items():
            assert value.shape["lora_B" in name] == 8 and name.endswith((".lora_A.weight", ".lora_B.weight"))
        stem = "base_model.model.model.layers.0.self_attn.q_proj"
        change = named[f"{stem}.lora_B.weight"] @ named[f"{stem}.lora_A.weight"]
        name = "model.layers.0.self_attn.q_proj.weight"
        expected = served.weights(folder.name)[name] - problem.pretrained[name]
        assert_close(change, expected, rtol=1e-4, atol=1e-5)


def test_an_exact_product_has_as_many_columns_as_it_has_rank():
    site = Site("w", "weight", Rows("w.weight", 0, 6))
    up, down = normal(6, 2, seed=1), normal(2, 5, seed=2)
    doubled = exact(SiteFactors(site, torch.cat([up, up], 1), torch.cat([down, -0.5 * down])))
    assert doubled.up.shape == (6, 2) and doubled.up.dtype == torch.float32
    assert_close(doubled.up @ doubled.down, 0.5 * up @ down)
    assert_close(doubled.up.norm(dim=0), doubled.down.norm(dim=1))


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [("T5ForConditionalGeneration", "SEQ_2_SEQ_LM"), ("BertModel", "FEATURE_EXTRACTION"), (None, "CAUSAL_LM")],
)
def test_the_task_is_that_of_the_base(architecture, kind, tmp_path):
    if architecture:
        (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}), encoding="utf-8")
    assert task_type(str(tmp_path), "vllm") == kind and task_type(str(tmp_path), None) is None


REFUSED = {
    "a whole module": (("q_proj.weight",), {"model.norm.weight": torch.full((16,), 2.0)}, "model.norm.*rest=drop"),
    "the output matrix": (("q_proj.weight", "lm_head.weight"), None, "'lm_head' is an embedding or the output.*true"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_vllm_does_not_take_is_refused_and_nothing_is_written(problem, what, tmp_path):
    ends, replaced, said = REFUSED[what]
    expert = low_rank(problem.pretrained, 1, ends, replaced)
    with pytest.raises(OptionError, match=said):
        write_adapter(expert, tmp_path / "a", base_model="mine/base", server="vllm")
    assert not (tmp_path / "a").exists()
    assert write_adapter(expert, tmp_path / "a", base_model="mine/base").is_dir()


def test_embeddings_are_written_for_a_server_that_takes_them(problem, tmp_path):
    expert = low_rank(problem.pretrained, 1, ("lm_head.weight",))
    folder = write_adapter(expert, tmp_path / "a", base_model="mine/base", server="vllm", embeddings=True)
    assert any("lm_head" in name for name in load_file(folder / "adapter_model.safetensors"))


def test_ranks_beyond_the_largest_unknown_servers_and_nothing_are_refused(tmp_path):
    base = Weights.of({"fc.weight": torch.zeros(520, 520)}, "base")
    eye = Adapted(base, {"fc.weight": [Piece(0, torch.eye(520)[:, :513], torch.eye(520)[:513])]})
    with pytest.raises(OptionError, match="ranks up to 512, and the adapter has rank 513; cut it first"):
        write_adapter(eye, tmp_path / "a", base_model="b", server="vllm")
    with pytest.raises(OptionError, match="server=tgi is not known; use vllm"):
        write_adapter(eye, tmp_path / "a", base_model="b", server="tgi")
    with pytest.raises(OptionError, match="mine has no low-rank difference to base; write it whole"):
        write_adapter(Adapted(base, {}, origin="mine"), tmp_path / "a", base_model="b")
    assert RANKS[-1] == 512

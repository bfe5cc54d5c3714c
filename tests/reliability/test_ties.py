"""One tensor under several names stays one, whatever file or module it comes from; two stay two."""

import json
import shutil
import warnings

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from byom import checkpoint
from byom.checkpoint.adapters.adapter import Adapter
from byom.checkpoint.adapters.export import adapters
from byom.checkpoint.bundle import Bundle
from byom.checkpoint.files import open_raw
from byom.errors import CheckpointError, OptionError
from byom.merge.base import Problem
from byom.merge.dare import Dare
from byom.merge.localize_and_stitch import LocalizeAndStitch
from byom.merge.task_arithmetic import TaskArithmetic
from byom.merge.wudi import Wudi
from byom.variants.fft import ByomFft
from byom.variants.lora import ByomLora
from byom.weights import Weights
from byom.weights.ties import kept
from tests.problems import bits, same

SMALL = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 18}
GPT2 = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 18, "n_positions": 16, "bos_token_id": 0}
T5 = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2, "vocab_size": 18}
MODELS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=True)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2, eos_token_id=0)),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5, tie_word_embeddings=True)),
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**SMALL)),
}
KEPT = {
    "llama": "model.embed_tokens.weight",
    "gpt2": "transformer.wte.weight",
    "t5": "shared.weight",
    "bert": "bert.embeddings.word_embeddings.weight",
}


@pytest.fixture(scope="module", params=sorted(MODELS))
def model(request):
    torch.manual_seed(0)
    return request.param, MODELS[request.param]().eval()


def moved(module, by=0.1, seed=1):
    """Return a fine-tuned state dict, whose tied names still are one tensor."""
    generator = torch.Generator().manual_seed(seed)
    moves = {}
    return {
        n: moves.setdefault(t.data_ptr(), t + by * torch.randn(t.shape, generator=generator))
        if t.is_floating_point()
        else t
        for n, t in module.state_dict().items()
    }


def test_files_hold_the_name_that_transformers_keeps(model, tmp_path):
    kind, module = model
    state = moved(module)
    folder = Weights.of(dict(sorted(state.items()))).save(tmp_path / "merged")
    module.config.architectures = [type(module).__name__]
    module.config.save_pretrained(tmp_path / "merged")
    names = set(load_file(folder / "model.safetensors"))
    module.save_pretrained(tmp_path / "theirs")
    assert names - {n for n in names if n.endswith("position_ids")} == set(
        load_file(tmp_path / "theirs" / "model.safetensors")
    )
    assert KEPT[kind] in names
    opened, report = type(module).from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    for name, tensor in opened.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize(
    ("names", "first"),
    [
        (["lm_head.weight", "model.decoder.embed_tokens.weight", "model.shared.weight"], "model.shared.weight"),
        (["model.decoder.embed_tokens.weight", "proj_out.weight"], "model.decoder.embed_tokens.weight"),
        (["embed_out.weight", "gpt_neox.embed_in.weight"], "gpt_neox.embed_in.weight"),
        (["lm_head.bias", "lm_head.decoder.bias"], "lm_head.bias"),
        (["lm_loss.weight", "transformer.word_embedding.weight"], "transformer.word_embedding.weight"),
        (["pred_layer.proj.weight", "transformer.embeddings.weight"], "transformer.embeddings.weight"),
        (["output_projection.weight", "biogpt.embed_tokens.weight"], "biogpt.embed_tokens.weight"),
        (["head.weight", "embed"], "embed"),
    ],
)
def test_the_input_embedding_is_kept(names, first):
    assert kept(names) == kept(names[::-1]) == first


def test_ties_come_from_the_configuration_where_files_hold_one_name(model, tmp_path):
    _, module = model
    module.save_pretrained(tmp_path)
    opened, state = Weights.open(tmp_path), Weights.of(module.state_dict())
    assert opened.ties == {a: n for a, n in state.ties.items() if a in opened and n in opened} != {}
    for name in opened:
        assert torch.equal(opened[name], state[name])
    again = Weights.open(opened.save(tmp_path / "again"))
    assert (again.ties, again.fingerprint()) == (opened.ties, opened.fingerprint())
    assert Weights.open(tmp_path / "model.safetensors").ties == opened.ties


def test_a_configuration_that_ties_nothing_or_is_unknown_adds_no_name(tmp_path):
    save_file({"model.embed_tokens.weight": torch.randn(18, 8)}, tmp_path / "model.safetensors")
    for config in (
        {"tie_word_embeddings": False, "architectures": ["LlamaForCausalLM"], "model_type": "llama"},
        {"tie_word_embeddings": True, "architectures": ["LlamaModel"], "model_type": "llama"},
        {"tie_word_embeddings": True, "architectures": ["Unheard"]},
        {"architectures": [3]},
        {"architectures": "LlamaForCausalLM"},
        {"tie_word_embeddings": True, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": "x"},
        [],
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        names = Weights.open(tmp_path).keys()
        assert names in (["model.embed_tokens.weight"], ["lm_head.weight", "model.embed_tokens.weight"])
        assert ("lm_head.weight" in names) == (isinstance(config, dict) and config.get("hidden_size") == "x")


def test_an_unknown_architecture_that_generates_ties_its_only_embedding(tmp_path):
    save_file({"model.embed_tokens.weight": torch.randn(18, 8)}, tmp_path / "model.safetensors")
    config = {"tie_word_embeddings": True, "architectures": ["OddForCausalLM"], "model_type": "odd"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert Weights.open(tmp_path).ties == {"model.embed_tokens.weight": "lm_head.weight"}


def llama_base(tmp_path):
    torch.manual_seed(0)
    module = MODELS["llama"]().eval()
    module.save_pretrained(tmp_path / "base")
    return module, Weights.open(tmp_path / "base")


@pytest.mark.parametrize("road", ["folder", "module", "base model"])
def test_an_adapter_that_would_change_one_of_two_tied_tensors_is_refused(road, tmp_path):
    module, base = llama_base(tmp_path)
    if road != "folder":
        base = Weights.of(load_file(tmp_path / "base" / "model.safetensors"))
    given = {"module": module} if road == "module" else {}
    tuned = {name: value for name, value in moved(module).items() if name in base}
    served = ByomLora(rank=2).serve(Problem(base, {"a": Weights.of(tuned)}), base)
    named = str(tmp_path / "base") if road == "base model" else "base"
    with pytest.raises(OptionError, match=r"is tied to another parameter.*byom pack"):
        adapters(served, tmp_path / "out", base_model=named, **given)
    opened = Bundle.open(Bundle(served.reference, served.deltas).save(tmp_path / "bundle"))  # the remedy
    assert same(opened.weights("a"), served.weights("a"))


def test_the_remedy_for_an_adapter_of_one_tied_module_gives_the_model_that_was_trained(tmp_path):
    peft = pytest.importorskip("peft")
    module, base = llama_base(tmp_path)
    words = torch.arange(12).reshape(2, 6)
    config = peft.LoraConfig(target_modules=["embed_tokens"], r=2, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that merging it would give another model
        trained = peft.get_peft_model(module, config).eval()
    trained.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with torch.no_grad():
        expected = trained(words).logits
    adapter = Adapter.open(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"base\.untied\(\)"):
        adapter.on(base)
    state = adapter.on(base.untied()).state()
    free = hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=False)).eval()
    free.load_state_dict(state, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(free(words).logits, expected)


@pytest.mark.parametrize("configured", [True, False])
def test_a_head_of_its_own_unties_the_base(configured, tmp_path):
    _, base = llama_base(tmp_path)
    tuned = {name: value + 0.5 for name, value in base.state().items()}
    tuned["lm_head.weight"] = tuned["lm_head.weight"] + 1
    (tmp_path / "tuned").mkdir()
    save_file(tuned, tmp_path / "tuned" / "model.safetensors")
    if configured:  # as of a model that was untied without its configuration being told
        shutil.copy(tmp_path / "base" / "config.json", tmp_path / "tuned")
    read = checkpoint.read(tmp_path / "tuned", base)
    assert (read.extra, read.weights.ties) == ({}, {})
    merged = TaskArithmetic(scale=0.5)(Problem(base, {"a": read.weights, "b": base}))
    for name, by in {"model.embed_tokens.weight": 0.5, "lm_head.weight": 1.5}.items():
        torch.testing.assert_close(merged[name], base[name] + 0.5 * by)
    served = ByomFft(density=1.0).serve(Problem(base, {"a": read.weights}), base)
    for name, value in tuned.items():
        assert bits(served.weights("a")[name]) == bits(value)
    assert len(load_file(merged.save(tmp_path / "out") / "model.safetensors")) == len(tuned)


@pytest.mark.parametrize("method", [Dare(TaskArithmetic(), seed=3), Wudi(steps=3), LocalizeAndStitch(steps=3)])
@pytest.mark.parametrize("road", ["memory", "file"])
def test_equal_copies_have_one_merged_value(method, road, tmp_path):
    def copied(seed):
        words = torch.randn(9, 6, generator=torch.Generator().manual_seed(seed)) * (1 if seed == 0 else 0.1)
        state = {"embed.weight": words, "layer.weight": words[:6] + 1, "layer.bias": torch.zeros(6)}
        if seed:
            state = {n: t + copied(0)[n] if n != "layer.bias" else t for n, t in state.items()}
        return state | {"head.weight": state["embed.weight"].clone(), "other.bias": torch.zeros(6)}

    def weights(seed):
        if road == "memory":
            return Weights.of(copied(seed))
        save_file(copied(seed), tmp_path / f"{seed}.safetensors")
        return Weights.open(tmp_path / f"{seed}.safetensors")

    problem = Problem(weights(0), {"a": weights(1), "b": weights(2)})
    assert problem.pretrained.ties == {"head.weight": "embed.weight"}  # and the zeros of two biases are two
    if isinstance(method, LocalizeAndStitch):
        from tests.problems import posed

        problem = posed(weights(0), {"a": weights(1), "b": weights(2)})
    merged = method(problem)
    assert bits(merged["head.weight"]) == bits(merged["embed.weight"])
    written = load_file(merged.save(tmp_path / "merged") / "model.safetensors")
    assert set(written) == set(copied(0))  # as the files had it: nobody knows that a model would tie them


def test_copies_that_differ_in_one_model_are_two_tensors():
    embed = torch.randn(9, 6)
    base = Weights.of({"embed": embed, "head": embed.clone()})
    tuned = Weights.of({"embed": embed + 1, "head": embed + 2})
    assert Problem(base, {"a": base, "b": tuned}).pretrained.ties == {}


def test_tensors_without_values_are_refused_by_name():
    with torch.device("meta"):
        state = {"a.weight": torch.zeros(2, 2), "b.weight": torch.zeros(2, 2)}
    with pytest.raises(CheckpointError, match=r"a\.weight, b\.weight have no values.*device_map"):
        Weights.of(state | {"c": torch.ones(1)})


def test_names_of_one_tensor_stay_tied_without_the_first_of_them():
    words = torch.randn(4, 3)
    weights = Weights.of({"decoder.embed": words, "encoder.embed": words, "shared": words})
    assert weights.select(lambda name: name != "decoder.embed").ties == {"shared": "encoder.embed"}


@pytest.mark.parametrize("held", ["one name", "both, shared", "both, copied"])
def test_pickles_beside_a_configuration_that_ties(held, tmp_path):
    model = MODELS["llama"]()
    state = model.state_dict()
    if held == "one name":
        del state["lm_head.weight"]
    elif held == "both, copied":
        state["lm_head.weight"] = state["lm_head.weight"].clone()
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({**model.config.to_dict(), "architectures": ["LlamaForCausalLM"]}))
    opened, _ = open_raw(tmp_path)
    whole = Weights.of(model.state_dict())
    assert opened.ties == whole.ties
    assert (opened - whole).norm() == 0

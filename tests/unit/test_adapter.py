"""PEFT adapters: read exactly, or refused with the file, the tensor and what to do."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from byom.checkpoint.adapters.adapter import Adapter
from byom.errors import CheckpointError
from byom.weights import Weights

ROOT = "base_model.model."
SETTINGS = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "base_model_name_or_path": "some/base"}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def factors(path, out, inputs, rank=2, seed=0, name=""):
    return {
        f"{path}.lora_A{name}.weight": normal(rank, inputs, seed=seed),
        f"{path}.lora_B{name}.weight": normal(out, rank, seed=seed + 1),
    }


def rooted(tensors):
    return {ROOT + key: value for key, value in tensors.items()}


@pytest.fixture
def write(tmp_path):
    """Write an adapter's folder as PEFT does."""

    def write(tensors, root=ROOT, **settings):
        (tmp_path / "adapter_config.json").write_text(json.dumps(SETTINGS | settings))
        save_file(
            {root + key: value.contiguous() for key, value in tensors.items()}, tmp_path / "adapter_model.safetensors"
        )
        return tmp_path

    return write


def layers(count=2, start="", **more):
    """A base with square and other linear layers."""
    state = {}
    for i in range(count):
        state |= {f"{start}layer.{i}.q.weight": normal(4, 4, seed=i), f"{start}layer.{i}.q.bias": normal(4, seed=i)}
        state |= {f"{start}layer.{i}.up.weight": normal(6, 4, seed=i), f"{start}layer.{i}.norm.weight": normal(4)}
    return Weights.of(state | more, origin="base")


def product(adapted, path):
    """``B A`` as it was written."""
    return adapted[f"{path}.lora_B.weight"] @ adapted[f"{path}.lora_A.weight"]


# what is read


@pytest.mark.parametrize("root", [ROOT, ""])
@pytest.mark.parametrize("name", ["", ".default", ".other"])
def test_the_difference_is_the_scaled_product(write, root, name):
    base = layers()
    plain = factors("layer.0.q", 4, 4) | factors("layer.1.up", 6, 4)
    folder = write(factors("layer.0.q", 4, 4, name=name) | factors("layer.1.up", 6, 4, name=name), root)
    adapter = Adapter.open(folder)
    ours = Adapter.open(folder).on(base)
    assert sorted(ours.factored) == ["layer.0.q.weight", "layer.1.up.weight"]
    for path in ("layer.0.q", "layer.1.up"):
        assert_close(ours[f"{path}.weight"], base[f"{path}.weight"] + 3 * product(plain, path))
        assert not torch.equal(ours[f"{path}.weight"], base[f"{path}.weight"])
    assert torch.equal(ours["layer.1.q.weight"], base["layer.1.q.weight"])
    assert adapter.parameters == 2 * (4 + 4) + 2 * (6 + 4) and adapter.rank == 2
    assert ours.origin == str(folder) and ours.on(base)


@pytest.mark.parametrize("rslora", [False, True])
def test_patterns_are_matched_at_the_end_of_paths_and_the_first_counts(write, rslora):
    tensors = (
        factors("a.layer.0.q", 4, 4, rank=3) | factors("a.layer.1.q", 4, 4, rank=4) | factors("a.layer.1.up", 6, 4)
    )
    folder = write(
        tensors,
        use_rslora=rslora,
        rank_pattern={"^a.layer.0.q": 3, "layer.1.q": 4, "q": 9, "layer": 7},
        alpha_pattern={"q": 5, "1.q": 100, r"layer\.\d\.u": 100, "^layer.1.up": 100},
    )
    ours = Adapter.open(folder)
    assert {path: layer.rank for path, layer in ours.layers.items()} == {
        "a.layer.0.q": 3,
        "a.layer.1.q": 4,
        "a.layer.1.up": 2,
    }
    over = [3, 4, 2] if not rslora else [3**0.5, 2, 2**0.5]
    scales = [ours.layers[path].scale for path in sorted(ours.layers)]
    assert scales == pytest.approx([5 / over[0], 5 / over[1], 6 / over[2]])


def test_transposed_weights(write):
    """Shapes decide; a square matrix follows the configuration, and what its neighbours show."""
    square, wide = factors("h.c", 4, 4), factors("h.up", 6, 4)
    base = Weights.of({"h.c.weight": normal(4, 4), "h.up.weight": normal(4, 6)})
    for tensors, settings in (
        (square, {"fan_in_fan_out": True}),
        (square | wide, {}),
        (square | wide, {"fan_in_fan_out": True}),
    ):
        ours = Adapter.open(write(tensors, **settings)).on(base)
        assert_close(ours["h.c.weight"], base["h.c.weight"] + 3 * product(square, "h.c").T)
        if "h.up.lora_A.weight" in tensors:
            assert_close(ours["h.up.weight"], base["h.up.weight"] + 3 * product(wide, "h.up").T)
    assert_close(Adapter.open(write(square)).on(base)["h.c.weight"], base["h.c.weight"] + 3 * product(square, "h.c"))


def test_embeddings_convolutions_and_their_shapes(write):
    down, up = normal(2, 3, 5, 5), normal(4, 2, 1, 1)
    words = {"word.lora_embedding_A": normal(2, 7), "word.lora_embedding_B": normal(4, 2)}
    square = {"seat.lora_embedding_A.default": normal(2, 4), "seat.lora_embedding_B.default": normal(4, 2, seed=1)}
    base = Weights.of({"conv.weight": normal(4, 3, 5, 5), "word.weight": normal(7, 4), "seat.weight": normal(4, 4)})
    ours = Adapter.open(write({"conv.lora_A.weight": down, "conv.lora_B.weight": up} | words | square)).on(base)
    assert_close(ours["conv.weight"], base["conv.weight"] + 3 * torch.einsum("or,rikl->oikl", up[..., 0, 0], down))
    for name, (a, b) in {"word": words.values(), "seat": square.values()}.items():
        assert_close(ours[f"{name}.weight"], base[f"{name}.weight"] + 3 * (b @ a).T)


@pytest.mark.parametrize("fused", ["attn.in_proj_weight", "attn.weight"])
def test_slices_of_fused_attention(write, fused):
    base = Weights.of({fused: normal(12, 4), fused.replace("weight", "bias"): normal(12)})
    tensors = factors("attn.q_proj", 4, 4) | factors("attn.v_proj", 4, 4, seed=5)
    bias = normal(4, seed=9)
    folder = write(tensors | {"attn.k_proj.bias": bias}, bias="all")
    ours = Adapter.open(folder).on(base)
    delta = torch.cat([product(tensors, "attn.q_proj"), torch.zeros(4, 4), product(tensors, "attn.v_proj")])
    assert_close(ours[fused], base[fused] + 3 * delta)
    assert [piece.start for piece in ours.pieces(fused)] == [0, 8]
    name = fused.replace("weight", "bias")
    assert_close(ours[name], torch.cat([base[name][:4], bias, base[name][8:]]))


def test_attention_as_one_module(write):
    """The output projection lies within it, has its rank, and counts twice, as it does in PEFT."""
    base = Weights.of({"0.attn.in_proj_weight": normal(12, 4), "0.attn.out_proj.weight": normal(4, 4)})
    tensors = factors("0.attn", 12, 4, rank=3) | factors("0.attn.base_layer.out_proj", 4, 4, rank=3)
    ours = Adapter.open(write(tensors, rank_pattern={"attn": 3})).on(base)
    assert_close(ours["0.attn.in_proj_weight"], base["0.attn.in_proj_weight"] + 2 * product(tensors, "0.attn"))
    delta = product(tensors, "0.attn.base_layer.out_proj")
    assert_close(ours["0.attn.out_proj.weight"], base["0.attn.out_proj.weight"] + 2 * 2 * delta)
    for version in ("0.18.0", "0.21.2", None):
        Adapter.open(write(tensors, rank_pattern={"attn": 3}, peft_version=version))
    with pytest.raises(CheckpointError, match=r"of 0\.22\.0 it is not known.*merge_and_unload"):
        Adapter.open(write(tensors, rank_pattern={"attn": 3}, peft_version="0.22.0"))


def test_trained_biases_and_whole_modules_replace_the_bases(write):
    base = layers()
    kept = {"layer.0.q.base_layer.bias": normal(4, seed=5), "layer.1.norm.weight": normal(4, seed=6)}
    head = {"classifier.dense.weight": normal(3, 4), "classifier.dense.bias": normal(3)}
    same = {"layer.1.q.bias": base["layer.1.q.bias"].clone()}
    adapter = Adapter.open(
        write(factors("layer.0.q", 4, 4) | kept | head | same, bias="all", modules_to_save=["norm", "classifier"])
    )
    ours = adapter.on(base)
    assert torch.equal(ours["layer.0.q.bias"], kept["layer.0.q.base_layer.bias"])
    assert torch.equal(ours["layer.1.norm.weight"], kept["layer.1.norm.weight"])
    assert sorted(adapter.replaced(base)) == sorted(ours.replaced) == ["layer.0.q.bias", "layer.1.norm.weight"]
    assert sorted(adapter.heads(base)) == sorted(head)
    assert adapter.parameters == 16 + 4 + 4 + 15 + 4


def test_a_bias_of_the_factors_is_scaled_and_added(write):
    base, added, trained = layers(), normal(4, seed=5), normal(4, seed=6)
    tensors = factors("layer.0.q", 4, 4) | {"layer.0.q.lora_B.bias": added}
    assert_close(Adapter.open(write(tensors)).on(base)["layer.0.q.bias"], base["layer.0.q.bias"] + 3 * added)
    both = write(tensors | {"layer.0.q.base_layer.bias": trained}, bias="lora_only")
    assert_close(Adapter.open(both).on(base)["layer.0.q.bias"], trained + 3 * added)


def test_what_no_forward_pass_reads_is_left_out(write):
    base = layers()
    tensors = factors("layer.0.q", 4, 4) | {
        "classifier.modules_to_save.bias": normal(3),
        "classifier.bias": normal(3),
        "classifier.original_module.bias": normal(3, seed=1),
    }
    heads = Adapter.open(write(tensors, bias="all", modules_to_save=["classifier"])).heads(base)
    assert list(heads) == ["classifier.bias"] and torch.equal(heads["classifier.bias"], tensors["classifier.bias"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_factors_of_any_precision_are_widened_before_they_are_scaled(write, dtype):
    base = layers()
    tensors = {key: value.to(dtype) for key, value in factors("layer.0.q", 4, 4).items()}
    ours = Adapter.open(write(tensors, lora_alpha=2 / 3)).on(base)
    exact = {key: value.double() for key, value in tensors.items()}
    (piece,) = ours.pieces("layer.0.q.weight")
    assert piece.left.dtype == piece.right.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    delta = ours["layer.0.q.weight"].double() - base["layer.0.q.weight"].double()
    assert_close(delta, product(exact, "layer.0.q") / 3, rtol=0, atol=1e-6)


def test_a_pickled_file(write):
    folder = write(factors("layer.0.q", 4, 4))
    ours = Adapter.open(folder).on(layers())
    (folder / "adapter_model.safetensors").unlink()
    torch.save(rooted(factors("layer.0.q", 4, 4)), folder / "adapter_model.bin")
    assert torch.equal(Adapter.open(folder).on(layers())["layer.0.q.weight"], ours["layer.0.q.weight"])


def test_two_tied_modules_adapted_alike_move_once(write):
    a, b = normal(2, 7), normal(4, 2)
    tied = normal(7, 4)
    base = Weights.of({"embed.weight": tied, "head.weight": tied})
    words = {"embed.lora_embedding_A": a, "embed.lora_embedding_B": b}
    ours = Adapter.open(write(words | {"head.lora_A.weight": b.T, "head.lora_B.weight": a.T})).on(base)
    for name in ("embed.weight", "head.weight"):
        assert_close(ours[name], tied + 3 * (b @ a).T)
        assert len(ours.pieces(name)) == 1
    half = Weights.of({"embed.weight": (t := tied.bfloat16()), "head.weight": t})
    ours = Adapter.open(write(words | {"head.lora_A.weight": b.T, "head.lora_B.weight": a.T})).on(half)
    assert ours["head.weight"].dtype == ours["embed.weight"].dtype == torch.float32
    with pytest.raises(CheckpointError, match=r"'embed\.weight' and not 'head\.weight' alike.*Untie"):
        Adapter.open(write(words)).on(base)
    with pytest.raises(CheckpointError, match="alike.*Untie"):
        Adapter.open(write(words | {"head.lora_A.weight": 2 * b.T, "head.lora_B.weight": a.T})).on(base)
    with pytest.raises(CheckpointError, match=r"'head\.weight' and not 'embed\.weight' alike.*Untie"):
        whole = factors("x", 4, 4) | {"head.weight": normal(7, 4, seed=1)}
        Adapter.open(write(whole, modules_to_save=["head"])).on(Weights.of(base.state() | {"x.weight": normal(4, 4)}))


# where it goes


@pytest.mark.parametrize("ours", ["", "model.", "x.encoder."])
@pytest.mark.parametrize("theirs", ["", "bert.", "bert.encoder.", "0.auto_model."])
def test_names_may_start_differently(write, ours, theirs):
    tensors = factors(f"{theirs}layer.0.q", 4, 4) | factors(f"{theirs}layer.1.up", 6, 4)
    folder = write(tensors | {f"{theirs}layer.0.norm.weight": normal(4, seed=3)}, modules_to_save=["norm"])
    base = layers(start=ours, other=normal(3))
    adapted = Adapter.open(folder).on(base)
    assert sorted(adapted.factored) == [f"{ours}layer.0.q.weight", f"{ours}layer.1.up.weight"]
    assert list(adapted.replaced) == [f"{ours}layer.0.norm.weight"]


def test_names_that_fit_as_they_are_stay(write):
    state = layers().state() | {f"copy.{name}": value.clone() for name, value in layers().state().items()}
    adapted = Adapter.open(write(factors("layer.0.q", 4, 4))).on(Weights.of(state))
    assert list(adapted.factored) == ["layer.0.q.weight"]


def test_two_places_are_refused(write):
    state = {f"{tower}.{name}": v.clone() for tower in ("image", "text") for name, v in layers().state().items()}
    with pytest.raises(CheckpointError, match=r"'layer.0.q' may be any of 'image.layer.0.q', 'text.layer.0.q'.*select"):
        Adapter.open(write(factors("layer.0.q", 4, 4))).on(Weights.of(state))


@pytest.mark.parametrize(
    "path", ["layer.7.q", "layer.0.v", "encoder.block.0.q", "7.q"], ids=["depth", "module", "names", "number"]
)
def test_another_base_is_refused(write, path):
    """No layer's number is dropped to find a place: ``layer.7`` is not put onto the only layer there is."""
    with pytest.raises(CheckpointError, match=rf"base does not have: {path}.*'some/base'. Give that one"):
        Adapter.open(write(factors(path, 4, 4))).on(layers(count=1))


def test_a_base_of_another_size_is_refused(write):
    with pytest.raises(CheckpointError, match=r"'layer.0.q', \(5, 2\) and \(2, 4\), do not fit \(4, 4\).*some/base"):
        Adapter.open(write(factors("layer.0.q", 5, 4))).on(layers())
    conv = {"layer.0.q.lora_A.weight": normal(2, 4, 1, 1), "layer.0.q.lora_B.weight": normal(4, 2, 1, 1)}
    with pytest.raises(CheckpointError, match=r"do not fit \(4, 4\)"):
        Adapter.open(write(conv)).on(layers())
    with pytest.raises(CheckpointError, match=r"'layer.0.q.bias' has shape \(5,\).*\(4,\).*some/base"):
        Adapter.open(write(factors("layer.0.q", 4, 4) | {"layer.0.q.bias": normal(5)}, bias="all")).on(layers())
    resized = factors("layer.0.q", 4, 4) | {"layer.0.q.base_layer.weight": normal(9, 4)}
    with pytest.raises(CheckpointError, match=r"has shape \(9, 4\)"):
        Adapter.open(write(resized)).on(layers())


def test_a_part_of_a_layer_that_the_base_has_not_is_no_head(write):
    tensors = factors("layer.0.q", 4, 4) | {"layer.0.extra.bias": normal(4)}
    with pytest.raises(CheckpointError, match=r"'layer.0.extra.bias', which base does not have"):
        Adapter.open(write(tensors, bias="all")).on(layers())


def test_a_bias_of_the_factors_without_a_bias_in_the_base_is_refused(write):
    tensors = factors("layer.0.up", 6, 4) | {"layer.0.up.lora_B.bias": normal(6)}
    with pytest.raises(CheckpointError, match="bias of 'layer.0.up'.*which has none"):
        Adapter.open(write(tensors)).on(layers())


def test_rows_that_are_adapted_twice_are_refused(write):
    base = Weights.of({"attn.in_proj_weight": normal(12, 4)})
    with pytest.raises(CheckpointError, match="rows of 'attn.in_proj_weight' twice"):
        Adapter.open(write(factors("attn", 12, 4) | factors("attn.k_proj", 4, 4))).on(base)


# what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3' is not a low-rank difference.*merge_and_unload"),
        ({"peft_type": None}, "peft_type=None"),
        *[({name: value}, f"{name} is set.*merge_and_unload") for name, value in [
            ("use_dora", True),
            ("use_qalora", True),
            ("use_bdlora", {"nblocks": 2}),
            ("kasa_config", {"beta": 1}),
            ("monteclora_config", {"num_samples": 8}),
            ("arrow_config", {"top_k": 3}),
            ("alora_invocation_tokens", [1]),
            ("trainable_token_indices", [1]),
            ("target_parameters", ["experts.up"]),
            ("layer_replication", [[0, 2]]),
        ]],
        ({"use_sometime": True}, "use_sometime is a variant of LoRA that is not known"),
        *[({"init_lora_weights": start}, f"{start}' may have changed the base.*weight_conversion.*merge_and_unload")
          for start in ("pissa", "pissa_niter_16", "olora", "corda", "lora_ga")],
        ({"init_lora_weights": "loftq"}, r"'loftq' may have changed the base[^_]*not a difference to it. Merge it"),
        ({"r": 0}, "r=0 and rank_pattern"),
        ({"r": "8"}, "r=8 and rank_pattern"),
        ({"rank_pattern": {"q": 1.5}}, "rank_pattern={'q': 1.5} must be whole numbers"),
        ({"rank_pattern": ["q"]}, "broken"),
        ({"lora_alpha": None}, "lora_alpha=None.*must be numbers"),
        ({"alpha_pattern": {"q": float("nan")}}, "alpha_pattern.*must be numbers"),
        ({"alpha_pattern": {"(": 1}}, "not a regular expression"),
        ({"bias": "some"}, "bias='some' is not one of none, lora_only and all"),
        ({"modules_to_save": "classifier"}, "modules_to_save='classifier' is not a list"),
    ],
)  # fmt: skip
def test_configurations_that_are_refused(write, settings, message):
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json.*{message}"):
        Adapter.open(write(factors("layer.0.q", 4, 4), **settings))


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal", "mica", "Gaussian"])
def test_starts_that_leave_the_base_alone_are_read(write, start):
    assert Adapter.open(write(factors("layer.0.q", 4, 4), init_lora_weights=start)).rank == 2


@pytest.mark.parametrize(("text", "message"), [("{", "broken: no JSON"), ("[]", "broken: not a table")])
def test_broken_configurations_are_refused(write, text, message):
    folder = write(factors("layer.0.q", 4, 4))
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json is {message}.*Fetch or save"):
        Adapter.open(folder)


def test_missing_files_are_refused(write):
    folder = write(factors("layer.0.q", 4, 4))
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match="neither adapter_model.safetensors nor adapter_model.bin; give the folder"
    ):
        Adapter.open(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_config\.json cannot be read.*give the folder"):
        Adapter.open(folder)


def test_truncated_files_are_refused(write):
    folder = write(factors("layer.0.q", 4, 4))
    file, pickled = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is damaged"):
        Adapter.open(folder)
    file.unlink()
    torch.save(factors("layer.0.q", 4, 4), pickled)
    pickled.write_bytes(pickled.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin is damaged"):
        Adapter.open(folder)
    for odd, message in (
        ({"a": object}, "damaged or holds more than tensors"),
        ([1], "something else than named tensors"),
    ):
        torch.save(odd, pickled)
        with pytest.raises(CheckpointError, match=message):
            Adapter.open(folder)


Q = factors("layer.0.q", 4, 4)
A, B = "layer.0.q.lora_A.weight", "layer.0.q.lora_B.weight"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({A: Q[A]}, "'layer.0.q' has no lora_B.*incomplete"),
        ({B: Q[B]}, "'layer.0.q' has no lora_A.*incomplete"),
        ({"w.lora_embedding_A": Q[A]}, "'w' has no lora_embedding_B"),
        ({}, "holds no LoRA factors.*Give a LoRA adapter"),
        (Q | {B: normal(4, 3)}, r"2 rows in lora_A \(2, 4\) and 3 columns in lora_B \(4, 3\)"),
        ({A: normal(3, 4), B: normal(4, 3)}, r"rank 3, and .*adapter_config\.json says 2"),
        ({A: normal(2, 4, 3, 3), B: normal(4, 1, 1, 1)}, r"grouped convolutions are not read"),
        (Q | {A: normal(0, 4)}, r"'layer.0.q' has a factor of shape \(0, 4\).*Gather"),
        (Q | {A: normal(0)}, r"shape \(0,\).*Gather"),
        (Q | {A: torch.ones(2, 4, dtype=torch.int8)}, "torch.int8; save them in fp16"),
        ({A: normal(2, 4, 3, 3), B: normal(4, 2, 3, 3)}, "must end in ones"),
        (Q | {A: torch.full((2, 4), torch.nan)}, f"tensor '{ROOT}{A}' has values that are NaN.*Use an adapter"),
        (Q | {B: torch.full((4, 2), torch.inf)}, f"tensor '{ROOT}{B}' has values that are NaN or infinite"),
        (Q | {"layer.1.norm.weight": normal(4)}, r"neither LoRA factors.*: layer\.1\.norm\.weight\. Save"),
        (Q | {"layer.0.q.bias": normal(4)}, r"neither LoRA factors.*: layer\.0\.q\.bias"),
        (Q | {"layer.0.q.lora_magnitude_vector": normal(4)}, "neither.*lora_magnitude_vector"),
        (Q | {"layer.0.q.lora_A.bias": normal(2)}, "neither.*lora_A.bias"),
        (
            Q | factors("layer.0.q", 4, 4, seed=3, name=".default"),
            "twice with different values.*Save one adapter per file",
        ),
        (Q | factors("layer.0.base_layer.q", 4, 4), "adapts 'layer.0.q' twice"),
    ],
)
def test_files_that_are_refused(write, tensors, message):
    with pytest.raises(CheckpointError, match=rf"adapter_model\.safetensors.*{message}"):
        Adapter.open(write(tensors))


def test_every_unknown_tensor_is_counted(write):
    more = {f"layer.{i}.norm.weight": normal(4) for i in range(9)}
    with pytest.raises(CheckpointError, match="layer.0.norm.weight, .* and 4 more"):
        Adapter.open(write(Q | more))


# the hub


def test_a_hub_id_is_fetched_at_its_revision(write, monkeypatch):
    import huggingface_hub

    folder, asked = write(Q), []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *args, **more: asked.append((args, more)) or str(folder)
    )
    adapter = Adapter.open("some/adapter", "abc")
    assert adapter.origin == "some/adapter"
    names = ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"]
    assert asked == [(("some/adapter",), {"revision": "abc", "allow_patterns": names})]


def test_a_hub_that_cannot_be_reached_is_said(monkeypatch):
    import huggingface_hub

    def fail(*args, **more):
        raise OSError("no network\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"some/adapter is not a folder.*'main': OSError: no network\. If.*copy"):
        Adapter.open("some/adapter")
    with pytest.raises(CheckpointError, match="neither a folder nor the id"):
        Adapter.open("/no/such/folder")

"""Checkpoints of other formats become the backbone's own names: the same bits, the same features, nothing lost."""

import pytest
import torch
from safetensors.torch import save_file

from byom.backbone.clip import Clip
from byom.checkpoint import read
from byom.checkpoint.clip import from_hugging_face, to_hugging_face
from byom.checkpoint.convert import convert
from byom.checkpoint.recognise import same_left_overs
from byom.errors import CheckpointError
from byom.weights import Weights
from tests.tiny_clip import SIZES, tiny_clip

LEFT_OVERS = {
    "model.positional_embedding": (77, 32), "model.text_projection": (32, 32), "model.logit_scale": (),
    "model.token_embedding.weight": (50, 32), "model.ln_final.weight": (32,), "model.ln_final.bias": (32,),
}  # fmt: skip


@pytest.fixture(scope="module")
def clip():
    tiny_clip()
    return Clip(model="byom-tiny", pretrained="random")


@pytest.fixture(scope="module")
def base(clip):
    return Weights.of(clip.load().state_dict(), origin="pre-trained")


def moved(base, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {n: base[n] + 0.01 * torch.randn(base.shape(n), generator=generator) for n in base}


def vision(state, projection=True):
    """A transformers model that holds the tower."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

    model = (CLIPVisionModelWithProjection if projection else CLIPVisionModel)(CLIPVisionConfig(**SIZES))
    theirs = to_hugging_face(Weights.of(state)).state()
    own = {name.removeprefix("" if projection else "vision_model."): t for name, t in theirs.items()}
    model.load_state_dict({name: own[name] for name in model.state_dict()})
    return model.eval()


def equal(found, state):
    return all(torch.equal(found[name], state[name]) for name in state)


def test_features_are_those_of_transformers(clip, base):
    state, pixels = moved(base), torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    encoder = clip.load()
    encoder.load_state_dict(state)
    normalised = (pixels.float() - encoder.mean) / encoder.std
    with torch.inference_mode():
        theirs = vision(state)(pixel_values=normalised).image_embeds
        assert torch.allclose(encoder(pixels), theirs, atol=1e-5)


@pytest.mark.parametrize("form", ["with projection", "version 5", "version 4", "whole"])
def test_hugging_face_names_round_trip_to_the_bit(tmp_path, base, form):
    state = moved(base)
    model = vision(state, projection=form in ("with projection", "whole"))
    theirs = {name: t.contiguous() for name, t in model.state_dict().items()}
    if form == "version 4":
        theirs = {f"vision_model.{name}": t for name, t in theirs.items()}
        theirs["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    if form == "whole":
        theirs |= {"text_model.final_layer_norm.weight": torch.ones(3), "logit_scale": torch.ones(())}
    save_file(theirs, tmp_path / "model.safetensors")
    found = read(tmp_path, base)
    assert found.format.startswith("Hugging Face CLIP")
    if form.startswith("version"):
        assert "visual.proj" in found.notes[0] and torch.equal(found.weights["visual.proj"], base["visual.proj"])
        state = {name: t for name, t in state.items() if name != "visual.proj"}
    assert equal(found.weights, state)
    back = to_hugging_face(found.weights)
    assert equal(back, vision(found.weights.state()).state_dict())


def test_transformers_opens_what_convert_writes(tmp_path, base):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    state = moved(base)
    Weights.of(state).save(tmp_path / "ours")
    lines = list(convert(tmp_path / "ours", tmp_path / "theirs", base, to="huggingface"))
    assert lines == [f"safetensors: {len(to_hugging_face(base))} tensors, {base.numel:,} parameters"]
    CLIPVisionConfig(**SIZES).save_pretrained(tmp_path / "theirs")
    model = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "theirs")
    assert equal(model.state_dict(), vision(state).state_dict())


def image_encoder(state, seed=0):
    """The state dict of an image encoder of the task vectors' code."""
    generator = torch.Generator().manual_seed(seed)
    left = {name: torch.randn(shape, generator=generator) for name, shape in LEFT_OVERS.items()}
    return {f"model.{name}": t for name, t in state.items()} | left


def test_text_left_overs_are_frozen_and_counted_both_ways(tmp_path, base):
    state = moved(base)
    torch.save(image_encoder(state), tmp_path / "finetuned.pt")
    found = read(tmp_path / "finetuned.pt", base)
    assert found.format == "ImageEncoder, PyTorch state dict"
    assert equal(found.weights, state) and set(found.weights) == set(base)
    left = sum(torch.Size(shape).numel() for shape in LEFT_OVERS.values())
    assert found.conventions == {"encoder": base.numel, "with frozen": base.numel + left}


def test_left_overs_that_differ_are_no_left_overs(tmp_path, base):
    for task, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.save(image_encoder(moved(base), seed), tmp_path / f"{task}.pt")
    found = {task: read(tmp_path / f"{task}.pt", base) for task in "abc"}
    shared = same_left_overs((task, found[task]) for task in "ab")
    assert {f"model.{name}" for name in shared} == set(LEFT_OVERS)
    with pytest.raises(CheckpointError, match="tensors of c differ from those of a"):
        same_left_overs(found.items())


def test_missing_unknown_and_misshapen_tensors_are_named(tmp_path, base):
    state = moved(base)
    cases = {
        "lacks 1 of .*: visual.conv1.weight": {n: t for n, t in state.items() if n != "visual.conv1.weight"},
        "neither the backbone's nor a head's: visual.adapter": state | {"visual.adapter": torch.ones(2)},
        r"'visual.conv1.weight' has shape \[2\]": state | {"visual.conv1.weight": torch.ones(2)},
    }
    for message, tensors in cases.items():
        torch.save(tensors, tmp_path / "x.pt")
        with pytest.raises(CheckpointError, match=message):
            read(tmp_path / "x.pt", base)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_shards_and_single_files_of_a_classifier(tmp_path, form):
    from transformers import RobertaConfig, RobertaForSequenceClassification, RobertaModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = RobertaConfig(vocab_size=60, max_position_embeddings=40, num_labels=3, **sizes)
    model = RobertaForSequenceClassification(config)
    bare = RobertaModel(config, add_pooling_layer=False).state_dict()
    base = Weights.of({f"model.{name}": t for name, t in bare.items()})
    if form == "safetensors":
        model.save_pretrained(tmp_path, max_shard_size="4KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
    else:
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    found = read(tmp_path, base)
    assert equal(found.weights, {f"model.{n}": model.roberta.state_dict()[n] for n in bare})
    assert set(found.extra) == {f"classifier.{part}.{k}" for part in ("dense", "out_proj") for k in ("weight", "bias")}


@pytest.mark.slow
def test_the_real_vit_b32_is_exact(tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    clip = Clip(model="ViT-B-32", pretrained="random")
    encoder = clip.load()
    base = Weights.of(encoder.state_dict())
    config = CLIPVisionConfig(patch_size=32, projection_dim=512)
    model = CLIPVisionModelWithProjection(config).eval()
    model.save_pretrained(tmp_path)
    found = read(tmp_path, base)
    assert found.weights.numel == 87_849_216
    assert clip.frozen_parameters + found.weights.numel == 113_448_705
    encoder.load_state_dict(found.weights.state())
    pixels = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    with torch.inference_mode():
        theirs = model(pixel_values=(pixels.float() - encoder.mean) / encoder.std).image_embeds
        assert torch.allclose(encoder(pixels), theirs, atol=1e-5)
    assert equal(to_hugging_face(found.weights), model.state_dict())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
@pytest.mark.parametrize("wrapped", [True, False], ids=["the tower", "the model"])
def test_adapters_of_transformers_clip_fit_open_clip(tmp_path, clip, base, wrapped):
    from peft import LoraConfig, get_peft_model

    state = dict(base.state())
    whole = vision(state)
    part = whole.vision_model if wrapped else whole
    targets = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1"]
    peft = get_peft_model(part, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    peft.save_pretrained(tmp_path)
    found = read(tmp_path, base)
    assert found.format == "PEFT adapter"
    merged = peft.merge_and_unload()
    if wrapped:
        whole.vision_model = merged
    expected = from_hugging_face(Weights.of(whole.state_dict()), base, "visual.")[0]
    for name in base:
        assert torch.allclose(found.weights[name], expected[name], atol=1e-6), name
    fused = "visual.transformer.resblocks.0.attn.in_proj_weight"
    assert not torch.equal(found.weights[fused], base[fused])
    assert len(found.weights.factored[fused]) == 3  # query, key and value stay low-rank

"""Tiny models in the formats of the published families, filed under their real names in the hub of `tests.hub`."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import nn

from byom.backbone.clip import Clip
from byom.checkpoint.clip import to_hugging_face
from byom.cli import config
from byom.weights import Weights
from tests.hub import WORDS, add_model, tasks
from tests.tiny_clip import SIZES, tiny_clip

NOISE = 0.02
LAYERS = 1
"""Layers of each model: one has every kind of tensor."""
IMAGES = SIZES | {"num_hidden_layers": LAYERS}
LEFT_OVERS = {"positional_embedding": (77, 32), "token_embedding.weight": (60, 32), "logit_scale": ()}
ANSWERS = ["yes", "no", "entailment", "neutral", "contradiction", "acceptable", "unacceptable", "positive", "negative",
           *(f"{i / 5:.1f}" for i in range(26))]  # fmt: skip


def add_experts(home: Path, option: str, suite: str, work: Path) -> None:
    """Write what an option of ``experts=`` names, for the tasks of a suite.

    Args:
        home: The hub's folder.
        option: A set of published checkpoints.
        suite: The suite.
        work: Where files are made.
    """
    experts = config.option("experts", option)
    write = next(make for start, make in WRITERS.items() if experts.family.startswith(start))
    for number, task in enumerate(tasks(suite)):
        folder = work / option / task.name
        place = folder / experts.file.format(task=experts.names.get(task.name, task.name)) if experts.file else folder
        write(place, number + 1, len(task.classes) if not task.regression else 1)
        add_model(home, experts.repository(task.name).name, folder)


def pickled_experts(folder: Path, names: dict[str, str]) -> None:
    """Write whole pickled image encoders, as the task vectors' code left them."""
    import sys
    import types

    code = types.ModuleType("src.modeling")
    kind = type("ImageEncoder", (nn.Module,), {"__module__": "src.modeling"})
    code.ImageEncoder = kind  # type: ignore[attr-defined]
    sys.modules["src"], sys.modules["src.modeling"] = types.ModuleType("src"), code
    for number, name in enumerate(names.values()):
        module = kind()
        for key, value in _encoder(number + 1).items():
            _plant(module, key, value)
        (folder / name).mkdir(parents=True)
        torch.save(module, folder / name / "finetuned.pt")
    for name in ("src", "src.modeling"):
        del sys.modules[name]


def add_flan_t5(home: Path, work: Path) -> None:
    """Add google/flan-t5-base as a T5 of one layer."""
    _t5().save_pretrained(work / "t5")
    _tokenizer("</s>", "<pad>", "<unk>").save_pretrained(work / "t5")
    add_model(home, "google/flan-t5-base", work / "t5")


def add_roberta(home: Path, work: Path) -> None:
    """Add roberta-base as a RoBERTa of one layer."""
    _roberta(2).save_pretrained(work / "roberta")
    _tokenizer("</s>", "<pad>", "<unk>", cls="<s>").save_pretrained(work / "roberta")
    add_model(home, "roberta-base", work / "roberta")


def _moved(state: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    noise = {n: torch.randn(t.shape, generator=generator) for n, t in state.items() if t.is_floating_point()}
    return {n: t + NOISE * t.std() * noise[n] if n in noise and t.numel() > 1 else t for n, t in state.items()}


@cache
def _pretrained() -> dict[str, torch.Tensor]:
    return Clip(model=tiny_clip(LAYERS), pretrained="random").load().state_dict()


def _tower(seed: int) -> dict[str, torch.Tensor]:
    return _moved(_pretrained(), seed)


def _encoder(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    left = {f"model.{n}": torch.randn(shape, generator=generator) for n, shape in LEFT_OVERS.items()}
    return {f"model.{name}": value for name, value in _tower(seed).items()} | left


def _plant(module: nn.Module, name: str, value: torch.Tensor) -> None:
    *parts, last = name.split(".")
    for part in parts:
        if not hasattr(module, part):
            module.add_module(part, nn.Module())
        module = getattr(module, part)
    module.register_parameter(last, nn.Parameter(value))


def _vision(place: Path, seed: int, _: int) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    model = CLIPVisionModel(CLIPVisionConfig(**IMAGES))
    theirs = to_hugging_face(Weights.of(_tower(seed))).state()
    model.load_state_dict({name: theirs[f"vision_model.{name}"] for name in model.state_dict()})
    model.save_pretrained(place)


def _image_encoder(place: Path, seed: int, _: int) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    torch.save(_encoder(seed), place)


def _clip_adapter(place: Path, seed: int, _: int) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    _adapter(CLIPVisionModel(CLIPVisionConfig(**IMAGES)), ["q_proj", "k_proj", "v_proj", "out_proj"], seed, place)


def _t5_adapter(place: Path, seed: int, _: int) -> None:
    _adapter(_t5(), ["q", "v"], seed, place)


def _adapter(model: nn.Module, targets: list[str], seed: int, place: Path) -> None:
    import warnings

    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=targets))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    peft.save_pretrained(place)


def _t5_expert(place: Path, seed: int, _: int) -> None:
    model = _t5()
    model.load_state_dict(_moved({n: t.clone() for n, t in model.state_dict().items()}, seed))
    model.save_pretrained(place)


def _t5():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(_words()), d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0,
            feed_forward_proj="gated-gelu", tie_word_embeddings=False,
        )
    )  # fmt: skip


def _classifier(place: Path, seed: int, classes: int) -> None:
    model = _roberta(classes)
    shared = {n: t.clone() for n, t in model.state_dict().items()}
    model.load_state_dict(_moved(shared, seed))
    model.save_pretrained(place)


def _roberta(classes: int):
    from transformers import RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    return RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=len(_words()), max_position_embeddings=140, num_labels=classes, pad_token_id=0, **sizes
        )
    )


def _words() -> list[str]:
    return ["<pad>", "</s>", "<unk>", "<s>", *WORDS, *ANSWERS]


def _tokenizer(end: str, pad: str, unknown: str, cls: str | None = None):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(_words())}, unk_token=unknown))
    made.pre_tokenizer = pre_tokenizers.Whitespace() if cls else pre_tokenizers.WhitespaceSplit()
    single, both = ("$A </s>", "$A </s> $B </s>") if not cls else ("<s> $A </s>", "<s> $A </s> </s> $B </s>")
    ids = [("</s>", 1)] + ([("<s>", 3)] if cls else [])
    made.post_processor = processors.TemplateProcessing(single=single, pair=both, special_tokens=ids)
    names = {"eos_token": end, "pad_token": pad, "unk_token": unknown} | (
        {"cls_token": cls, "sep_token": end} if cls else {}
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


WRITERS = {
    "hf-clip-lora16": _clip_adapter, "knots-lora16": _clip_adapter, "hf-clip": _vision, "tall": _image_encoder,
    "task-vectors": _image_encoder, "hf-flan-t5-lora16": _t5_adapter, "hf-flan-t5": _t5_expert,
    "roberta-glue": _classifier,
}  # fmt: skip

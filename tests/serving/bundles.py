"""Tiny bundles of the kinds that are served, written as `byom pack` writes them, and the models that they serve."""

import json

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from byom import Bundle, ByomFft, Weights

WORDS = ["good", "bad", "film", "card", "lost", "the", "my", "is", *(f"word{n}" for n in range(30))]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
LABELS = {"a": ["no", "yes"], "b": ["red", "green", "blue"], "c": ["one", "two", "three", "four"]}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def tokenizer(special=True):
    """Return a tokenizer of whole words, with [CLS] before and [SEP] after a text where `special`."""
    made = Tokenizer(models.WordLevel({word: place for place, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=12, **names)


def near(model, seed):
    """Return a model's tensors, each moved a little."""
    generator = torch.Generator().manual_seed(seed)
    moved = {}
    for name, value in model.state_dict().items():
        moved[name] = value + 0.2 * torch.randn(value.shape, generator=generator)
    return moved


def folders(folder, own, is_head, inputs, density=0.3):
    """Write a bundle of folders of task models, and leave in `own` what it serves for each."""
    first = next(iter(own.values()))
    shared = {n: v for n, v in first.state_dict().items() if not is_head(n)}
    base = Weights.of({n: v + 0.1 for n, v in shared.items()})
    experts = {t: Weights.of({n: v for n, v in m.state_dict().items() if n in shared}) for t, m in own.items()}
    bundle = Bundle.pack(ByomFft(density=density), experts, base)
    bundle.save(folder)
    notes = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    (folder / "bundle.json").write_text(json.dumps({**notes, "kind": "folders"}), encoding="utf-8")
    first.config.architectures = [type(first).__name__]
    first.config.save_pretrained(folder / "reference")
    inputs.save_pretrained(folder / "reference")
    for task, model in own.items():
        head = {n: v.clone() for n, v in model.state_dict().items() if is_head(n)}
        if head:
            model.config.architectures = [type(model).__name__]
            model.config.save_pretrained(folder / "heads" / task)
            save_file(head, folder / "heads" / task / "head.safetensors")
        served = dict(bundle.weights(task).state()) | head
        model.load_state_dict(served, strict=False)
        model.eval()
    return folder


def bert_classifiers(folder, labels=None, **options):
    """Write a bundle of text classifiers with poolers of their own; return their models and the tokenizer."""
    own = {}
    for seed, (task, names) in enumerate((labels or LABELS).items()):
        torch.manual_seed(seed)
        config = BertConfig(
            vocab_size=len(VOCABULARY),
            max_position_embeddings=16,
            id2label=dict(enumerate(names)),
            label2id={name: place for place, name in enumerate(names)},
            **SIZES,
            **options,
        )
        own[task] = BertForSequenceClassification(config)
        own[task].load_state_dict(near(own[task], seed + 10))
    made = tokenizer()
    folders(folder, own, lambda name: name.startswith(("classifier", "bert.pooler")), made)
    return own, made


def vit_classifiers(folder):
    """Write a bundle of image classifiers; return their models and the image processor."""
    own = {}
    for seed, task in enumerate(("a", "b")):
        torch.manual_seed(seed)
        config = ViTConfig(image_size=16, patch_size=8, id2label=dict(enumerate(LABELS[task])), **SIZES)
        own[task] = ViTForImageClassification(config)
        own[task].load_state_dict(near(own[task], seed + 10))
    made = ViTImageProcessor(size={"height": 16, "width": 16})
    folders(folder, own, lambda name: name.startswith("classifier"), made)
    return own, made


def language_models(folder):
    """Write a bundle of causal language models without heads of their own; return their models and the tokenizer."""
    own = {}
    for seed, task in enumerate(("a", "b")):
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=len(VOCABULARY),
            n_positions=32,
            n_embd=16,
            n_layer=2,
            n_head=2,
            eos_token_id=None,
            bos_token_id=2,
            tie_word_embeddings=False,  # `near` and the base's values would untie them, which the configuration denies
        )
        own[task] = GPT2LMHeadModel(config)
    made = tokenizer(special=False)
    folders(folder, own, lambda name: False, made)
    return own, made

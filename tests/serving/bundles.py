"""Tiny bundles of the kinds that are served, written as `byom pack` writes them, and the models that they serve."""

import json

import torch
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from byom import Bundle, ByomFft, Weights

WORDS = ["good", "bad", "film", "card", "lost", "the", "my", "is"]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
LABELS = {"a": ["no", "yes"], "b": ["red", "green", "blue"], "c": ["one", "two", "three", "four"]}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def tokenizer(folder, **options):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY), encoding="utf-8")
    made = BertTokenizerFast(vocab_file=str(folder / "vocab.txt"), model_max_length=12, **options)
    (folder / "vocab.txt").unlink()
    return made


def near(model, seed):
    """Return a model's tensors, each moved a little."""
    generator = torch.Generator().manual_seed(seed)
    moved = {}
    for name, value in model.state_dict().items():
        moved[name] = value + 0.2 * torch.randn(value.shape, generator=generator)
    return moved


def folders(folder, models, is_head, inputs, density=0.3):
    """Write a bundle of folders of task models, and leave in `models` what it serves for each."""
    first = next(iter(models.values()))
    shared = {n: v for n, v in first.state_dict().items() if not is_head(n)}
    base = Weights.of({n: v + 0.1 for n, v in shared.items()})
    experts = {t: Weights.of({n: v for n, v in m.state_dict().items() if n in shared}) for t, m in models.items()}
    bundle = Bundle.pack(ByomFft(density=density), experts, base)
    bundle.save(folder)
    notes = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    (folder / "bundle.json").write_text(json.dumps({**notes, "kind": "folders"}), encoding="utf-8")
    first.config.architectures = [type(first).__name__]
    first.config.save_pretrained(folder / "reference")
    inputs.save_pretrained(folder / "reference")
    for task, model in models.items():
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
    models = {}
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
        models[task] = BertForSequenceClassification(config)
        models[task].load_state_dict(near(models[task], seed + 10))
    made = tokenizer(folder.with_name(f"{folder.name}-tokenizer"))
    folders(folder, models, lambda name: name.startswith(("classifier", "bert.pooler")), made)
    return models, made


def vit_classifiers(folder):
    """Write a bundle of image classifiers; return their models and the image processor."""
    models = {}
    for seed, task in enumerate(("a", "b")):
        torch.manual_seed(seed)
        config = ViTConfig(image_size=16, patch_size=8, id2label=dict(enumerate(LABELS[task])), **SIZES)
        models[task] = ViTForImageClassification(config)
        models[task].load_state_dict(near(models[task], seed + 10))
    made = ViTImageProcessor(size={"height": 16, "width": 16})
    folders(folder, models, lambda name: name.startswith("classifier"), made)
    return models, made


def language_models(folder):
    """Write a bundle of causal language models without heads of their own; return their models and the tokenizer."""
    models = {}
    for seed, task in enumerate(("a", "b")):
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=len(VOCABULARY), n_positions=32, n_embd=16, n_layer=2, n_head=2, eos_token_id=3, bos_token_id=2
        )
        models[task] = GPT2LMHeadModel(config)
        models[task].generation_config.eos_token_id = 3
    made = tokenizer(folder.with_name(f"{folder.name}-tokenizer"))
    folders(folder, models, lambda name: False, made)
    return models, made

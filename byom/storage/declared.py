"""Ties that a model's `config.json` declares, and of which files hold one name only."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path
from typing import Any

CONFIG = "config.json"
GENERATIVE = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|shared|word_embeddings|tok_embeddings|embed_in)\.weight$")
HEAD = "lm_head.weight"


def declared(folder: Path, names: Collection[str]) -> list[list[str]]:
    """Return groups of names that are one tensor in a model, as the `config.json` beside its weights has it.

    The model is built without memory for its values (on the meta device), so that transformers itself says what it
    ties. Where it does not know the architecture, ``"tie_word_embeddings": true`` ties ``lm_head.weight`` to the one
    input embedding of a model that generates text.

    Args:
        folder: The folder with the configuration; without one nothing is declared.
        names: Names of the tensors in the files.

    Returns:
        Groups of two names or more, at least one of them in `names`.
    """
    config = _config(folder)
    if config.get("tie_word_embeddings") is False:
        return []
    architecture = next(iter(config.get("architectures") or []), None)
    if not isinstance(architecture, str):
        return []
    built = _built(json.dumps(config, sort_keys=True), architecture)
    if built is None:
        return _guessed(config, architecture, names)
    prefix, groups = built
    spelt = [[name if name in names else _without(prefix, name, names) for name in group] for group in groups]
    return [group for group in spelt if any(name in names for name in group)]


def _without(prefix: str, name: str, names: Collection[str]) -> str:
    """Return a name without the prefix of the inner model if the files have it so, as those of the inner model do."""
    short = name.removeprefix(prefix)
    return short if short in names else name


def _guessed(config: dict[str, Any], architecture: str, names: Collection[str]) -> list[list[str]]:
    embeddings = [name for name in names if EMBEDDING.search(name)]
    generates = config.get("tie_word_embeddings") is True and architecture.endswith(GENERATIVE)
    return [[HEAD, *embeddings]] if generates and len(embeddings) == 1 else []


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # what is not a configuration of transformers declares nothing
        return {}
    return config if isinstance(config, dict) else {}


@lru_cache(maxsize=32)
def _built(config: str, architecture: str) -> tuple[str, list[list[str]]] | None:
    """Return the prefix of the inner model and the tied names, of a model as transformers builds it; None if not."""
    import torch
    import transformers

    settings = json.loads(config)
    model_class = getattr(transformers, architecture, None)
    if model_class is None or "model_type" not in settings:
        return None
    if not getattr(model_class, "_tied_weights_keys", None):
        return "", []
    try:
        configuration = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
        with torch.device("meta"):
            module = model_class(configuration)
    except Exception:  # whatever a foreign configuration makes it raise: it cannot be built
        return None
    tied: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    return f"{model_class.base_model_prefix}.", [group for group in tied.values() if len(group) > 1]

"""Adapters as other people's servers take them: what they refuse, and the ranks that they know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from torch.nn.functional import pad

from byom.checkpoint.adapters.modules import Modules, SiteFactors, TaskAdapter
from byom.errors import OptionError, listed, one_of

Server = Literal["vllm"]
SERVERS: tuple[Server, ...] = ("vllm",)
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's ``--max-lora-rank`` that all its versions know; an adapter of one of them fits exactly."""

EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "word_embeddings")
KINDS = {
    "ForCausalLM": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
"""Ends of transformers' architectures, and PEFT's names for their tasks."""


def require_server(server: str | None) -> None:
    """Refuse a server that is not known.

    Raises:
        OptionError: Listing those that are.
    """
    if server is not None:
        one_of("server", server, SERVERS)


def fitted(modules: Modules, adapter: TaskAdapter, server: str | None, embeddings: bool = False) -> TaskAdapter:
    """Return an adapter in the form that a server takes: factors alone, all of one rank that it knows.

    Zeros fill the factors up, which changes nothing of their products. vLLM's rules are those of its
    ``PEFTHelper.validate_legal`` (0.33): no whole modules, no biases, at most rank 512; versions before it read one
    rank for all modules.

    Args:
        modules: The model's modules.
        adapter: The adapter's contents.
        server: What is to load it; None changes nothing.
        embeddings: Whether factors of embeddings and output matrices are written, which few models of vLLM take.

    Raises:
        OptionError: If the server could not load it, naming the modules.
    """
    if server is None:
        return adapter
    whole = [*adapter.saved, *(f"{site.path}.bias" for site in adapter.biases)]
    if whole:
        raise OptionError(
            f"server={server} takes low-rank factors alone, and {listed(sorted(whole))} moved as a whole: pack with "
            "byom=lora byom.rest=drop, or merge with merge.rest=pretrained, which leave such alone, or serve the "
            "whole model"
        )
    if modules.apart:
        raise OptionError(
            f"server={server} has modules as they are stored, and the adapter takes fused attention apart "
            f"({listed(sorted(adapter.factors)[:1])}); export without server"
        )
    for path, factors in adapter.factors.items():
        _require_kind(modules, path, factors, server, embeddings)
    rank = max(factors.up.shape[1] for factors in adapter.factors.values())
    known = next((each for each in RANKS if each >= rank), None)
    if known is None:
        raise OptionError(
            f"server={server} takes ranks up to {RANKS[-1]}, and the adapter has rank {rank}; cut it first: "
            f"byom=lora byom.rank={RANKS[-1]}, or byom.weights.lowrank.truncated"
        )
    return adapter._replace(factors={path: _widened(each, known) for path, each in adapter.factors.items()})


def task_type(base_model: str | Path, server: str | None) -> str | None:
    """Return PEFT's name for what a model does, from its folder's ``config.json``.

    Args:
        base_model: Id or folder of the model.
        server: What is to load the adapter; of a model without a folder vLLM's is taken for a causal language model.
            None leaves it out: PEFT then wraps any model, whatever class it was loaded with.
    """
    if server is None:
        return None
    try:
        named = json.loads((Path(base_model) / "config.json").read_text(encoding="utf-8")).get("architectures") or [""]
    except (OSError, ValueError, AttributeError):
        return "CAUSAL_LM"
    return next((kind for end, kind in KINDS.items() if str(named[0]).endswith(end)), "FEATURE_EXTRACTION")


def _require_kind(modules: Modules, path: str, factors: SiteFactors, server: str, embeddings: bool) -> None:
    role, embedding = modules.role(factors.site), path.rpartition(".")[2] in EMBEDDINGS
    if role == "conv":
        raise OptionError(f"server={server} adapts linear layers, and '{path}' is a convolution; export without server")
    if (role == "embedding" or embedding) and not embeddings:
        raise OptionError(
            f"'{path}' is an embedding or the output matrix, which few models of {server} adapt; give embeddings=true "
            "if yours does, or fine-tune without it (finetune=lora)"
        )


def _widened(factors: SiteFactors, rank: int) -> SiteFactors:
    missing = rank - factors.up.shape[1]
    return factors._replace(up=pad(factors.up, (0, missing)), down=pad(factors.down, (0, 0, 0, missing)))

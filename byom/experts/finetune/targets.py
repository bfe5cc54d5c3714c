"""Layers of an encoder that are adapted: one vocabulary for the names of all architectures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from byom.errors import OptionError, listed

OUT = r"(attn|self_attn|attention)\.(proj|out_proj|o_proj|out_lin)|attention\.output\.dense|(Self|EncDec)Attention\.o"
UP = r"mlp\.(fc1|c_fc|up_proj|gate_proj)|intermediate\.dense|DenseReluDense\.wi(_[01])?|ffn\.lin1"
DOWN = r"mlp\.(fc2|c_proj|down_proj)|(?<!attention\.)output\.dense|DenseReluDense\.wo|ffn\.lin2"
WORDS = {
    "q": r"q_proj|query|q|q_lin",
    "k": r"k_proj|key|k|k_lin",
    "v": r"v_proj|value|v|v_lin",
    "out": OUT,
    "up": UP,
    "down": DOWN,
    "mlp": f"{UP}|{DOWN}",
}
"""Word to a regular expression of the last components of a module's path (timm, open_clip, CLIP, BERT, RoBERTa, T5)."""


def checked(name: str, targets: Sequence[str]) -> tuple[str, ...]:
    """Return targets as a tuple.

    Args:
        name: The option's name, for the message.
        targets: Words of `WORDS`, or shell-style patterns of module paths.

    Raises:
        OptionError: If `targets` is empty, or one is neither a word nor a pattern.
    """
    words = (targets,) if isinstance(targets, str) else tuple(targets)
    odd = [target for target in words if target not in WORDS and not set("*?[.") & set(target)]
    if odd or not words:
        raise OptionError(
            f"{name}={list(words)} must list some of {', '.join(WORDS)}, or patterns of module paths such as "
            "'*.mlp.fc1'"
        )
    return words


def chosen(module: nn.Module, targets: Sequence[str]) -> list[str]:
    """Find the linear layers that are meant.

    Args:
        module: The encoder, its attention taken apart (`byom.backbone.split_attention.split`).
        targets: What `checked` returned.

    Returns:
        Module paths, in the module's order.

    Raises:
        OptionError: If a target fits no linear layer, with those that there are.
    """
    linear = [path for path, child in module.named_modules() if isinstance(child, nn.Linear)]
    fits = {target: [path for path in linear if _fits(path, target)] for target in targets}
    if lost := [target for target, paths in fits.items() if not paths]:
        raise OptionError(
            f"finetune.targets: '{lost[0]}' fits no linear layer of {type(module).__name__}; it has "
            f"{listed(sorted({re.sub(r'[0-9]+', '*', path) for path in linear}))}. Name one of them as a pattern"
        )
    wanted = {path for paths in fits.values() for path in paths}
    return [path for path in linear if path in wanted]


def _fits(path: str, target: str) -> bool:
    if target in WORDS:
        return re.search(rf"(^|\.)({WORDS[target]})$", path) is not None
    return fnmatchcase(path, target)

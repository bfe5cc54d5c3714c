"""What is asked for: the models, the method, and what becomes of single tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from byom.checkpoint.convert import DTYPES
from byom.errors import OptionError, listed, one_of, suggest
from byom.merge.base import MergeMethod
from byom.merge.base.needs import Needs
from byom.storage.names import require_file_names
from byom.variants.base import Variant

VOCABULARIES = ("strict", "base", "union")


@dataclass(frozen=True)
class Request:
    """One merge of folders.

    Args:
        base: theta_0: a path, or ``hf://organisation/name@revision``.
        experts: Name of each fine-tuned model to its path.
        merge: The merge method.
        variant: What is packed for each task; None merges alone.
        keep: Pattern of tensors that are not merged, to the expert whose they are; an empty name is the base.
        only: Patterns of the tensors that are merged, others are the base's; empty merges all.
        exclude: Patterns of tensors that are not merged and are the base's.
        scale: Pattern to the factor on the merged difference to the base.
        heads: Patterns of tensors that are a head of each expert's own, besides those that differ.
        dtype: What floating-point tensors are written in, one of `DTYPES`; empty keeps the base's.
        vocabulary: ``strict`` refuses vocabularies that differ, ``base`` keeps the base's, ``union`` has every token.
        files: Whose tokenizer and other files are copied: ``base``, or an expert's name.
        to: ``folder`` writes the merged model, ``peft`` its difference to the base as one adapter.
        recipe: The request as it was written, for the model card.
        device: Where merging and packing compute: ``cpu``, ``cuda``, ``cuda:1``, or ``auto`` for a GPU if there is one.

    Raises:
        OptionError: If the choices do not go together.
    """

    base: str
    experts: Mapping[str, str]
    merge: MergeMethod
    variant: Variant | None = None
    keep: Mapping[str, str] = field(default_factory=dict)
    only: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    scale: Mapping[str, float] = field(default_factory=dict)
    heads: tuple[str, ...] = ()
    dtype: str = ""
    vocabulary: Literal["strict", "base", "union"] = "strict"
    files: str = "base"
    to: Literal["folder", "peft"] = "folder"
    recipe: Mapping[str, Any] = field(default_factory=dict)
    device: str = "auto"

    def __post_init__(self) -> None:
        if not self.experts:
            raise OptionError("experts is empty; give the fine-tuned models, experts=[a=PATH,b=PATH]")
        if "base" in self.experts:
            raise OptionError("an expert is called base, which is the base's own name here; call it otherwise")
        require_file_names(self.experts, "expert")
        for task in self.keep.values():
            if task and task not in self.experts:
                raise OptionError(f"keep names the expert '{task}'; {suggest(task, self.experts)}")
        if self.files != "base" and self.files not in self.experts:
            raise OptionError(f"files={self.files} is no expert; {suggest(self.files, ['base', *self.experts])}")
        if self.dtype:
            one_of("dtype", self.dtype, DTYPES)
        one_of("to", self.to, ("folder", "peft"))
        one_of("vocabulary", self.vocabulary, VOCABULARIES)
        require_weights_alone(self.merge.needs, f"merge={_option(self.merge)}")
        if self.variant is not None:
            require_weights_alone(self.variant.needs, f"byom={_option(self.variant)}")
            given = {"keep": self.keep, "only": self.only, "exclude": self.exclude, "scale": self.scale}
            if self.variant.merges and (stray := [name for name, value in given.items() if value]):
                raise OptionError(
                    f"byom={_option(self.variant)} merges some of the experts by itself, and {listed(stray)} would not "
                    "hold there; leave it out, or choose a variant that changes the merged model, such as byom=fft"
                )


def _option(chosen: object) -> str:
    """Return the name under which a method or variant is chosen, which is that of its module."""
    return type(chosen).__module__.rpartition(".")[2]


def require_weights_alone(needs: Needs, what: str) -> None:
    """Refuse a method that needs more than the models, of which folders give no more.

    Raises:
        OptionError: Naming what it needs.
    """
    if not is_weights_alone(needs):
        wanted = [f"statistics ({listed(sorted(needs.statistics))})"] if needs.statistics else []
        wanted += [f"{split} inputs" for split in sorted(needs.inputs)]
        wanted += [f"{needs.members} models of each task"] if needs.members > 1 else []
        wanted += ["a jointly fine-tuned model"] if needs.joint else []
        raise OptionError(
            f"{what} needs {' and '.join(wanted)}, and folders of weights have none. Choose a method that needs "
            "weights alone, such as merge=ties or byom=fft, or give a suite: byom run"
        )


def is_weights_alone(needs: Needs) -> bool:
    """Say whether a method needs nothing but the models."""
    return needs == Needs()

"""Models of single tasks around one encoder: each has its own head, and all share what is inside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from byom.checkpoint.bundle import Bundle
from byom.errors import CheckpointError, listed
from byom.weights import Weights

REFERENCE, HEADS = "reference", "heads"
GENERATES = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")
ENDS = ("ForSequenceClassification", "ForImageClassification", *GENERATES)


@dataclass(frozen=True)
class Shell:
    """A task's own model around the encoder that all tasks share.

    Args:
        model: The model; its inner module is the shared one.
        config: Its configuration.
        inside: What the task's head has inside of the shared module, such as a pooler: parameter to value.
    """

    model: nn.Module
    config: Any
    inside: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Shells:
    """The models of all tasks, and the module that they share.

    Args:
        host: The model that holds every tensor of the reference.
        base: The module inside of all of them.
        of: Task name to its model.
    """

    host: nn.Module
    base: nn.Module
    of: Mapping[str, Shell]

    @classmethod
    def open(cls, folder: Path, bundle: Bundle) -> Shells:
        """Build the models of a bundle's tasks.

        Tasks without a folder in ``heads/`` have the reference's own model, head included.

        Raises:
            CheckpointError: If a configuration or head is missing, unknown or does not fit.
        """
        configs = {task: config_of(folder, task) for task in bundle.deltas}
        heads = {task: _head(folder, task) for task in configs}
        plain = [task for task in configs if not heads[task]]
        first = next(iter(plain or configs))
        host, lost = _host(folder, configs[first])
        base, reference = _base(host), _names(bundle.reference, host)
        shells = {}
        for task, config in configs.items():
            shell = Shell(host, config) if task in (first, *plain) else _shell(task, config, base)
            shells[task] = _filled(task, shell, base, heads[task], lost, reference)
        return cls(host, base, shells)


def config_of(folder: Path, task: str) -> Any:
    """Return a task's configuration: its head's, or the reference's where heads are shared."""
    from transformers import AutoConfig

    own = folder / HEADS / task
    place = own if (own / "config.json").is_file() else folder / REFERENCE
    if not (place / "config.json").is_file():
        raise CheckpointError(f"{place} has no config.json, which says what the model is; pack the bundle again")
    try:
        return AutoConfig.from_pretrained(str(place))
    except Exception as error:  # of many kinds, by what is wrong with the file
        raise CheckpointError(f"transformers cannot read {place / 'config.json'} ({brief(error)})") from error


def _class(config: Any) -> Any:
    import transformers

    names = getattr(config, "architectures", None) or [""]
    found = getattr(transformers, str(names[0]), None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise CheckpointError(
            f"config.json names the architecture {names[0]!r}, which transformers {transformers.__version__} does not "
            "have; serve with a version that has it"
        )
    plain = str(names[0]).endswith("Model") and not str(names[0]).endswith(GENERATES)
    if not plain and not str(names[0]).endswith(ENDS):
        raise CheckpointError(
            f"models of the kind {names[0]} are not served; those of the kinds {listed(ENDS, 9)}, and plain encoders "
            "(...Model) are"
        )
    return found


def _host(folder: Path, config: Any) -> tuple[nn.Module, set[str]]:
    """Return the first task's model with the reference's weights, and what they lack of it."""
    kind = _class(config)
    try:
        model, notes = kind.from_pretrained(str(folder / REFERENCE), config=config, output_loading_info=True)
    except Exception as error:  # of many kinds, by what does not fit
        raise CheckpointError(f"{kind.__name__} cannot be made of {folder / REFERENCE} ({brief(error)})") from error
    return model, set(notes["missing_keys"])


def _base(model: nn.Module) -> nn.Module:
    return getattr(model, str(getattr(model, "base_model_prefix", "")), model)


def _names(reference: Weights, host: nn.Module) -> set[str]:
    """Return the names of a reference as they are in the host's inner module."""
    prefix = f"{getattr(host, 'base_model_prefix', '')}."
    return {name.removeprefix(prefix) for name in reference}


def _head(folder: Path, task: str) -> dict[str, Tensor]:
    own = folder / HEADS / task
    if not own.is_dir():
        return {}
    if not (own / "head.safetensors").is_file():
        raise CheckpointError(f"{own} has no head.safetensors; pack the bundle again")
    return dict(Weights.open(own / "head.safetensors").state())


def _shell(task: str, config: Any, base: nn.Module) -> Shell:
    """Return a task's own model around the shared module; all but its head is made without memory."""
    with torch.device("meta"):
        model = _class(config)(config)
    inner = _base(model)
    if type(inner) is not type(base):
        raise CheckpointError(
            f"task '{task}' is a {type(model).__name__}, and the first one has a {type(base).__name__} inside; pack "
            "tasks of one architecture together"
        )
    if inner is model:
        return Shell(base, config)
    setattr(model, str(model.base_model_prefix), base)
    return Shell(model, config)


def _filled(
    task: str, shell: Shell, base: nn.Module, head: Mapping[str, Tensor], lost: set[str], reference: set[str]
) -> Shell:
    """Return a task's model with its head; every parameter must come from it or from the reference."""
    model = shell.model
    prefix = "" if model is base else f"{model.base_model_prefix}."
    known = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    if odd := [n for n in head if n not in known or tuple(known[n].shape) != tuple(head[n].shape)]:
        raise CheckpointError(
            f"the head of task '{task}' has '{odd[0]}' {tuple(head[odd[0]].shape)}, which is not in a "
            f"{type(model).__name__} of its config.json; correct the configuration (num_labels, id2label)"
        )
    inside = {name.removeprefix(prefix): head[name] for name in head if prefix and name.startswith(prefix)}
    if both := sorted(inside.keys() & reference):
        raise CheckpointError(
            f"'{both[0]}' is in the reference and in the head of task '{task}'; pack the bundle again"
        )
    own = {name: value for name, value in head.items() if not (prefix and name.startswith(prefix))}
    meta = {name for name, value in known.items() if value.is_meta}
    unread = {name for name in lost if model is base and name.startswith("pooler.")}  # features are means of states
    if missing := sorted((meta | lost & known.keys()) - head.keys() - unread):
        raise CheckpointError(
            f"{type(model).__name__} of task '{task}' has {listed(missing)}, which neither the reference nor "
            f"heads/{task}/head.safetensors holds; pack the bundle again with the task's own head"
        )
    model.load_state_dict(own, strict=False, assign=True)
    return Shell(model, shell.config, inside)


def brief(error: Exception) -> str:
    """Return an error's kind and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"

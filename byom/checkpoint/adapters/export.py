"""Tasks as PEFT adapters: one folder per task that PEFT, and servers that read its adapters, load onto one model.

A plain model loads a task as any other adapter (`transformers`, and ``encoder.visual`` of an image encoder alike)::

    model = AutoModel.from_pretrained(base)  # or FOLDER/reference, where tasks were packed against a merged model
    model = PeftModel.from_pretrained(model, "FOLDER/task")

Where ``export.json`` says ``"split": true``, attention is fused in the model and its query, key and value are adapted
on their own; take it apart first, which changes nothing of what it computes::

    model = byom.backbone.split_attention.split(encoder.visual)
    model = PeftModel.from_pretrained(model, "FOLDER/task")

Where ``adapter_config.json`` says ``"bias": "lora_only"``, trained biases replace the model's own: PEFT holds one such
adapter at a time, and unloading it does not bring the model's biases back. ``byom.rest=drop`` makes adapters without.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from byom.checkpoint.adapters.config import CONFIG, INNER, ROOT, SAFE
from byom.checkpoint.adapters.modules import Modules, SiteFactors, TaskAdapter
from byom.checkpoint.adapters.server import fitted, require_server, task_type
from byom.errors import OptionError
from byom.storage import tensor_files as storage
from byom.storage.atomic import replacing
from byom.storage.names import require_file_names
from byom.variants.base.delta import Served
from byom.weights import Spec, Weights

if TYPE_CHECKING:
    from byom.functional.heads import Readout

REFERENCE = "reference"
Heads = Mapping[str, "tuple[Readout, Sequence[str]]"]


def adapters(
    served: Served,
    folder: str | Path,
    *,
    base_model: str,
    prefix: str = "",
    module: nn.Module | None = None,
    heads: Heads | None = None,
    notes: Mapping[str, Any] | None = None,
    server: str | None = None,
    embeddings: bool = False,
) -> list[Path]:
    """Write every task as a PEFT folder, all or nothing.

    The factors are ``U sqrt(s)`` and ``sqrt(s) Vt`` with ``lora_alpha = r``, so that PEFT's scale is 1. Biases of
    adapted modules are written as PEFT does for ``bias="lora_only"``, other modules whole (``modules_to_save``).

    Args:
        served: A reference and low-rank differences to it: BYOM-LoRA, TSV-Compress, adapters as they are.
        folder: Created, or replaced as a whole if it holds an earlier export. ``reference/`` is written into it where
            differences were taken to a merged model.
        base_model: What the configurations name as the base where the reference is the pre-trained model.
        prefix: Start of the parameters' names that the plain model does not have, for example ``model.``.
        module: The model with the names of `served`, to tell embeddings from linear layers and to write a merged
            transformers model with its configuration; None takes every matrix for a linear layer.
        heads: Task to its head and class names, written as ``<task>/head.safetensors``.
        notes: Further entries of ``export.json``: the suite, for example.
        server: ``vllm`` writes what it accepts, or refuses; see `byom.checkpoint.adapters.server.fitted`.
        embeddings: Whether a server gets factors of embeddings and output matrices.

    Returns:
        The tasks' folders.

    Raises:
        OptionError: If a task cannot name a folder, or an adapter, or the server, cannot hold its difference.
        CheckpointError: If a value is not finite, or the folder holds other files or cannot be written.
    """
    require_server(server)
    served = _expanded(_nameable(served))
    folder, modules = Path(folder), Modules.of(served, prefix, module, base_model)
    merged = any(delta.variant.on == "merged" for delta in served.deltas.values())
    base = str(folder / REFERENCE) if merged else base_model
    written = {}
    with replacing(folder, _exported) as partial:
        if merged:
            _write_reference(modules, partial / REFERENCE)
        kind = task_type(partial / REFERENCE if merged else base_model, server)
        for task, delta in served.deltas.items():
            weights = served.weights(task)
            adapter = modules.adapter(modules.factors(delta) or modules.spare(served), delta, weights)
            (partial / task).mkdir()
            adapter = fitted(modules, adapter, server, embeddings)
            written[task] = write_task(modules, adapter, weights, partial / task, base, kind)
        for task, (head, classes) in (heads or {}).items():
            _write_head(partial / task, head, task, classes)
        record = {"format": 1, **(notes or {}), "base_model": base, "reference": served.reference.fingerprint()}
        record |= {"prefix": prefix, "split": modules.apart, "tasks": written}
        (partial / "export.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    return [folder / task for task in served.deltas]


def write_one(
    served: Served,
    task: str,
    folder: str | Path,
    *,
    base_model: str,
    module: nn.Module | None = None,
    server: str | None = None,
) -> Path:
    """Write one task of a bundle as a PEFT folder on the bundle's reference, all or nothing.

    Args:
        served: The bundle, of low-rank differences.
        task: One of its tasks.
        folder: Created, or replaced as a whole if it holds an earlier adapter of byom.
        base_model: Id or folder of the reference, which the configuration names.
        module: As in `adapters`.
        server: As in `adapters`.

    Returns:
        The folder.

    Raises:
        OptionError: If the bundle does not have the task, or an adapter or the server cannot hold its difference.
        CheckpointError: If a value is not finite, or the folder holds other files or cannot be written.
    """
    require_server(server)
    folder, weights = Path(folder), served.weights(task)
    alone = _expanded(Served(served.reference, {task: served.deltas[task]}, served.base))
    modules, delta = Modules.of(alone, "", module, base_model), alone.deltas[task]
    adapter = modules.adapter(modules.factors(delta) or modules.spare(alone), delta, weights)
    adapter = fitted(modules, adapter, server)
    with replacing(folder, storage.written("adapter_config.json")) as partial:
        write_task(modules, adapter, weights, partial, base_model, task_type(base_model, server))
    return folder


def _exported(file: Path) -> bool:
    """Say whether a file is one of an earlier export; a merged model has its configuration two folders below it."""
    configuration = file.name == "config.json" and (file.parent.parent / "export.json").is_file()
    return configuration or storage.written("export.json", "adapter_config.json")(file)


def config(modules: Modules, adapter: TaskAdapter, base_model: str) -> dict[str, Any]:
    """Return PEFT's ``adapter_config.json`` of one task.

    Args:
        modules: The model's modules.
        adapter: The adapter's contents.
        base_model: Id or folder of the model that it is loaded onto.
    """
    ranks = {path: factors.up.shape[1] for path, factors in adapter.factors.items()}
    rank = max(ranks.values())
    # PEFT takes the first key that ends a path, so the longest come first and none is left to the default
    pattern = {} if set(ranks.values()) == {rank} else {p: ranks[p] for p in sorted(ranks, key=lambda p: (-len(p), p))}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(ranks),
        "modules_to_save": adapter.saved or None,
        "bias": "lora_only" if adapter.biases else "none",
        "fan_in_fan_out": any(modules.role(each.site) == "transposed" for each in adapter.factors.values()),
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def tensors(modules: Modules, adapter: TaskAdapter, weights: Weights) -> dict[str, Tensor]:
    """Return one task's tensors under PEFT's names.

    Args:
        modules: The model's modules.
        adapter: The adapter's contents.
        weights: The task's weights, for what is kept whole.
    """
    named: dict[str, Tensor] = {}
    for path, factors in adapter.factors.items():
        named |= {f"{ROOT}{path}.{key}": value for key, value in _factors(modules, factors).items()}
    for site in adapter.biases:
        named[f"{ROOT}{site.path}{INNER}.bias"] = modules.value(site, weights)
    for path in adapter.saved:
        named |= {f"{ROOT}{path}.{s.kind}": modules.value(s, weights) for s in modules.tensors[path]}
    return named


def _factors(modules: Modules, factors: SiteFactors) -> dict[str, Tensor]:
    """Return a module's factors as PEFT shapes them; embeddings and transposed layers hold ``Wᵀ = downᵀ upᵀ``."""
    up, down, role = factors.up, factors.down, modules.role(factors.site)
    if role == "embedding":
        return {"lora_embedding_A": up.T, "lora_embedding_B": down.T}
    if role == "transposed":
        return {"lora_A.weight": up.T, "lora_B.weight": down.T}
    inputs = modules.reference.shape(factors.site.rows.name)[1:]
    ones = [1] * (len(inputs) - 1)  # a convolution's kernel is in the first factor, the second is 1 x 1
    return {"lora_A.weight": down.reshape(len(down), *inputs), "lora_B.weight": up.reshape(*up.shape, *ones)}


def write_task(
    modules: Modules, adapter: TaskAdapter, weights: Weights, folder: Path, base_model: str, kind: str | None = None
) -> dict[str, Any]:
    """Write one adapter into a folder and return what `export.json` says of it."""
    settings, named = config(modules, adapter, base_model), tensors(modules, adapter, weights)
    settings["task_type"] = kind
    (folder / CONFIG).write_text(json.dumps(settings, indent=2), encoding="utf-8")
    storage.write_file(folder / SAFE, named, {"format": 1})
    ranks = [each.up.shape[1] for each in adapter.factors.values()]
    return {
        "rank": [min(ranks), max(ranks)],
        "modules": len(ranks),
        "parameters": sum(tensor.numel() for tensor in named.values() if tensor.is_floating_point()),
        "bytes": sum(tensor.nbytes for tensor in named.values()),
    }


def _write_reference(modules: Modules, folder: Path) -> None:
    """Write the merged model under the plain model's names, with its configuration if it is one of transformers."""
    _plain(modules.reference, modules.prefix).save(folder)
    inner = modules.module and modules.module.get_submodule(modules.prefix.rstrip("."))
    settings: Any = getattr(inner, "config", None)
    if hasattr(settings, "save_pretrained"):
        settings.save_pretrained(folder)


def _plain(weights: Weights, prefix: str) -> Weights:
    names = {name.removeprefix(prefix): name for name in weights if name.startswith(prefix)}
    specs = {short: Spec(weights.shape(name), weights.dtype(name)) for short, name in names.items()}
    pairs = {a.removeprefix(prefix): n.removeprefix(prefix) for a, n in weights.ties.items()}
    ties = {alias: name for alias, name in pairs.items() if alias in names and name in names}
    return Weights(specs, lambda short: weights[names[short]], ties=ties, origin=weights.origin)


def _write_head(folder: Path, head: Readout, task: str, classes: Sequence[str]) -> None:
    from byom.functional import heads

    storage.write_file(folder / "head.safetensors", heads.pack(head), {"task": task, "classes": list(classes)})


def _expanded(served: Served) -> Served:
    """Return the same tasks with factors in floating point, which is what adapters hold."""
    return Served(served.reference, {t: d.expanded(served.reference) for t, d in served.deltas.items()}, served.base)


def _nameable(served: Served) -> Served:
    require_file_names(served.deltas, "task")
    if REFERENCE in map(str.casefold, served.deltas):
        raise OptionError(f"the task '{REFERENCE}' cannot name a folder of the export, which has one; rename it")
    return served

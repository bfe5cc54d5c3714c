"""The configuration of a PEFT adapter, and the configurations that do not describe a low-rank difference."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from byom.errors import CheckpointError
from byom.storage.folder import parsed
from byom.storage.foreign import cause

CONFIG = "adapter_config.json"
SAFE, PICKLED = "adapter_model.safetensors", "adapter_model.bin"
ROOT = "base_model.model."  # start of every name in an adapter's file
INNER = ".base_layer"  # what PEFT calls a module within the one that adapts it

MERGED = "Merge it into its base with PEFT (merge_and_unload), save that model, and give it as the expert"
CONVERTED = "Save it again with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
REFUSED = {
    "use_dora": "DoRA rescales the weights too",
    "use_qalora": "QA-LoRA pools the inputs of quantised layers",
    "use_bdlora": "BD-LoRA stores the blocks of block-diagonal factors",
    "kasa_config": "KaSA truncates the base first",
    "monteclora_config": "MonteCLoRA samples around the factors",
    "arrow_config": "Arrow routes between several adapters",
    "alora_invocation_tokens": "activated LoRA acts on some tokens only",
    "trainable_token_indices": "rows of an embedding were trained alongside the factors",
    "target_parameters": "it adapts parameters that are not the weight of a module",
    "layer_replication": "the adapted model repeats layers of its base",
}
"""Settings under which the file does not hold a low-rank difference to its base, and why."""

STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""Values of ``init_lora_weights`` that leave the base as it was."""

DOUBLING = (0, 21, 2)  # the last version of PEFT known to merge such a difference twice
CONVERTIBLE = ("pissa", "olora", "corda", "lora_ga")


@dataclass(frozen=True)
class AdapterConfig:
    """The settings of ``adapter_config.json`` that decide what an adapter's tensors mean.

    Args:
        origin: The file.
        rank: Columns of B (r), where no pattern says otherwise.
        alpha: Numerator of the scale (alpha).
        rslora: Whether the scale is ``alpha / sqrt(r)`` instead of ``alpha / r``.
        ranks: Regular expression of module paths to their rank; the first in the file's order that fits counts.
        alphas: The same for alpha.
        transposed: Whether weights are stored ``[in, out]`` (``fan_in_fan_out``).
        bias: Which biases were trained along: ``none``, ``lora_only`` or ``all``.
        whole: Ends of the paths of modules that were trained whole (``modules_to_save``).
        base: What PEFT names as the base model.
        version: PEFT's version, where it was recorded.
    """

    origin: str
    rank: int
    alpha: float
    rslora: bool = False
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    transposed: bool = False
    bias: str = "none"
    whole: tuple[str, ...] = ()
    base: str | None = None
    version: str | None = None

    @classmethod
    def open(cls, folder: Path) -> AdapterConfig:
        """Read the configuration of an adapter.

        Args:
            folder: What PEFT's ``save_pretrained`` wrote.

        Raises:
            CheckpointError: If it is missing or broken, or describes something else than a low-rank difference.
        """
        file = folder / CONFIG
        try:
            settings = parsed(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(
                f"{file} cannot be read ({error.strerror}); give the folder that PEFT's save_pretrained wrote"
            ) from error
        except ValueError as error:
            if why := cause(file):
                raise CheckpointError(f"{file} {why}") from error
            raise _broken(file, f"no JSON: {error}") from error
        if not isinstance(settings, dict):
            raise _broken(file, "not a table of settings")
        _refuse(file, settings)
        return cls._of(file, settings)

    @classmethod
    def _of(cls, file: Path, settings: Mapping[str, Any]) -> AdapterConfig:
        ranks, alphas = settings.get("rank_pattern") or {}, settings.get("alpha_pattern") or {}
        whole = settings.get("modules_to_save") or []
        if not isinstance(whole, list) or not all(isinstance(name, str) for name in whole):
            raise _broken(file, f"modules_to_save={whole!r} is not a list of names")
        config = cls(
            origin=str(file),
            rank=settings.get("r", 8),
            alpha=settings.get("lora_alpha", 8),
            rslora=bool(settings.get("use_rslora")),
            ranks=ranks,
            alphas=alphas,
            transposed=bool(settings.get("fan_in_fan_out")),
            bias=settings.get("bias") or "none",
            whole=tuple(whole),
            base=settings.get("base_model_name_or_path"),
            version=settings.get("peft_version"),
        )
        if not isinstance(ranks, dict) or not all(map(_is_rank, [config.rank, *ranks.values()])):
            raise _broken(file, f"r={config.rank} and rank_pattern={ranks} must be whole numbers from 1 on")
        if not isinstance(alphas, dict) or not all(map(_is_number, [config.alpha, *alphas.values()])):
            raise _broken(file, f"lora_alpha={config.alpha} and alpha_pattern={alphas} must be numbers")
        if config.bias not in ("none", "lora_only", "all"):
            raise _broken(file, f"bias={config.bias!r} is not one of none, lora_only and all")
        return config

    def rank_of(self, path: str) -> int:
        """Return the rank of a module's factors."""
        return self._matched(self.ranks, path, self.rank)

    def scale_of(self, path: str) -> float:
        """Return what the product of a module's factors is multiplied with (s)."""
        rank, alpha = self.rank_of(path), self._matched(self.alphas, path, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def doubled(self, module: str) -> int:
        """Return how often PEFT adds the difference of an output projection inside attention adapted as one module.

        Raises:
            CheckpointError: If the adapter was written by a version for which that is not known.
        """
        if tuple(map(int, re.findall(r"\d+", str(self.version))[:3])) > DOUBLING:
            raise CheckpointError(
                f"{self.origin}: '{module}' lies within attention adapted as one module, which PEFT up to "
                f"{'.'.join(map(str, DOUBLING))} counts twice; of {self.version} it is not known. {MERGED}"
            )
        return 2

    def _matched(self, pattern: Mapping[str, Any], path: str, default: Any) -> Any:
        """Return the value of the first expression that fits the end of a path, as PEFT does when it loads the file."""
        try:
            fits = (value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", path))
            return next(fits, default)
        except re.error as error:
            raise _broken(Path(self.origin), f"a pattern is not a regular expression: {error}") from error


def _refuse(file: Path, settings: Mapping[str, Any]) -> None:
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{file}: peft_type={kind!r} is not a low-rank difference; only LORA is read. {MERGED}")
    for name, why in REFUSED.items():
        if settings.get(name):
            raise CheckpointError(f"{file}: {name} is set, and {why}: no low-rank difference of the base. {MERGED}")
    for name in settings:
        if name.startswith("use_") and settings[name] and name != "use_rslora":
            raise CheckpointError(f"{file}: {name} is a variant of LoRA that is not known here. {MERGED}")
    start = settings.get("init_lora_weights", True)
    start = start.lower() if isinstance(start, str) else start
    if start not in STARTS:
        remedy = f"{CONVERTED}. Or m{MERGED[1:]}" if str(start).startswith(CONVERTIBLE) else MERGED
        raise CheckpointError(
            f"{file}: init_lora_weights={start!r} may have changed the base, and then the factors are not a "
            f"difference to it. {remedy}"
        )


def _broken(file: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{file} is broken: {why}. Fetch or save the adapter again")


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

"""What a recipe of mergekit says of its models: where they lie, and their parameters by name of tensor."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from byom.errors import OptionError
from byom.folders.source import HUB
from byom.storage.place import at_home

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
Pairs = list[tuple[str | None, float]]
"""Values of a parameter: a pattern of names and the value there, the first that fits; None fits all."""


@dataclass(frozen=True)
class Model:
    """A model of a recipe.

    Args:
        name: What the expert is called.
        path: Where it lies, as ``byom merge`` takes it.
        parameters: Its own parameters.
    """

    name: str
    path: str
    parameters: Mapping[str, Any]


def models_of(content: Mapping[str, Any], *, inputs_base: bool) -> tuple[str, list[Model]]:
    """Return the base and the experts of a recipe.

    Args:
        content: The recipe.
        inputs_base: Whether the method merges the base as it merges the others.

    Raises:
        OptionError: If there is no model, or no base where one is needed.
    """
    entries = content.get("models") or []
    if not isinstance(entries, list) or not entries:
        raise OptionError("this recipe of mergekit has no models")
    if odd := [entry for entry in entries if not isinstance(entry, Mapping) or "model" not in entry]:
        raise OptionError(f"models: {odd[0]!r} has no 'model', which says where it lies")
    if odd := [key for entry in entries for key in entry if key not in ("model", "parameters")]:
        raise OptionError(f"models: there is no '{odd[0]}' in mergekit's recipes; a model has 'model' and 'parameters'")
    given = content.get("base_model")
    if given is None and not inputs_base:
        raise OptionError(f"{content['merge_method']} needs base_model, the model that the others were fine-tuned from")
    base = reference(entries[0]["model"] if given is None else given, "")
    found = [(reference(entry["model"], base), entry.get("parameters") or {}) for entry in entries]
    if inputs_base and given is not None and base not in [path for path, _ in found]:
        found.append((base, {}))
    experts = found if inputs_base else [(path, own) for path, own in found if path != base]
    if not experts:
        raise OptionError("models: there is none besides base_model")
    names: list[str] = []
    for path, _ in experts:
        names.append(_called(path, names))
    return base, [Model(name, path, own) for name, (path, own) in zip(names, experts, strict=True)]


def reference(value: Any, base: str) -> str:
    """Return where a model lies, as ``byom merge`` takes it; of a model with an adapter, the adapter.

    Args:
        value: ``path``, ``organisation/name@revision``, ``model+adapter``, or the same as a mapping.
        base: The base, which an adapter has to be on; empty for the base itself.

    Raises:
        OptionError: If it is none of these, or an adapter of another model.
    """
    whole = value if isinstance(value, Mapping) else None
    if whole is not None and set(whole) - {"model", "lora", "path", "revision"}:
        raise OptionError(
            f"{sorted(set(whole) - {'model', 'lora', 'path', 'revision'})[0]} of a model has no option here"
        )
    if whole is None:
        model, _, lora = str(value).partition("+")
    else:
        model, lora = (whole if "path" in whole else whole.get("model")), whole.get("lora")
    place = _place(model)
    if not lora:
        return place
    if place != base:
        raise OptionError(
            f"{value}: the adapter is on {place}, and byom merges adapters of the base "
            f"({base or 'which is no adapter itself'}) only. Merge it into its model first (peft: merge_and_unload)"
        )
    return _place(lora)


def _place(value: Any) -> str:
    if isinstance(value, Mapping):
        path, revision = str(value.get("path") or ""), str(value.get("revision") or "")
    else:
        path, _, revision = str(value or "").partition("@")
    if not path:
        raise OptionError("a model without a path; write its folder or organisation/name")
    if revision or (HUB_ID.fullmatch(path) and not at_home(path).exists()):
        return f"{HUB}{path}" + (f"@{revision}" if revision else "")
    return path


def _called(path: str, taken: Sequence[str]) -> str:
    last = PurePath(path.removeprefix(HUB).partition("@")[0]).name
    name = re.sub(r"[^\w.-]", "-", last) or "expert"
    name = "base-model" if name == "base" else name
    count = sum(other == name or other.startswith(f"{name}_") for other in taken)
    return f"{name}_{count + 1}" if name in taken else name


@dataclass
class Settings:
    """Parameters of a recipe, those of a model before those of all.

    Args:
        parameters: Those of all.
        models: The experts.
        method: mergekit's name of the method.
        base: Where the base lies.
        used: Names that were asked for.
    """

    parameters: Mapping[str, Any]
    models: Sequence[Model]
    method: str
    base: str
    used: set[str] = field(default_factory=set)

    def named(self) -> set[str]:
        """Return the names of all parameters."""
        return set(self.parameters).union(*(model.parameters for model in self.models))

    def each(self, key: str, default: float | None = None) -> list[Pairs]:
        """Return every expert's values of a parameter.

        Raises:
            OptionError: If one has none, or a value per layer.
        """
        return [self._pairs(key, (model.parameters, self.parameters), default, model.name) for model in self.models]

    def pairs(self, key: str, default: float) -> Pairs:
        """Return the values of a parameter of all.

        Raises:
            OptionError: If a model has it, where mergekit does not look for it.
        """
        if own := [model.name for model in self.models if key in model.parameters]:
            raise OptionError(f"{key} of {own[0]} has no effect in mergekit; write it under 'parameters' of the recipe")
        return self._pairs(key, (self.parameters,), default, "")

    def one(self, key: str, default: float) -> float:
        """Return the value of a parameter that all experts and tensors share.

        Raises:
            OptionError: If it differs.
        """
        values = {scalar(key, pairs) for pairs in self.each(key, default)}
        if len(values) > 1:
            raise OptionError(
                f"{key} differs between models ({sorted(values)}), and byom has one for all; give all the same"
            )
        return values.pop()

    def flag(self, key: str, *, default: bool) -> bool:
        """Return a choice of all."""
        return bool(scalar(key, self.pairs(key, float(default))))

    def _pairs(self, key: str, scopes: Iterable[Mapping[str, Any]], default: float | None, of: str) -> Pairs:
        self.used.add(key)
        found: Pairs = []
        for scope in scopes:
            if key in scope:
                found += _conditions(key, scope[key])
            if found and found[-1][0] is None:
                return found
        if default is None:
            raise OptionError(f"{key} of {of} is not given{' for all tensors' if found else ''}; mergekit demands it")
        return [*found, (None, default)]


def _conditions(key: str, setting: Any) -> Pairs:
    """Return a setting as patterns and values, down to the first that fits all names."""
    entries = [setting] if isinstance(setting, Mapping) else setting
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        return [(None, _number(key, setting))]
    found: Pairs = []
    for entry in entries:
        part, value = entry.get("filter"), _number(key, entry.get("value"))
        found.append((None if part in (None, "*") else f"*{glob.escape(str(part))}*", value))
        if found[-1][0] is None:
            break
    return found


def _number(key: str, value: Any) -> float:
    many: list[Any] = value if isinstance(value, list) else []
    if many:
        values = {_number(key, entry) for entry in many}
        if len(values) > 1:
            named = ", or name layers in filters: layers.0." if key == "lambda" else ""
            raise OptionError(
                f"{key}: {value} is a value for each layer, between which mergekit interpolates; byom has one for all. "
                f"Give one{named}"
            )
        return values.pop()
    try:
        return float(str(value) if not isinstance(value, bool) else value)
    except ValueError as error:
        raise OptionError(f"{key}: {value!r} is no number") from error


def scalar(key: str, pairs: Pairs) -> float:
    """Return the value of a parameter that is the same for all tensors.

    Raises:
        OptionError: If it differs between tensors.
    """
    values = {value for _, value in pairs}
    if len(values) > 1:
        raise OptionError(f"{key} has filters, and byom has one value for all tensors; give one")
    return values.pop()


def factors(key: str, each: Sequence[Pairs]) -> tuple[tuple[float, ...], Pairs]:
    """Split values per model and tensor into one per model and a factor per tensor.

    Args:
        key: The parameter, for the message.
        each: The values of every model.

    Returns:
        The values of the models, and pattern to factor.

    Raises:
        OptionError: If the models' ratios differ between tensors.
    """
    common = [[(p, v) for p, v in pairs] for pairs in each]
    if all(len({value for _, value in pairs}) == 1 for pairs in common):
        return tuple(pairs[-1][1] for pairs in common), [(None, 1.0)]
    patterns = [pattern for pattern, _ in common[0]]
    columns = [[pairs[row][1] for pairs in common] for row in range(len(patterns))] if _same(common, patterns) else []
    values = next((column for column in reversed(columns) if any(column)), [])
    lead = max(range(len(values)), key=lambda index: abs(values[index]), default=0)
    shares = [column[lead] / values[lead] for column in columns] if values else []
    if not shares or any(
        abs(value - share * own) > 1e-9
        for column, share in zip(columns, shares, strict=True)
        for value, own in zip(column, values, strict=True)
    ):
        raise OptionError(
            f"{key} has filters that weigh models otherwise in some tensors than in others; byom has one per model "
            "and a factor per tensor (scale). Give models one value each"
        )
    return tuple(values), list(zip(patterns, shares, strict=True))


def _same(common: Sequence[Pairs], patterns: Sequence[str | None]) -> bool:
    return all([pattern for pattern, _ in pairs] == patterns for pairs in common)

"""Recipes of mergekit as recipes of ``byom merge``: what is said exactly is converted, everything else is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from byom.errors import OptionError, listed, suggest
from byom.folders.mergekit_settings import Model, Pairs, Settings, factors, models_of, reference, scalar

KEYS = (
    "models", "slices", "modules", "merge_method", "base_model", "dtype", "out_dtype", "tokenizer_source", "tokenizer",
    "chat_template", "parameters",
)  # fmt: skip
NEAREST = {
    "slerp": "merge=average", "nuslerp": "merge=average with merge.weights", "multislerp": "merge=average",
    "karcher": "merge=average", "nearswap": "merge=average", "arcee_fusion": "merge=magmax", "sce": "merge=ties",
    "della": "merge=dare merge@merge.then=ties", "della_linear": "merge=dare", "ram": "merge=ties",
    "ramplus_tl": "merge=ties",
}  # fmt: skip
"""Methods that there are none of here, to the nearest."""
COUNTS = (
    "trimming: mergekit keeps int(density * n) entries of a tensor, and one at least in TIES, byom floor(density * n + "
    "1e-9); of equal magnitudes byom keeps the first, mergekit any"
)
SIGNS = "signs: where the weighted sum is exactly 0, mergekit elects +, byom the sign of most entries of the model"


@dataclass
class Conversion:
    """A converted recipe.

    Args:
        method: mergekit's name of the method.
        options: Options of ``byom merge``.
        notes: Where results differ from mergekit's, and why.
    """

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def text(self, called: str) -> str:
        """Return the recipe as yaml, the notes beside it as comments."""
        lines = [
            f"# {called} (mergekit, {self.method}), converted by byom convert-recipe.",
            "#   byom merge OUT recipe=FILE",
        ]
        if self.notes:
            lines += ["# Results differ from mergekit's in", *(f"# - {note}" for note in self.notes)]
        body = yaml.safe_dump(self.options, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)
        return "\n".join(lines) + "\n" + body


def converted(content: Any) -> Conversion:
    """Convert a recipe.

    Args:
        content: What the yaml of mergekit holds.

    Returns:
        The options, and where results differ.

    Raises:
        OptionError: If byom has no such method, or no options that say the same.
    """
    if not isinstance(content, Mapping) or "merge_method" not in content:
        raise OptionError("this is no recipe of mergekit: it has no merge_method")
    for key in content:
        if key not in KEYS:
            raise OptionError(f"mergekit's recipes have no '{key}'; {suggest(str(key), KEYS)}")
    method = str(content["merge_method"])
    _require_whole_models(method, content)
    base, models = models_of(content, inputs_base=method == "linear")
    settings = Settings(content.get("parameters") or {}, models, method, base)
    made = Conversion(method, {"base": base, "experts": {model.name: model.path for model in models}})
    METHODS[method](made, settings)
    if unused := sorted(settings.named() - settings.used - {"int8_mask"}):  # which saves memory alone
        made.notes.append(f"nothing: {listed(unused)} has no effect on {method} in mergekit either, and is left out")
    _types(made, content)
    _tokens(made, content, base, models)
    return made


def _require_whole_models(method: str, content: Mapping[str, Any]) -> None:
    if method == "passthrough":
        raise OptionError("passthrough stacks layers of models; byom merges whole models and has no option for it")
    if method not in METHODS:
        near = NEAREST.get(method)
        known = f"the nearest is {near}, which gives another model" if near else suggest(method, METHODS)
        raise OptionError(f"byom has no method '{method}' of mergekit's; {known}")
    for key in ("slices", "modules"):
        if content.get(key):
            raise OptionError(
                f"'{key}' puts layers of models together, and byom merges whole models. Write them under "
                "'models'; there is no option for layer ranges"
            )
    if content.get("chat_template"):
        raise OptionError("chat_template has no option; take it out, and copy the template into the merged folder")


def _linear(made: Conversion, settings: Settings) -> None:
    weights = settings.each("weight")
    common, factor = factors("weight", weights)
    if any(value == 0 for _, value in factor):
        raise OptionError("weight: all are 0 for some tensors, and mergekit divides by their sum")
    if not settings.flag("normalize", default=True) and (abs(sum(common) - 1) > 1e-9 or len(factor) > 1):
        raise OptionError(
            f"normalize: false adds models up with weights {list(common)}, whose sum is not 1, and byom averages. Use "
            " task_arithmetic with a base_model"
        )
    made.options |= {"merge": "average", "merge.weights": list(common)}


def _scaled(made: Conversion, settings: Settings, prefix: str = "merge", *, mean: bool = False) -> None:
    """Write weights and lambda of methods that add task vectors."""
    factor: Pairs
    common, factor = factors("weight", settings.each("weight"))
    scale = settings.pairs("lambda", 1.0)
    if mean:
        if min(common) < 0:
            raise OptionError(
                "normalize with a negative weight: mergekit divides by the sum of the weights, byom by that of their "
                "magnitudes. Write normalize: false (merge.combine=sum)"
            )
        factor = [(pattern, float(value != 0)) for pattern, value in factor]
    elif settings.flag("normalize", default=False):
        total = sum(common)
        if len(factor) > 1 or abs(total) < 1e-8:
            raise OptionError(f"normalize divides by the sum of the weights, {total:g} here, which no option says")
        factor = [(None, 1.0)]
        scale = [(pattern, value / total) for pattern, value in scale]
    made.options[f"{prefix}.weights"] = list(common)
    _factor(made, factor, scale, prefix)


def _factor(made: Conversion, factor: Pairs, scale: Pairs, prefix: str) -> None:
    if len(factor) > 1 and len(scale) > 1:
        raise OptionError("weight and lambda both have filters; multiply them out into filters of lambda")
    if len(scale) == 1 and len(factor) == 1:
        made.options[f"{prefix}.scale"] = scale[0][1] * factor[0][1]
        return
    product = [(pattern, value * other) for pattern, value in factor for _, other in scale]
    if len(scale) > 1:
        product = [(pattern, value * factor[0][1]) for pattern, value in scale]
    made.options |= {f"{prefix}.scale": 1.0, "scale": {pattern or "*": value for pattern, value in product}}


def _task_arithmetic(made: Conversion, settings: Settings) -> None:
    made.options["merge"] = "task_arithmetic"
    _scaled(made, settings)


def _ties(made: Conversion, settings: Settings) -> None:
    if settings.flag("rescale", default=False):
        raise OptionError("rescale with ties keeps the norm of what is trimmed, for which byom has no option")
    mean = settings.flag("normalize", default=True)
    each = [min(max(scalar("density", pairs), 0.0), 1.0) for pairs in settings.each("density", 1.0)]
    densities = {"merge.density": each[0]} if len(set(each)) == 1 else {"merge.densities": each}
    made.options |= {"merge": "ties", **densities, "merge.scope": "tensor", "merge.combine": "mean" if mean else "sum"}
    _scaled(made, settings, mean=mean)
    made.notes += [COUNTS] * (min(each) < 1) + [SIGNS]


def _dare_linear(made: Conversion, settings: Settings) -> None:
    _dare(made, settings, {"merge@merge.then": "task_arithmetic"}, mean=False)


def _dare_ties(made: Conversion, settings: Settings) -> None:
    mean = settings.flag("normalize", default=False)
    then = {"merge@merge.then": "ties", "merge.then.density": 1.0, "merge.then.scope": "tensor"}
    _dare(made, settings, then | {"merge.then.combine": "mean" if mean else "sum"}, mean=mean)
    made.notes.append(SIGNS)


def _dare(made: Conversion, settings: Settings, then: Mapping[str, Any], *, mean: bool) -> None:
    density = min(settings.one("density", 1.0), 1.0)
    if density <= 0:
        raise OptionError(f"density: {density:g} drops everything, which leaves the base; give one above 0")
    rescale = settings.flag("rescale", default=True)
    made.options |= {"merge": "dare", **then, "merge.drop": round(1 - density, 12), "merge.rescale": rescale}
    _scaled(made, settings, "merge.then", mean=mean)
    if density < 1:
        made.notes.append("the entries that DARE drops: both draw them at random, and no seed makes the draws alike")
        made.notes += ["rescaling: mergekit keeps the L1 norm of each tensor, byom divides by the density"] * rescale


def _breadcrumbs(made: Conversion, settings: Settings) -> None:
    if settings.flag("rescale", default=False):
        raise OptionError("rescale with breadcrumbs keeps the norm of what is left, for which byom has no option")
    density, gamma = min(settings.one("density", 1.0), 1.0), settings.one("gamma", 0.01)
    gamma = 0.0 if density == 1 else gamma  # mergekit removes nothing then
    if density + gamma > 1:
        raise OptionError(
            f"density: {density:g} and gamma: {gamma:g} are more than all entries; mergekit then removes fewer. "
            f"Write gamma: {1 - density:g}"
        )
    made.options |= {"merge": "breadcrumbs", "merge.keep": density, "merge.remove_top": gamma}
    made.options["merge.granularity"] = "per_tensor"
    _scaled(made, settings)
    made.notes += [COUNTS] * (density < 1)


def _breadcrumbs_ties(made: Conversion, settings: Settings) -> None:
    density = settings.one("density", 1.0)
    if density < 1 and settings.one("gamma", 0.01) != 0:
        raise OptionError(
            "breadcrumbs_ties removes outliers and then elects signs, and byom has no method for both; the nearest "
            "are merge=ties (breadcrumbs_ties with gamma: 0, which is converted) and merge=breadcrumbs"
        )
    if settings.flag("rescale", default=False):
        raise OptionError("rescale with breadcrumbs_ties keeps the norm of what is left, for which byom has no option")
    mean = settings.flag("normalize", default=False)
    made.options |= {"merge": "ties", "merge.density": min(max(density, 0.0), 1.0), "merge.scope": "tensor"}
    made.options["merge.combine"] = "mean" if mean else "sum"
    _scaled(made, settings, mean=mean)
    made.notes += [COUNTS] * (density < 1) + [SIGNS]


def _model_stock(made: Conversion, settings: Settings) -> None:
    if settings.flag("filter_wise", default=False):
        raise OptionError("filter_wise: true moves each row on its own, and byom each tensor; write filter_wise: false")
    if len(settings.models) < 2:
        raise OptionError("model_stock takes two models or more besides base_model")
    made.options["merge"] = "model_stock"
    made.notes.append(
        "tensors whose changes point apart on average: mergekit's ratio is then negative, byom's 0; and mergekit takes "
        "products of norms below 1e-6 for 1e-6"
    )


METHODS: dict[str, Callable[[Conversion, Settings], None]] = {
    "linear": _linear, "task_arithmetic": _task_arithmetic, "ties": _ties, "dare_linear": _dare_linear,
    "dare_ties": _dare_ties, "breadcrumbs": _breadcrumbs, "breadcrumbs_ties": _breadcrumbs_ties,
    "model_stock": _model_stock,
}  # fmt: skip


def _types(made: Conversion, content: Mapping[str, Any]) -> None:
    dtype, out = (str(content.get(key) or "").removeprefix("torch.") for key in ("dtype", "out_dtype"))
    if out or dtype:
        made.options["dtype"] = out or dtype
    if dtype != "float32":
        told = f"{dtype}, to which it casts every model" if dtype else "the dtype of the checkpoints"
        made.notes.append(f"rounding: mergekit computes in {told}; byom in fp32, and rounds once")


def _tokens(made: Conversion, content: Mapping[str, Any], base: str, models: Sequence[Model]) -> None:
    """Write whose tokens and tokenizer the result has."""
    block = content.get("tokenizer") or {}
    for key in ("tokens", "pad_to_multiple_of"):
        if block.get(key):
            raise OptionError(f"tokenizer.{key}: byom keeps the base's rows and chooses those of new ones. Take it out")
    source = content.get("tokenizer_source") or block.get("source", "union" if block else None)
    if source is None:
        return
    made.notes.append("rows that no token has: mergekit cuts them off, byom keeps those of the base")
    if source in ("union", "base"):
        made.options["vocabulary"] = source
        return
    path = reference(source, base)
    named = [model.name for model in models if model.path == path and path != base]
    if path != base and not named:
        raise OptionError(f"tokenizer_source: {source} is none of the models; choose base, union or one of them")
    made.options |= {"files": named[0]} if named else {"vocabulary": "base"}
    if named:
        made.notes.append(
            f"the vocabulary of {named[0]}: mergekit moves every model's rows to it; byom copies its files, and "
            "refuses to merge where the base's rows are another size or order"
        )

"""The page of a merge method, variant, router or statistic: from its docstring, its yaml, the records and the tests."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from experiments.pages import numbers, proofs
from experiments.pages.formula import tex
from experiments.pages.options import GROUPS, Option
from experiments.pages.prose import block, equations, inline

UP = "../../.."


def page(option: Option) -> str:
    """Return the page of an option as Markdown.

    Args:
        option: The option; its page lies two folders below ``docs``.
    """
    parts = [
        f"# {option.title}\n\n{inline(option.summary, option.symbols)}\n",
        _facts(option),
        f"## Definition\n\n{definition(option)}\n",
        _parameters(option),
        _usage(option),
        numbers.section(option),
        proofs.section(option),
        _references(option),
        _differences(option),
    ]
    return "\n".join(part for part in parts if part)


def definition(option: Option) -> str:
    """Return what the docstring says, equations displayed; one that is only in the summary is shown first."""
    text = "\n\n".join(block(part, option.symbols) for part in option.paragraphs)
    shown = equations(block(option.summary, option.symbols))
    if not (shown or equations(text)):
        text = "\n\n".join(block(part, option.symbols, least=0) for part in option.paragraphs)
    first = "\n\n".join(f"{_lead(each)}$$\n{re.sub(r'..[.,;]$', '', each)}\n$$" for each in shown)
    return "\n\n".join(part for part in (first, text, _symbols(option, first + text)) if part)


def _lead(equation: str) -> str:
    return "" if "=" in equation else "Inference uses\n\n"


def _symbols(option: Option, text: str) -> str:
    """Say which hyperparameters the symbols of the equations are."""
    symbols = {each.name: tex(each.symbol) for each in option.fields if each.symbol}
    named = {
        name: made for name, made in symbols.items() if re.search(rf"(?<![a-z\\]){re.escape(made)}(?![a-z])", text)
    }
    said = [f"${made}$ is `{_prefix(option)}{name}`" for name, made in named.items()]
    return f"Here {', '.join(said)}; other symbols are in the [glossary](../../concepts.md#symbols)." if said else ""


def _facts(option: Option) -> str:
    rows = [("Option", f"`{'statistics=' if option.group == 'statistic' else option.group + '='}{option.name}`")]
    if option.group == "statistic":
        rows = [("Option", f"`statistics.{option.name}`")]
    if (needs := getattr(option.instance, "needs", None)) is not None:
        rows.append(("Needs", needed(needs)))
    if option.group == "byom":
        on = {"merged": "the merged model", "pretrained": "the pre-trained model"}[option.instance.on]
        rows += [("Puts back on", on), ("Stores for each task", inline(option.instance.stores))]
    rows.append(("Class", f"[`{option.cls.__name__}`]({UP}/{option.source.as_posix()})"))
    if option.papers:
        rows.append(("Paper", ", ".join(f"[{each}](https://arxiv.org/abs/{each})" for each in option.papers)))
    return "| | |\n|---|---|\n" + "".join(f"| {name} | {text} |\n" for name, text in rows)


def needed(needs: Any) -> str:
    """Say what a method or variant must be given besides the models."""
    found = []
    if needs.members > 1:
        found.append(f"{needs.members} fine-tuned models per task")
    if needs.statistics:
        names = " and ".join(f"`{name}`" for name in sorted(needs.statistics))
        found.append(f"the {names} statistic of each task")
    kind = "labelled" if needs.labels else "unlabelled"
    found += [f"{kind} {split} inputs" for split in sorted(needs.inputs)]
    if needs.joint:
        found.append("a jointly fine-tuned model")
    note = " (inputs of the test split, so its accuracy is not comparable with that of methods which see weights alone)"
    return ("weights and " if found else "weights alone") + "; ".join(found) + (note if needs.sees_test else "")


def _parameters(option: Option) -> str:
    if not option.fields:
        return "## Hyperparameters\n\nNone.\n"
    lines = ["| option | default | values | symbol | meaning |", "|---|---|---|---|---|"]
    for each in option.fields:
        symbol = f"${tex(each.symbol)}$" if each.symbol else ""
        cells = [f"`{_prefix(option)}{each.name}`", _default(each.default), each.values, symbol, inline(each.text)]
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(["## Hyperparameters", "", *lines, *_grid(option), ""])


def _prefix(option: Option) -> str:
    return f"statistics.{option.name}." if option.group == "statistic" else f"{option.group}."


def _default(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(f"`{each}`" for each in value) or "empty"
    return f"`{'null' if value is None else str(value).lower() if isinstance(value, bool) else value}`"


def _grid(option: Option) -> Iterable[str]:
    grid: Mapping[str, Iterable[Any]] = getattr(option.cls, "grid", {})
    if grid:
        said = "; ".join(f"`{name}` in {', '.join(map(str, values))}" for name, values in grid.items())
        yield f"\n`tune=validation` searches {said}."


def _usage(option: Option) -> str:
    lines = [f"byom {line}" for line in _commands(option)]
    text = "## Use\n\n```bash\n" + "\n".join(lines) + "\n```\n"
    if option.group == "merge" and getattr(option.instance, "needs", None) == _no_needs():
        name = option.cls.__name__
        text += (
            f"\n```python\nfrom {option.cls.__module__} import {name}\n\n"
            f"merged = {name}()(Problem(theta_0, experts))\n```\n\n"
            "[Your own checkpoints](../../start/checkpoints.md) shows how to open `theta_0` and `experts`.\n"
        )
    return text


@cache
def _no_needs() -> Any:
    from byom.variants.none import Nothing

    return Nothing().needs


def _commands(option: Option) -> Iterable[str]:
    suite = "suite=vision8_offline"
    if option.group == "merge":
        yield f"run merge={option.name} byom=none {suite}"
    elif option.group == "byom":
        merge = "merge=ties " if option.instance.on == "merged" else ""
        yield f"run {merge}byom={option.name} {suite}"
    elif option.group == "router":
        yield f"run byom=post_pruning router={option.name} {suite}"
    else:
        yield f"statistics {option.name} {suite}"
    first = option.yaml.read_text(encoding="utf-8").splitlines()[0]
    if first.startswith("# byom "):
        yield first.removeprefix("# byom ")


def _references(option: Option) -> str:
    text = " ".join(option.sections.get("References", "").split())
    found = re.findall(r"(.+?)\s(https?://\S+)", text)
    lines = [f"- {title.strip().rstrip('.')}. <{url}>" for title, url in found]
    return "\n".join(["## References", "", *lines, ""]) if lines else ""


def _differences(option: Option) -> str:
    text = option.sections.get("Differences", "")
    if not text:
        return ""
    return f"## Differences from the paper and other code\n\n{block(text, option.symbols)}\n"


def title(group: str) -> str:
    """Return the heading of a group."""
    return GROUPS[group]

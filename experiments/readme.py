"""Write the README's results from the committed records and benchmark: python -m experiments.readme."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks import budget_trials, floors_2026, lora, selection, true_size
from byom.cli import config
from byom.report import render, scaling
from byom.report.report import Tables, read_runs
from byom.storage.atomic import write_text
from experiments import bytes_per_task, what_to_use

ROOT = Path(__file__).parents[1]
LONG = ("long", "long_packing", "long_wudi")
SUITES = {"vision8_offline": "vit_small_dinov2", "text8_offline": "minilm"}
TITLES = {"vision8_offline": "images, ViT-S/14", "text8_offline": "texts, MiniLM-L6"}


def results(root: Path = ROOT / "results") -> str:
    """Return the Markdown table of mean accuracy by method and density, both suites side by side.

    Args:
        root: The results folder.

    Returns:
        Markdown, the same for the same records.
    """
    frames = {s: Tables(read_runs(root, s, b)).frame for s, b in SUITES.items()}
    header = [f"{TITLES[s]}: accuracy | relative | stored" for s in SUITES]
    lines = [f"| | m | {' | '.join(header)} |", "|---|--:|" + "--:|--:|--:|" * len(SUITES)]
    first = frames["vision8_offline"]
    for _, row in first.iterrows():
        cells = [_cells(frame, row["method"], row["density"]) for frame in frames.values()]
        lines.append(f"| {row['method']} | {_percent(row['density'])} | {' | '.join(cells)} |")
    return "\n".join(lines)


HEADLINE = (
    ("Pre-trained", None), ("Single-task", None), ("Averaging", None), ("Task Arithmetic", None), ("TIES", None),
    ("Post-Pruning", 0.05), ("Post-Pruning", 0.1), ("BYOM-FFT on TIES", 0.05), ("BYOM-FFT on TIES", 0.1),
)  # fmt: skip
"""The rows of the README's table: method and density."""


def headline(root: Path = ROOT / "results") -> str:
    """Return the rows of `results` that the README shows."""
    names = [f"| {method} | {_percent(density or float('nan'))} |" for method, density in HEADLINE]
    lines = results(root).splitlines()
    return "\n".join([*lines[:2], *(line for name in names for line in lines if line.startswith(name))])


def comparison(root: Path = ROOT / "results") -> str:
    """Return the Markdown table of BYOM-FFT minus post-pruning, with bootstrap intervals and distance ratios."""
    frames = {s: Tables(read_runs(root, s, b)).comparison for s, b in SUITES.items()}
    header = [f"{TITLES[s]}: difference | 95 % interval | distance ratio" for s in SUITES]
    lines = [f"| | m | {' | '.join(header)} |", "|---|--:|" + "--:|--:|--:|" * len(SUITES)]
    for _, row in frames["vision8_offline"].iterrows():
        cells = [_difference(_row(frame, row["method"], row["density"])) for frame in frames.values()]
        lines.append(f"| {row['method']} | {_percent(row['density'])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def benchmark(file: Path = ROOT / "benchmarks" / "selection.json") -> str:
    """Return the Markdown table of the committed selection benchmark."""
    return selection.table(json.loads(file.read_text(encoding="utf-8")))


def lora_benchmark(file: Path = ROOT / "benchmarks" / "lora.json") -> str:
    """Return the Markdown tables of the committed benchmark of low-rank factoring."""
    return lora.table(json.loads(file.read_text(encoding="utf-8")))


def budget_trials_tables(file: Path = ROOT / "benchmarks" / "budget_trials.json") -> str:
    """Return the Markdown tables of what was tried for BYOM-Budget and left out."""
    return budget_trials.table(json.loads(file.read_text(encoding="utf-8")))


def floors_of_2026(file: Path = ROOT / "benchmarks" / "floors_2026.json") -> str:
    """Return the Markdown table of the options of 2025 and 2026 beside their floors."""
    return floors_2026.table(json.loads(file.read_text(encoding="utf-8")))


def options(group: str, root: str = "", short: bool = False) -> str:
    """Return the Markdown table of a group's options, made from their classes alone.

    Args:
        group: ``merge``, ``byom`` or ``router``.
        root: The repository's root as seen from the page.
        short: Leave out class and year.

    Returns:
        One row per option: its name and file, what it does, class, paper, year, what it needs and what it stores.
    """
    stored = " stored per task |" if group == "byom" else ""
    rule = "---|" if stored else ""
    lines = [
        f"| `{group}=` | what it does | class | paper | year | needs |{stored}",
        f"|---|---|---|---|--:|---|{rule}",
    ]
    if short:
        lines = [f"| `{group}=` | what it does | paper | needs |{stored}", f"|---|---|---|---|{rule}"]
    return "\n".join(
        [*lines, *(_option(group, path, root, short) for path in sorted((ROOT / "conf" / group).glob("*.yaml")))]
    )


def _option(group: str, path: Path, root: str, short: bool) -> str:
    option = config.option(group, path.stem)
    text = inspect.getdoc(type(option)) or ""
    papers = list(dict.fromkeys(re.findall(r"arxiv\.org/abs/([0-9.]+\d)", text)))
    links = ", ".join(f"[{paper}](https://arxiv.org/abs/{paper})" for paper in papers)
    year = f"20{papers[0][:2]}" if papers else ""
    name = f"[`{path.stem}`]({root}{type(option).__module__.replace('.', '/')}.py)"
    words = text.splitlines()[0].replace("``", "`").replace("|", r"\|")
    stored = f" {option.stores} |" if group == "byom" else ""
    entries = option.needs.entries
    needs = ", ".join(entries[1:] if len(entries) > 1 and option.needs.members == 1 else entries)
    if short:
        return f"| {name} | {words} | {links} | {needs} |{stored}"
    return f"| {name} | {words} | `{type(option).__name__}` | {links} | {year} | {needs} |{stored}"


def methods(root: Path = ROOT / "results" / "methods") -> str:
    """Return the Markdown table of every method and variant on both suites.

    Args:
        root: The results folder of the sweep over all methods.

    Returns:
        Markdown; a row that one suite lacks is left empty there.
    """
    frames = {s: _by_label(Tables(read_runs(root, s, b)).methods) for s, b in SUITES.items()}
    header = [f"{TITLES[s]}: accuracy | relative | stored | seconds" for s in SUITES]
    lines = [f"| | needs | {' | '.join(header)} |", "|---|---|" + "--:|--:|--:|--:|" * len(SUITES)]
    names = dict.fromkeys(name for frame in frames.values() for name in frame.index)
    for name in names:
        first = next(frame.loc[name] for frame in frames.values() if name in frame.index)
        cells = [_costs(frame.loc[name]) if name in frame.index else " | | | " for frame in frames.values()]
        flags = " †" * bool(first["sees_test"]) + " ‡" * bool(first["by_batch"])
        lines.append(f"| {name} | {first['needs']}{flags} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _by_label(frame: pd.DataFrame) -> pd.DataFrame:
    """Index rows by method, with the density where a method has several."""
    densities = frame.groupby("method")["density"].transform("nunique")
    shown = [
        f", m = {_percent(density)}" if n > 1 else "" for density, n in zip(frame["density"], densities, strict=True)
    ]
    return frame.assign(label=frame["method"] + shown).set_index("label")


def _costs(row: pd.Series) -> str:
    seconds = row["statistics_seconds"] + row["merge_seconds"] + row["variant_seconds"]
    spread = "" if pd.isna(row["mean_std"]) else f" ± {100 * row['mean_std']:.1f}"
    accuracy = f"{100 * row['mean']:.1f}{spread} | {100 * row['normalised']:.1f} %"
    return f"{accuracy} | {row['bytes'] / 1e6:.0f} MB | {seconds:.1f}"


SCALING = ROOT / "results" / "scaling" / "tables" / "vision8_offline--vit_small_dinov2--number-of-tasks.csv"


def number_of_tasks(file: Path = SCALING) -> str:
    """Return the Markdown table of normalised accuracy by number of tasks."""
    return render.markdown(scaling.display(pd.read_csv(file))).rstrip("\n")


STAGES = ("merge task_arithmetic", "merge ties", "pack fft", "open fft", "encode fft")


def true_sizes(stages: tuple[str, ...] = ()) -> str:
    """Return the Markdown table of the committed benchmark at true size, and what it could not run.

    Args:
        stages: Its rows, all if empty.
    """
    return true_size.table(json.loads((ROOT / "benchmarks" / "true_size.json").read_text()), stages)


def long_stages() -> str:
    """Return the Markdown table of the stages at true size that were given hours to end; one command per file."""
    parts = [json.loads((ROOT / "benchmarks" / f"true_size_{part}.json").read_text()) for part in LONG]
    whole: dict[str, Any] = {**parts[0], "backbones": {}}
    for name, each in ((name, each) for one in parts for name, each in one["backbones"].items()):
        whole["backbones"].setdefault(name, {**each, "stages": {}})["stages"] |= each["stages"]
    stages = {stage for each in whole["backbones"].values() for stage in each["stages"]}
    order = sorted(stages - {f"merge {true_size.REFERENCE}"}, key=true_size.order)
    return true_size.table(whole, tuple(order)).partition("\n\n")[0]


PARTS = {
    "true-size": lambda: true_sizes(STAGES).partition("\n\n")[0],
    "true-size-all": true_sizes,
    "true-size-long": long_stages,
    "number-of-tasks": number_of_tasks,
    "headline": headline,
    "what-to-use": what_to_use.sentences,
    "results": results,
    "comparison": comparison,
    "benchmark": benchmark,
    "lora-benchmark": lora_benchmark,
    "merge": lambda: options("merge"),
    "byom": lambda: options("byom"),
    "router": lambda: options("router"),
    "merge-options": lambda: options("merge", "../", short=True),
    "byom-options": lambda: options("byom", "../", short=True),
    "router-options": lambda: options("router", "../", short=True),
    "methods": methods,
    "bytes-per-task": bytes_per_task.table,
    "budget-choices": lambda: bytes_per_task.table(bytes_per_task.CHOICES),
    "budget-trials": budget_trials_tables,
    "floors-2026": floors_of_2026,
}


def fill(text: str) -> str:
    """Replace what stands between a page's markers; a part without markers is left out."""
    for name, make in PARTS.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        if re.search(pattern, text, flags=re.S):
            text = re.sub(pattern, lambda found, make=make: f"{found[1]}{make()}\n{found[2]}", text, flags=re.S)
    return text


def _row(frame: pd.DataFrame, method: str, density: float) -> pd.Series:
    same = frame["density"].isna() if pd.isna(density) else frame["density"] == density
    return frame[(frame["method"] == method) & same].iloc[0]


def _cells(frame: pd.DataFrame, method: str, density: float) -> str:
    row = _row(frame, method, density)
    spread = "" if pd.isna(row["mean_std"]) else f" ± {100 * row['mean_std']:.1f}"
    accuracy = f"{100 * row['mean']:.1f}{spread}"
    return f"{accuracy} | {100 * row['normalised']:.1f} % | {row['bytes'] / 1e6:.0f} MB"


def _difference(row: pd.Series) -> str:
    interval = f"{100 * row['lower']:+.1f} to {100 * row['upper']:+.1f}"
    return f"{100 * row['difference']:+.1f} | {interval} | {row['distance']:.2f}"


def _percent(density: float) -> str:
    return "" if pd.isna(density) else f"{100 * density:g} %"


PAGES = (
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("methods", "results", "performance", "budget")),
)


if __name__ == "__main__":
    for page in PAGES:
        write_text(page, fill(page.read_text()))

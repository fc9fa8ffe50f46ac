"""The tables of benchmarks/classification.py, and their section in recipes/README.md."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.measure import ROOT

FLOORS = {"sst2": 0.813, "trec6": 0.886, "banking77": 0.894, "imdb": 0.865}  # TF-IDF of 1-2 grams, logistic regression
REVISED_FLOOR = 0.521
EXACT = {"sst2": 0.811, "trec6": 0.886, "banking77": 0.929}  # logistic regression on MiniLM's mean-pooled features
MODELS = {"minilm": "all-MiniLM-L6-v2", "smollm2": "SmolLM2-135M-Instruct"}
TITLE = "## Classification, measured"


def cpu_seconds(run: dict[str, Any]) -> float:
    """On one thread. The first runs took the clock's, alone on a core, which is about the same."""
    return float(run.get("cpu_seconds") or run["total_seconds"])


def spread(values: list[float], digits: int = 3) -> str:
    """The mean, and of several the smallest and the largest."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def row(way: str, found: list[dict[str, Any]], has_revised: bool) -> str:
    model, strategy = way.split("-", 1)
    columns = 7 + has_revised
    if not found:
        strategy = strategy.replace("head-auto", "head (probed)")
        return f"| {MODELS[model]} | {strategy} |" + " not run yet |" + " - |" * (columns - 1)
    if head := found[0].get("head"):
        strategy = (
            f"{strategy.split('-')[0]} ({head['pooling']} of layer {head['layer']}{', probed' if way != 'minilm-head' else ''})"
        )
    accuracy, f1 = ([run["metrics_after"][key] for run in found] for key in ("accuracy", "macro_f1"))
    revised = [spread([run["revised_accuracy"] for run in found])] if has_revised else []
    cells = [
        spread(accuracy),
        *revised,
        spread(f1),
        f"{statistics.mean(map(cpu_seconds, found)):.0f}",
        f"{max(run['peak_memory_bytes'] for run in found) / 2**30:.2f} GiB",
        f"{found[0]['trainable_parameters']:,}",
        f"{found[0]['artifact_bytes'] / 1e6:.1f} MB",
        str(len(found)),
    ]
    return f"| {MODELS[model]} | {strategy} | " + " | ".join(cells) + " |"


def lines(runs: dict[str, Any], names: list[str], ways: list[str]) -> list[str]:
    """A table for each data set; what was not run says so."""
    out: list[str] = []
    for name in names:
        floor = f"{FLOORS[name]:.3f}" + (f" (revised {REVISED_FLOOR:.3f})" if name == "imdb" else "")
        exact = f"; exact logistic regression on MiniLM's mean: {EXACT[name]:.3f}" if name in EXACT else ""
        found = {way: [run for key, run in runs.items() if key.startswith(f"{name}/{way}/")] for way in ways}
        means = {
            way: statistics.mean(run["metrics_after"]["accuracy"] for run in taken) for way, taken in found.items() if taken
        }
        out += [f"**{name}**: TF-IDF and logistic regression {floor}{exact}"]
        if means:
            way = max(means, key=lambda each: means[each])
            verdict = "above" if means[way] > FLOORS[name] else "BELOW"
            out[-1] += f"; best so far {means[way]:.3f} ({way}), {verdict} the floor"
        revised = " revised |" if name == "imdb" else ""
        out += ["", f"| model | strategy | accuracy |{revised} macro-F1 | s | peak | learn | artefact | seeds |"]
        out += ["|---" * (9 + bool(revised)) + "|", *(row(way, found[way], bool(revised)) for way in ways), ""]
    return out[:-1]


def put_into_readme(table: list[str]) -> None:
    """Replace the section, or add it at the end."""
    file = ROOT / "recipes" / "README.md"
    before, _, rest = file.read_text(encoding="utf-8").partition(TITLE)
    after = rest.partition("\n## ")[2]
    words = [
        TITLE,
        "",
        "Test sets, each measured once after the last step; `python -m benchmarks.classification` goes on with what was not",
        "run yet ([results](../benchmarks/results/classification.json)). SmolLM2 by partial, lora and full saw 1,000 rows,",
        "those of IMDb once, all else every row three times. Seconds are the processor's on one thread (of the eight",
        "earliest runs the clock's), from the recipe to the reloaded result; other work ran beside it: comparable within",
        "a factor, not to the second. Rates were chosen before the first run; those of SmolLM2's partial (1e-4: 74.8 % on",
        "sst2, 75.6 % on trec6, 5.5 % on banking77), lora (5e-4: 85.3, 95.4 and 45.6 %) and full (3e-5: 78.5 % on sst2) were",
        "raised after `benchmarks.rates`, to 1e-3, 1e-3 and what `advise` proposes.",
        "",
        *table,
    ]
    text = before.rstrip() + "\n\n" + "\n".join(words) + "\n"
    file.write_text(text + (f"\n## {after}" if after else ""), encoding="utf-8")

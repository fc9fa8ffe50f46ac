"""The tables of benchmarks/classification.py."""

from __future__ import annotations

import statistics
from typing import Any

FLOORS = {"sst2": 0.813, "trec6": 0.886, "banking77": 0.894, "imdb": 0.865}  # TF-IDF of 1-2 grams, logistic regression
REVISED_FLOOR = 0.521
EXACT = {"sst2": 0.811, "trec6": 0.886, "banking77": 0.929}  # logistic regression on MiniLM's mean-pooled features
MODELS = {"minilm": "all-MiniLM-L6-v2", "smollm2": "SmolLM2-135M-Instruct"}
NOTES = (
    "Every model is evaluated once on the test set, after the last step. SmolLM2 with partial, lora and full was trained on"
    " 1,000 examples (those of IMDb for one epoch); all other runs used every example for three epochs. Seconds are "
    "processor time on one thread (wall-clock time for the eight earliest runs), from the recipe to the reloaded result. "
    "Other work ran in parallel, so they are comparable within a factor, not to the second. Learning rates were chosen "
    "before the first run. Those of SmolLM2's partial (1e-4: 74.8 % on sst2, 75.6 % on trec6, 5.5 % on banking77), lora "
    "(5e-4: 85.3, 95.4 and 45.6 %) and full (3e-5: 78.5 % on sst2) were then raised after `benchmarks.rates`, to 1e-3, 1e-3"
    " and the rate that `advise` proposes."
)


def cpu_seconds(run: dict[str, Any]) -> float:
    """Return the processor time on one thread; for the first runs, the about equal wall-clock time alone on a core."""
    return float(run.get("cpu_seconds") or run["total_seconds"])


def spread(values: list[float], digits: int = 3) -> str:
    """Format the mean, and the range of several values."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def row(way: str, found: list[dict[str, Any]], has_revised: bool) -> str:
    model, strategy = way.split("-", 1)
    columns = 7 + has_revised
    if not found:
        strategy = strategy.replace("head-auto", "head (selected)")
        return f"| {MODELS[model]} | {strategy} |" + " not run yet |" + " - |" * (columns - 1)
    if head := found[0].get("head"):
        how = ", selected" if way != "minilm-head" else ""
        strategy = f"{strategy.split('-')[0]} ({head['pooling']} of layer {head['layer']}{how})"
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


def tables_of(runs: dict[str, Any], names: list[str], ways: list[str]) -> list[str]:
    """Build a table for each dataset; runs that are missing are listed as such."""
    out: list[str] = [NOTES, ""]
    for name in names:
        floor = f"{FLOORS[name]:.3f}" + (f" (revised {REVISED_FLOOR:.3f})" if name == "imdb" else "")
        exact = f"; exact logistic regression on MiniLM's mean-pooled features {EXACT[name]:.3f}" if name in EXACT else ""
        found = {way: [run for key, run in runs.items() if key.startswith(f"{name}/{way}/")] for way in ways}
        means = {
            way: statistics.mean(run["metrics_after"]["accuracy"] for run in taken) for way, taken in found.items() if taken
        }
        out += [f"**{name}**. Baselines: TF-IDF and logistic regression {floor}{exact}"]
        if means:
            way = max(means, key=lambda each: means[each])
            verdict = "above" if means[way] > FLOORS[name] else "BELOW"
            out[-1] += f". Best: {means[way]:.3f} ({way}), {verdict} the TF-IDF baseline"
        revised = " revised |" if name == "imdb" else ""
        out += [
            "",
            f"| model | strategy | accuracy |{revised} macro-F1 | seconds | peak | trainable parameters | artifact | seeds |",
        ]
        out += ["|---" * (9 + bool(revised)) + "|", *(row(way, found[way], bool(revised)) for way in ways), ""]
    return out[:-1]

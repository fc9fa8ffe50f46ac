"""The results of a search: one dict for tune.json, the terminal and the page."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfstrat import __version__
from hfstrat.recipe import format
from hfstrat.tasks import TASKS
from hfstrat.tuning import choosing, schedule, space
from hfstrat.tuning.schedule import Trial

if TYPE_CHECKING:
    import optuna

    from hfstrat.tuning.options import Setting
    from hfstrat.tuning.store import Store

DATA, PAGE = "tune.json", "report.html"
LEAST_TRIALS = 4  # for importances
ALL = "all candidates"
Table = dict[str, Any]


def write(file: Path, text: str) -> None:
    """Write a file atomically and flush it to the disk."""
    partial = file.with_name(f"{file.name}.partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)


def table(
    setting: Setting,
    store: Store,
    winner: tuple[Trial, int],
    luck: dict[str, Any] | None,
    elapsed: float,
    answer: dict[str, Any],
    interrupted: bool,
) -> Table:
    """Everything that is known at the end."""
    task = setting.entries[0].loaded.recipe.task
    quality, options = choosing.quality_of(setting.entries[0].loaded.recipe, setting.in_bytes), setting.options
    trials = store.trials()
    rows = sorted((row(trial, store.params(trial.number), winner) for trial in trials), key=lambda each: each["order"])
    first = next((trial.rungs[0].info for trial in trials if trial.rungs), {})
    return {
        "hfstrat": __version__,
        "task": task,
        "about": about(setting),
        "quality": quality._asdict(),
        "time": options.time,
        "elapsed": elapsed,
        "interrupted": interrupted,
        "search": list(options.search),
        "train_rows": first.get("train_rows"),
        "choosing_rows": first.get("rows"),
        "others": setting.others and Path(setting.others).name,
        "winner": winner[0].number,
        "rung": winner[1],
        "final_seconds": answer.get("seconds"),
        "luck": luck,
        "trials": rows,
        "importances": importances(setting, store),
        "excluded": setting.lineup.excluded,
    }


def about(setting: Setting) -> str:
    """'MiniLM on train.csv'."""
    recipe = setting.entries[0].loaded.recipe
    data = "/".join(Path(recipe.data.train[0].path).parts[-2:])
    return " on ".join(filter(None, (Path(recipe.model.name_or_path).name, data)))


def row(trial: Trial, params: dict[str, Any], winner: tuple[Trial, int] | None) -> Table:
    """One trial of the leaderboard."""
    found: Table = {
        "number": trial.number,
        "label": trial.label,
        "settings": settings(params),
        "params": params,
        "status": "failed" if trial.failed else "complete" if trial.is_complete else format.plural(len(trial.rungs), "rung"),
        "sentence": trial.failed,
        "wins": winner is not None and trial.number == winner[0].number,
        "order": (True, 0.0, 0.0, trial.number),
        "curve": [],
    }
    if not trial.rungs:
        return found
    best = trial.rungs[trial.best]
    spent = 0.0
    for rung in trial.rungs:
        spent += rung.seconds
        found["curve"].append({"seconds": spent, "quality": rung.info["quality"], "steps": rung.trunk + rung.cooldown})
    seconds = sum(rung.seconds for rung in trial.rungs[: trial.best + 1])
    return found | {
        "order": (not found["wins"], -best.score, best.loss, trial.number),
        "quality": best.info["quality"],
        "low": best.info["low"],
        "high": best.info["high"],
        "loss": best.loss,
        "steps": best.trunk + best.cooldown,
        "seconds": seconds,
        "trained": trial.trained,
        "memory": best.info.get("memory"),
        "bytes": best.info.get("bytes"),
        "trainable": best.info.get("trainable"),
    }


def settings(params: dict[str, Any]) -> str:
    """'learning_rate 3.2e-05, r 16'."""
    named = {name.partition(".")[2]: value for name, value in params.items() if name != space.STRATEGY}
    return ", ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in named.items())


def importances(setting: Setting, store: Store) -> dict[str, dict[str, float]]:
    """How much of the variance of first rungs each setting explains (fANOVA, Hutter et al. 2014).

    Among all candidates: of the strategy and of the learning rate relative to its default. Within a strategy: of its keys, if
    there are several. A single one would explain everything.
    """
    import optuna

    every = optuna.create_study(direction="maximize")
    groups = {ALL: every}
    for entry in setting.entries:
        own = groups[entry.label] = store.first_rungs([entry.label])
        default = space.searched(setting.options.search, entry).get(space.USUAL)
        labels = optuna.distributions.CategoricalDistribution([each.label for each in setting.entries])
        ratio = optuna.distributions.FloatDistribution(1 / space.REACH / 1.001, space.REACH * 1.001, log=True)
        for trial in [trial for trial in own.trials if trial.value is not None and default is not None]:
            params = {space.STRATEGY: entry.label, space.USUAL: trial.params[f"{entry.label}.{space.USUAL}"] / default}
            places = {space.STRATEGY: labels, space.USUAL: ratio}
            every.add_trial(optuna.trial.create_trial(value=trial.value, params=params, distributions=places))
    return {name: found for name, study in groups.items() if (found := _importances(study))}


def _importances(study: optuna.Study) -> dict[str, float]:
    """The shares of the parameters that vary; empty if there are fewer than two, or too few trials."""
    from optuna.importance import get_param_importances

    done = [trial for trial in study.trials if trial.value is not None]
    keys = sorted({key for trial in done for key in trial.params})
    varied = [key for key in keys if len({trial.params.get(key) for trial in done}) > 1]
    if len(done) < LEAST_TRIALS or len(varied) < 2 or len({trial.value for trial in done}) < 2:
        return {}
    with contextlib.suppress(ValueError, RuntimeError):
        shares = get_param_importances(study, params=varied)
        return {key.rpartition(".")[2]: float(value) for key, value in shares.items()}
    return {}


def sentences(table: Table) -> list[str]:
    """The result in words."""
    metric, task = table["quality"]["metric"], table["task"]
    win = next(each for each in table["trials"] if each["wins"])
    name = f"loss ({TASKS[task].text.loss_unit})" if metric == "loss" else metric.replace("_", " ")
    interval = format.interval(metric, win["low"], win["high"])
    named = f"{win['label']} ({win['settings']})" if win["settings"] else win["label"]
    rows, was_chosen = format.plural(table["choosing_rows"], "row"), sum(len(each["curve"]) for each in table["trials"]) > 1
    where = f"the {rows} that chose it" if was_chosen else f"{rows} held out; no other candidate was measured"
    lines = [f"best: {named}, {name} {format.metric(metric, win['quality'])} ({interval}) on {where}"]
    if luck := table["luck"]:
        where = f"of {table['others']}" if table["others"] else "held out that did not choose it"
        value = f"{format.metric(metric, luck['value'])} ({format.interval(metric, luck['low'], luck['high'])})"
        lines.append(f"measured again on {format.plural(luck['rows'], 'row')} {where}: {name} {value}")
    if was_chosen and luck:
        low, high = (format.difference(metric, luck[key]) for key in ("luck_low", "luck_high"))
        told = "" if luck["luck_low"] > 0 or luck["luck_high"] < 0 else ", which is not significant"
        lines.append(
            f"selection luck: {format.difference(metric, luck['luck'])} (95% CI {low.removesuffix(' pp')} to {high}){told}"
        )
    strategies = format.plural(len({each["label"] for each in table["trials"]}), "strategy", "strategies")
    took = f"{format.duration(table['elapsed'])} of {format.duration(table['time'])}"
    lines.append(f"{format.plural(len(table['trials']), 'candidate')} of {strategies} in {took}")
    return lines


def notes(table: Table) -> list[str]:
    """Failed candidates and excluded strategies."""
    failed = [
        f"{each['label']} ({each['settings']}) failed: {each['sentence']}" for each in table["trials"] if each["sentence"]
    ]
    return failed + [f"{name} is excluded: {reason}" for name, reason in table["excluded"].items()]


def front(points: dict[int, tuple[float, float]], higher_is_better: bool) -> set[int]:
    """The points that no other beats in quality at no higher cost: `(quality, cost)` by number."""
    sign = 1 if higher_is_better else -1
    return {
        number
        for number, (quality, cost) in points.items()
        if not any(
            sign * other >= sign * quality and price <= cost and (sign * other > sign * quality or price < cost)
            for other, price in points.values()
        )
    }


def leaderboard(trials: list[Trial]) -> list[tuple[Trial, schedule.Rung]]:
    """The measured trials with their best rungs, best first."""
    measured = [(trial, trial.rungs[trial.best]) for trial in trials if trial.rungs]
    return sorted(measured, key=lambda each: (*each[1].key, -each[0].number), reverse=True)


def figures(each: Table, metric: str) -> list[str]:
    """The cells of a measured trial in a leaderboard: the metric, its interval, loss, steps, time and memory."""
    return [
        format.metric(metric, each["quality"]),
        format.interval(metric, each["low"], each["high"]),
        f"{each['loss']:.4f}",
        f"{each['steps']:,}",
        format.duration(each["seconds"]),
        format.memory(each["memory"]),
    ]

"""What is searched: the keys of `--search`, where they are in a recipe, and their distributions."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hfstrat.engine.entries import Entry
from hfstrat.errors import UserError
from hfstrat.recipe.schema import Recipe

if TYPE_CHECKING:
    from optuna.trial import Trial

REACH = 5.0  # of the learning rate: the default divided and multiplied by this
USUAL = "learning_rate"
STRATEGY = "strategy"  # the name of the parameter that chooses the strategy


@dataclass(frozen=True)
class Key:
    """A key that can be searched: its place in the recipe, and its choices (None: a range around the default)."""

    place: str
    choices: tuple[Any, ...] | None = None

    def default(self, recipe: Recipe) -> Any:
        """The value in a recipe; None if its strategy does not have the key, or its objective does not allow another value."""
        if self.place == "strategy.lora_dropout" and recipe.objective.name != "sft":
            return None
        section, name = self.place.split(".")
        return getattr(getattr(recipe, section), name, None)


KEYS = {
    "learning_rate": Key("training.learning_rate"),
    "global_batch_size": Key("training.global_batch_size", (8, 16, 32, 64)),
    "weight_decay": Key("training.weight_decay", (0.0, 0.01, 0.1)),
    "max_grad_norm": Key("training.max_grad_norm", (0.3, 1.0, 3.0)),
    "r": Key("strategy.r", (4, 8, 16, 32, 64)),
    "lora_dropout": Key("strategy.lora_dropout", (0.0, 0.05, 0.1)),
    "last_n_layers": Key("strategy.last_n_layers", (1, 2, 3, 4, 6, 8, 12)),
    "layer_decay": Key("strategy.layer_decay", (0.7, 0.8, 0.9, 1.0)),
}


def parse_keys(text: str | None) -> tuple[str, ...]:
    """The keys in `--search learning_rate,r`; by default the learning rate. Raises UserError for an unknown key."""
    if text is None:
        return (USUAL,)
    names = tuple(name.strip().rpartition(".")[2] for name in text.split(",") if name.strip())
    for name in names:
        if name not in KEYS:
            raise UserError(f"--search: {name}: cannot be searched; expected some of {', '.join(KEYS)}")
    if not names or len(set(names)) < len(names):
        raise UserError(f"--search: {text}: expected some of {', '.join(KEYS)}, each once")
    return names


def searched(names: Sequence[str], entry: Entry) -> dict[str, Any]:
    """The default of each searched key that a candidate has; none if it is solved."""
    if entry.at_once:
        return {}
    found = {name: KEYS[name].default(entry.loaded.recipe) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def check(names: Sequence[str], entries: Sequence[Entry]) -> None:
    """Raise UserError for a key that no candidate has."""
    for name in names:
        if not any(name in searched(names, entry) for entry in entries):
            raise UserError(
                f"--search: {name}: none of the candidates ({', '.join(each.label for each in entries)}) has "
                f"{KEYS[name].place}; remove it, or add a strategy that has it"
            )


def choices(name: str, default: Any) -> tuple[Any, ...]:
    """The values of a key with choices, and its default; of blocks, of which a model has a number, at most twice that."""
    given = [each for each in KEYS[name].choices or () if name != "last_n_layers" or each <= 2 * default]
    return tuple(sorted({*given, default}))


def defaults(names: Sequence[str], entry: Entry) -> dict[str, Any]:
    """The parameters of a candidate as its recipe has them."""
    return {STRATEGY: entry.label} | {f"{entry.label}.{name}": value for name, value in searched(names, entry).items()}


def suggest(
    trial: Trial, names: Sequence[str], entries: Sequence[Entry], labels: Sequence[str] | None = None
) -> dict[str, Any]:
    """The parameters of a new trial: the strategy (one of `labels`; None: of all), and the keys that it has."""
    label = trial.suggest_categorical(STRATEGY, labels or [entry.label for entry in entries])
    entry = next(entry for entry in entries if entry.label == label)
    found: dict[str, Any] = {}
    for name, default in searched(names, entry).items():
        place = f"{label}.{name}"
        if KEYS[name].choices is None:
            found[name] = trial.suggest_float(place, default / REACH, default * REACH, log=True)
        else:
            found[name] = trial.suggest_categorical(place, choices(name, default))
    return {STRATEGY: label, **found}


def overrides(params: dict[str, Any]) -> list[str]:
    """The overrides of a recipe for the parameters of a trial (Optuna's names, with the label of the candidate before each)."""
    label = params[STRATEGY]
    rounded: Callable[[Any], Any] = lambda value: float(f"{value:.4g}") if isinstance(value, float) else value  # noqa: E731
    return [
        f"{KEYS[name.removeprefix(f'{label}.')].place}={json.dumps(rounded(value))}"
        for name, value in sorted(params.items())
        if name.startswith(f"{label}.")
    ]

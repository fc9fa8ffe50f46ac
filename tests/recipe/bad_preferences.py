"""Bad recipes with a preference objective; a part of the corpus in `bad_recipes`."""

from __future__ import annotations

import json
from typing import Any

from bad_recipes import EVAL_SIZE, NAME, OUTPUT, RATE, TRAIN, Bad, R, at, key, rows

PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
LABELED = {"prompt": "a", "completion": "b", "label": True}
OBJECTIVE = OUTPUT + 1


def objective(name: str, value: str, message: list[str], where: str = at(OBJECTIVE), **more: Any) -> Bad:
    """The sound recipe on pairs with another objective."""
    lines = {OUTPUT: f"output_dir: run\nobjective: {value}", **more.pop("lines", {})}
    return Bad(name, where, message, lines, files=of(*[PAIR] * 8) | more.pop("files", {}), **more)


def of(*given: Any) -> dict[str, str | bytes | None]:
    return rows(*map(json.dumps, given))


def on_rows(name: str, row: Any, message: list[str], value: str = "dpo", where: str = at(TRAIN)) -> Bad:
    """Rows that do not fit the objective; the mistake is in the second one."""
    sound = LABELED if value == "kto" else PAIR
    given = [row] * 8 if set(row) != set(sound) else [sound, row, *[sound] * 6]
    return Bad(name, where, message, {OUTPUT: f"output_dir: run\nobjective: {value}"}, files=of(*given))


VALUES = [
    objective("a typo of dpo", "dppo", ["objective.name", "did you mean 'dpo'?"]),
    objective("ppo", "ppo", ["objective.name", "not supported in this version", "dpo, kto, orpo and simpo"]),
    objective("ppo as a mapping", "{name: ppo}", ["objective.name", "not supported in this version"]),
    objective("ipo as an objective", "ipo", ["objective.name", "{name: dpo, loss_type: ...}"]),
    objective("cpo as an objective", "cpo", ["objective.name", "objective: simpo"]),
    objective("a number as an objective", "3", ["objective", "one of dpo, grpo, kto, orpo, sft, simpo"]),
    objective("an objective without a name", "{beta: 0.1}", ["objective.name: missing", "dpo, grpo, kto, orpo, sft, simpo"]),
    objective("a list of objectives", "[dpo, kto]", ["objective", "one of dpo, grpo, kto, orpo, sft, simpo"]),
    objective("a typo of beta", "{name: dpo, bta: 0.1}", ["objective.bta", "objective dpo", "did you mean 'beta'?"]),
    objective("beta of zero", "{name: dpo, beta: 0}", ["objective.beta = 0", "more than 0"]),
    objective("beta as text", "{name: dpo, beta: small}", ["objective.beta", "a number"]),
    objective("an infinite beta", "{name: kto, beta: .inf}", ["objective.beta", "finite"]),
    objective(
        "a loss that depends on the batch", "{name: dpo, loss_type: aot}", ["objective.loss_type", "sigmoid, hinge, ipo"]
    ),
    objective("a list of losses", "{name: dpo, loss_type: [sigmoid, sft]}", ["objective.loss_type", "sigmoid, hinge"]),
    objective("smoothing that nothing reads", "{name: dpo, label_smoothing: 0.1}", ["label_smoothing", "exo_pair or robust"]),
    objective("exo without smoothing", "{name: dpo, loss_type: exo_pair}", ["label_smoothing", "such as 0.001"]),
    objective(
        "smoothing of a half", "{name: dpo, loss_type: robust, label_smoothing: 0.5}", ["label_smoothing", "less than 0.5"]
    ),
    objective("a temperature that nothing reads", "{name: dpo, discopop_tau: 0.1}", ["discopop_tau", "loss_type: discopop"]),
    objective(
        "a loss of orpo", "{name: orpo, loss_type: ipo}", ["objective.loss_type", "belongs to objective dpo, grpo and kto"]
    ),
    objective("a margin of dpo", "{name: dpo, simpo_gamma: 1.0}", ["simpo_gamma", "belongs to objective simpo"]),
    objective("a negative margin", "{name: simpo, simpo_gamma: -1.0}", ["simpo_gamma", "at least 0"]),
    objective("a weight of zero", "{name: kto, desirable_weight: 0}", ["desirable_weight", "more than 0"]),
    objective("a loss of pairs for kto", "{name: kto, loss_type: sigmoid}", ["loss_type", "kto, apo_zero_unpaired"]),
    objective("keys of sft", "{name: sft, beta: 0.1}", ["objective.beta", "belongs to objective"]),
    key("beta of another tool", OUTPUT, "output_dir: run\npref_beta: 0.1", ["pref_beta", "'objective.beta'"], 1),
    key("a stage of another tool", OUTPUT, "output_dir: run\nstage: dpo", ["stage", "`objective: dpo`"], 1),
    key("rl of another tool", OUTPUT, "output_dir: run\nrl: dpo", ["rl", "'objective.name'"], 1),
    key("dpo as a strategy", NAME, "  name: dpo", ["strategy.name", "`objective: dpo`"]),
    key("an objective in training", RATE, "  objective: dpo", ["training.objective", "objective"]),
]
COMBINED = [
    objective("dpo of a classifier", "dpo\ntask: text-classification", ["objective: dpo", "task: causal-lm"]),
    objective("kto of numbers", "kto\ntask: regression", ["objective: kto", "task: causal-lm"]),
    objective("dpo from scratch", "dpo", ["strategy scratch", "objective: sft first"], lines={NAME: "  name: scratch", R: ""}),
    objective("dpo of a head", "dpo", ["strategy head", "use lora, partial or full"], lines={NAME: "  name: head", R: ""}),
    objective(
        "dpo of a student",
        "dpo",
        ["strategy distill", "distill with objective: sft"],
        lines={NAME: "  name: distill", R: "  student: lora\n  teacher: model"},
        where="recipe.yaml:13: ",
    ),
    objective(
        "pairs that are split",
        "dpo",
        ["data.overflow: split", "truncate"],
        at(EVAL_SIZE),
        lines={EVAL_SIZE: "  overflow: split"},
    ),
    objective("whole files", "dpo", ["data.documents: files"], at(EVAL_SIZE), lines={EVAL_SIZE: "  documents: files"}),
    objective(
        "a mask of pairs", "orpo", ["data.train_on: all", "remove it"], at(EVAL_SIZE), lines={EVAL_SIZE: "  train_on: all"}
    ),
    objective(
        "cached states of pairs",
        "dpo",
        ["strategy.precompute: true", "pairs"],
        at(R + 1),
        lines={NAME: "  name: partial", R: "  last_n_layers: 1\n  precompute: true"},
    ),
    objective(
        "packed answers",
        "kto",
        ["training.packing: true", "kto"],
        at(RATE),
        lines={RATE: "  packing: true"},
        files=of(*[LABELED] * 8),
    ),
    objective(
        "a format of sft",
        "dpo",
        ["data.format", "messages has no preferences", "`objective: sft`"],
        at(EVAL_SIZE),
        lines={EVAL_SIZE: "  format: messages"},
    ),
    key("a format of preferences", EVAL_SIZE, "  format: preference", ["data.format: preference", "`objective: dpo`"]),
]
ROWS = [
    on_rows("completions for dpo", {"prompt": "a", "completion": "b"}, ["no preferences", "prompt, chosen and rejected"]),
    on_rows("texts for dpo", {"text": "a"}, ["no preferences", "no column looks like"]),
    on_rows("only chosen answers", {"prompt": "a", "chosen": "b"}, ["no preferences", "no column looks like rejected"]),
    on_rows("winners and losers", {"question": "a", "winner": "b", "loser": "c"}, ["winner: chosen", "loser: rejected"]),
    on_rows("labels for dpo", LABELED, ["no preferences", "prompt, chosen and rejected"]),
    on_rows("completions for kto", {"prompt": "a", "completion": "b"}, ["no preferences", "no column looks like label"], "kto"),
    on_rows("a number as an answer", {**PAIR, "chosen": 3}, ["row 2", "'chosen' is int, expected text"]),
    on_rows("no answer", {**PAIR, "rejected": None}, ["row 2", "'rejected' is null"]),
    on_rows("texts without a prompt", {**PAIR, "prompt": None}, ["row 2", "no prompt"]),
    on_rows("a list of texts", {**PAIR, "chosen": ["b", "d"]}, ["row 2", "'chosen' contains an entry that is not a message"]),
    on_rows("an unknown speaker", {**PAIR, "chosen": [{"from": "narrator", "value": "b"}]}, ["row 2", "'narrator'"]),
    on_rows("tools that are no JSON in a pair", {**PAIR, "tools": "[{"}, ["'tools' is not valid JSON"]),
    on_rows("a number as a prompt", {**LABELED, "prompt": 1.5}, ["row 2", "'prompt' is float, expected text"], "kto"),
    on_rows("a null completion", {**LABELED, "completion": 3}, ["row 2", "'completion' is int"], "kto"),
]
PREFERENCES = [*VALUES, *COMBINED, *ROWS]

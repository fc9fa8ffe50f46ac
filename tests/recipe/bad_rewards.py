"""Bad recipes with the objective grpo; a part of the corpus in `bad_recipes`."""

from __future__ import annotations

import json
from typing import Any

from bad_recipes import EVAL_SIZE, NAME, OUTPUT, RATE, TRAIN, Bad, R, at, key, rows

ROW = {"prompt": "a", "answer": "b"}
OBJECTIVE = OUTPUT + 1
MINE = "def mine(completions, **columns):\n    return [0.0] * len(completions)\n"


def grpo(name: str, value: str, message: list[str], where: str = at(OBJECTIVE), **more: Any) -> Bad:
    """The sound recipe on prompts with keys of grpo."""
    given = "{name: grpo" + f", {value}" * bool(value) + "}"
    lines = {OUTPUT: f"output_dir: run\nobjective: {given}", **more.pop("lines", {})}
    files = rows(*[json.dumps(ROW)] * 8) | {"mine.py": MINE} | more.pop("files", {})
    return Bad(name, where, message, lines, files=files, **more)


def reward(name: str, value: str, message: list[str], **more: Any) -> Bad:
    return grpo(name, f"rewards: [{value}]", message, **more)


def on_rows(name: str, given: list[Any], message: list[str], value: str = "json_valid", **lines: Any) -> Bad:
    return reward(name, value, message, where=at(TRAIN), files=rows(*map(json.dumps, given)), lines=lines.pop("lines", {}))


VALUES = [
    grpo("no rewards", "", ["objective.rewards", "missing"]),
    grpo("an empty list of rewards", "rewards: []", ["objective.rewards"]),
    grpo("one answer to a prompt", "rewards: json_valid, num_generations: 1", ["num_generations = 1", "at least 2"]),
    grpo("answers as text", "rewards: json_valid, num_generations: many", ["num_generations", "whole number"]),
    grpo("greedy sampling", "rewards: json_valid, temperature: 0", ["temperature = 0", "more than 0"]),
    grpo("a probability above one", "rewards: json_valid, top_p: 1.5", ["top_p"]),
    grpo("a negative top_k", "rewards: json_valid, top_k: -1", ["top_k"]),
    grpo("a negative beta", "rewards: json_valid, beta: -1", ["objective.beta"]),
    grpo("a loss of dpo", "rewards: json_valid, loss_type: sigmoid", ["objective.loss_type", "dapo, grpo"]),
    grpo("a scale that is unknown", "rewards: json_valid, scale_rewards: std", ["scale_rewards", "group, batch"]),
    grpo("a typo of num_generations", "rewards: json_valid, num_generation: 4", ["did you mean 'num_generations'?"]),
    grpo("a mode without vLLM", "rewards: json_valid, vllm_mode: server", ["vllm_mode", "use_vllm: true"]),
    grpo("vLLM that is not installed", "rewards: json_valid, use_vllm: true", ["use_vllm: true", "not installed"]),
    grpo("no room for an answer", "rewards: json_valid, max_completion_length: 0", ["max_completion_length"]),
    key(
        "rewards of sft",
        OUTPUT,
        "output_dir: run\nobjective: {name: sft, rewards: json_valid}",
        ["belongs to objective grpo"],
        1,
    ),
    key("grpo without rewards", OUTPUT, "output_dir: run\nobjective: grpo", ["objective.rewards"], 1),
    key("grpo as a strategy", NAME, "  name: grpo", ["strategy.name", "`name: grpo`"]),
    key("a stage of another tool for rewards", OUTPUT, "output_dir: run\nstage: grpo", ["stage", "`name: grpo`"], 1),
]
SCORES = [
    reward("an unknown reward", "json", ["there is no reward 'json'", "json_valid", "file.py:function"]),
    reward("a number as a reward", "3", ["objective.rewards"]),
    reward("a pattern that is missing", "regex", ["pattern", "regex needs it"]),
    reward("a pattern of a reward that is none", "{name: regex, pattern: '('}", ["not a regular expression"]),
    reward("a pattern that nothing reads", "{name: json_valid, pattern: x}", ["pattern", "does not read it"]),
    reward("a schema that is missing", "json_schema", ["json_schema", "needs it"]),
    reward("a schema that is none", "{name: json_schema, json_schema: {type: thing}}", ["not a JSON schema", "thing"]),
    reward("a length without limits", "length", ["min_length", "max_length"]),
    reward("limits that cross", "{name: length, min_length: 9, max_length: 3}", ["min_length: 9", "max_length: 3"]),
    reward("a unit that is unknown", "{name: length, max_length: 3, unit: bytes}", ["unit", "tokens, words"]),
    reward("a negative tolerance", "{name: numeric, tolerance: -1}", ["tolerance"]),
    reward("a reward without weight", "{name: json_valid, weight: 0}", ["weight", "other than 0"]),
    reward("an infinite weight", "{name: json_valid, weight: .inf}", ["weight"]),
    reward("a typo of weight", "{name: json_valid, wight: 2}", ["wight", "did you mean 'weight'?"]),
    reward("arguments of a named reward", "{name: json_valid, kwargs: {a: 1}}", ["kwargs", "does not read it"]),
    reward("a file that does not exist", "'other.py:mine'", ["other.py does not exist"]),
    reward("a function that does not exist", "'mine.py:yours'", ["no function 'yours'", "it has mine"]),
    reward("a file that is no Python", "'bad.py:mine'", ["bad.py cannot be read"], files={"bad.py": "def mine(:\n"}),
    reward("a module by its dotted name", "mine.rewards", ["there is no reward 'mine.rewards'", "file.py:function"]),
]
COMBINED = [
    Bad(
        "grpo of a classifier",
        at(OBJECTIVE),
        ["objective: grpo", "task: causal-lm"],
        {OUTPUT: "output_dir: run\nobjective: {name: grpo, rewards: json_valid}\ntask: text-classification"},
        files=rows(*[json.dumps(ROW)] * 8),
    ),
    reward("grpo from scratch", "json_valid", ["strategy scratch", "sft first"], lines={NAME: "  name: scratch", R: ""}),
    reward("grpo of a head", "json_valid", ["strategy head", "use lora"], lines={NAME: "  name: head", R: ""}),
    reward(
        "grpo of a student",
        "json_valid",
        ["strategy distill", "distill with objective: sft"],
        lines={NAME: "  name: distill", R: "  student: lora\n  teacher: model"},
        where="recipe.yaml:13: ",
    ),
    reward(
        "prompts that are split",
        "json_valid",
        ["data.overflow: split", "drop or error"],
        where=at(EVAL_SIZE),
        lines={EVAL_SIZE: "  overflow: split"},
    ),
    reward(
        "files as prompts",
        "json_valid",
        ["data.documents: files"],
        where=at(EVAL_SIZE),
        lines={EVAL_SIZE: "  documents: files"},
    ),
    reward(
        "a mask of prompts",
        "json_valid",
        ["data.train_on: all", "remove it"],
        where=at(EVAL_SIZE),
        lines={EVAL_SIZE: "  train_on: all"},
    ),
    reward(
        "packed prompts",
        "json_valid",
        ["training.packing: true", "grpo"],
        where=at(RATE),
        lines={RATE: "  packing: true"},
    ),
    reward(
        "cached states of prompts",
        "json_valid",
        ["strategy.precompute: true", "change with the model"],
        where=at(R + 1),
        lines={NAME: "  name: partial", R: "  last_n_layers: 1\n  precompute: true"},
    ),
    reward(
        "dropout of prompts",
        "json_valid",
        ["strategy.lora_dropout", "without dropout"],
        where=at(R + 1),
        lines={R: "  r: 8\n  lora_dropout: 0.1"},
    ),
    reward(
        "an adapter of the head",
        "json_valid",
        ["strategy.target_modules", "lm_head"],
        where=at(R + 1),
        lines={R: "  r: 8\n  target_modules: [q_proj, lm_head]"},
    ),
    reward(
        "a format of prompts",
        "json_valid",
        ["data.format", "reads the prompts of any rows"],
        where=at(EVAL_SIZE),
        lines={EVAL_SIZE: "  format: messages"},
    ),
]
ROWS = [
    on_rows("texts as prompts", [{"text": "a"}] * 8, ["have no prompt", "text: prompt"]),
    on_rows("questions as prompts", [{"question": "a", "answer": "b"}] * 8, ["have no prompt", "question: prompt"]),
    on_rows("a number as the prompt of a reward", [ROW, {**ROW, "prompt": 3}, *[ROW] * 6], ["row 2", "'prompt' is int"]),
    on_rows(
        "an unknown speaker of a prompt", [ROW, {**ROW, "prompt": [{"from": "narrator", "value": "y"}]}], ["row 2", "narrator"]
    ),
    on_rows("tools of a prompt that are no JSON", [ROW, {**ROW, "tools": "[{"}], ["'tools' is not valid JSON"]),
]
REWARDS = [*VALUES, *SCORES, *COMBINED, *ROWS]

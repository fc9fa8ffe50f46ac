"""Rewards: functions from an answer to a number, by name or from a file of one's own, and the checks of what they return."""

from __future__ import annotations

import ast
import asyncio
import importlib.util
import inspect
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfstrat.errors import UserError
from hfstrat.recipe.rewards import Reward, labels

if TYPE_CHECKING:
    from hfstrat.recipe.objectives import Grpo

NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
SHOWN = 120  # characters of a prompt in a message
OF_TRL = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "prompt", "completion")


def exact_match(reward: Reward, answer: str, reference: str | None, ids: Sequence[int]) -> float:
    """1 if the answer is that of the row, apart from white space around it; of both what the pattern finds, or of the row's
    answer all of it where it does not occur there."""
    one, other = (_extracted(reward, text or "") for text in (answer, reference))
    if other is None:
        other = _extracted(reward.model_copy(update={"pattern": None}), reference or "")
    return float(one is not None and one == other)


def _extracted(reward: Reward, text: str) -> str | None:
    """What is compared of a text; None where the pattern does not occur."""
    if reward.pattern is not None:
        found = list(re.finditer(reward.pattern, text, re.IGNORECASE if reward.ignore_case else 0))
        if not found:
            return None
        text = next((group for group in found[-1].groups() if group is not None), found[-1].group())
    return text.strip().casefold() if reward.ignore_case else text.strip()


def regex(reward: Reward, answer: str, reference: str | None, ids: Sequence[int]) -> float:
    """1 if the pattern occurs in the answer."""
    return float(re.search(str(reward.pattern), answer, re.IGNORECASE if reward.ignore_case else 0) is not None)


def json_valid(reward: Reward, answer: str, reference: str | None, ids: Sequence[int]) -> float:
    """1 if the answer is a JSON object or list, and nothing else."""
    return float(_parsed(answer) is not None)


def _parsed(text: str) -> Any:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict | list) else None


def json_schema(reward: Reward, answer: str, reference: str | None, ids: Sequence[int]) -> float:
    """1 if the answer is JSON that fits the schema, and nothing else."""
    found = _parsed(answer)
    return float(found is not None and _validator(json.dumps(reward.json_schema)).is_valid(found))


@cache
def _validator(schema: str) -> Any:
    """Raises UserError if jsonschema is not installed, or the schema is none."""
    if importlib.util.find_spec("jsonschema") is None:
        raise UserError("objective.rewards: json_schema needs jsonschema: pip install 'hfstrat[rewards]'")
    import jsonschema

    given = json.loads(schema)
    try:
        jsonschema.Draft202012Validator.check_schema(given)
    except jsonschema.SchemaError as error:
        raise UserError(f"objective.rewards: json_schema: not a JSON schema: {error.message}") from None
    return jsonschema.Draft202012Validator(given)


def length(reward: Reward, answer: str, reference: str | None, ids: Sequence[int]) -> float:
    """1 between the limits; below them in proportion, above them falling to 0 at twice the upper one."""
    count = {"tokens": len(ids), "words": len(answer.split()), "characters": len(answer)}[reward.unit]
    if reward.min_length and count < reward.min_length:
        return count / reward.min_length
    if reward.max_length and count > reward.max_length:
        return max(0.0, 2 - count / reward.max_length)
    return 1.0


def numeric(reward: Reward, answer: str, reference: str | None, ids: Sequence[int]) -> float:
    """1 if the last number of the answer equals that of the row's answer, as in GSM8K."""
    one, other = _number(answer), _number(reference or "")
    return float(one is not None and other is not None and math.isclose(one, other, rel_tol=reward.tolerance, abs_tol=1e-12))


def _number(text: str) -> float | None:
    """The last number of a text, after `####` if there is one; commas separate thousands."""
    found = NUMBER.findall(text.rpartition("####")[2])
    return float(found[-1].replace(",", "")) if found else None


Score = Callable[[Reward, str, str | None, Sequence[int]], float]
NAMED: dict[str, Score] = {
    "exact_match": exact_match,
    "regex": regex,
    "json_valid": json_valid,
    "json_schema": json_schema,
    "length": length,
    "numeric": numeric,
}


def check(rewards: Sequence[Reward]) -> None:
    """Refuse rewards that cannot be computed, without running code of the user. Raises UserError."""
    for reward in rewards:
        if reward.json_schema is not None:
            _validator(json.dumps(reward.json_schema))
        if reward.function:
            _check_function(*reward.function)


def _check_function(file: Path, name: str) -> None:
    if not file.is_file():
        raise UserError(f"objective.rewards: {file} does not exist; expected file.py:function")
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError) as error:
        raise UserError(f"objective.rewards: {file} cannot be read: {error}") from None
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    bound = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    bound |= {alias.asname or alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    if name not in {*functions, *bound}:
        raise UserError(f"objective.rewards: {file} has no function '{name}'; it has {', '.join(functions) or 'none'}")


@cache
def _load(file: Path, name: str) -> Callable[..., Any]:
    """The user's function. Raises UserError where its file cannot be run."""
    spec = importlib.util.spec_from_file_location(f"hfstrat_rewards_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
        return getattr(module, name)  # type: ignore[no-any-return]
    except Exception as error:
        raise UserError(f"objective.rewards: {file} cannot be loaded: {type(error).__name__}: {error}") from error


class Scorer:
    """The rewards of a recipe.

    Args:
        section: of the recipe.
        tokenizer: splits answers into tokens.
    """

    def __init__(self, section: Grpo, tokenizer: Any) -> None:
        self.rewards, self.tokenizer = section.rewards, tokenizer
        self.names, self.weights = labels(section.rewards), [reward.weight for reward in section.rewards]

    def score(self, place: int, given: list[dict[str, Any]], ids: list[list[int]], **of_trl: Any) -> list[float | None]:
        """One reward of some answers.

        Args:
            place: of the reward.
            given: of each answer the prompt, the answer to compare with, and the columns of its row.
            ids: the tokens of each answer.
            of_trl: what TRL gives a reward function in training; elsewhere a new state, and logs that are not kept.

        Raises:
            UserError: the function raises an error, or returns anything but a finite number or None for each answer.
        """
        reward = self.rewards[place]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        if reward.function is None:
            return [self._named(reward, row, text, one) for text, row, one in zip(texts, given, ids, strict=True)]
        return self._of_function(reward, given, texts, ids, of_trl)

    @staticmethod
    def _named(reward: Reward, row: dict[str, Any], text: str, ids: list[int]) -> float:
        try:
            return NAMED[reward.name](reward, text, row["answer"], ids)
        except Exception as error:  # a schema may refer to what does not exist
            where = f"{reward.name}, for the prompt {_shown(row['prompt'])} and the answer {_shown(text)}"
            raise UserError(f"objective.rewards: {where}: {type(error).__name__}: {error}") from error

    def _of_function(
        self, reward: Reward, given: list[dict[str, Any]], texts: list[str], ids: list[list[int]], of_trl: dict[str, Any]
    ) -> list[float | None]:
        from transformers import TrainerState

        assert reward.function is not None
        function, prompts = _load(*reward.function), [row["prompt"] for row in given]
        named = list(dict.fromkeys(name for row in given for name in row["columns"]))
        columns = {name: [row["columns"].get(name) for row in given] for name in named if name not in OF_TRL}
        columns.setdefault("answer", [row["answer"] for row in given])
        completions: list[Any] = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        of_trl = of_trl or {"trainer_state": TrainerState(), "log_extra": _nothing, "log_metric": _nothing}
        arguments = {
            "prompts": prompts,
            "completions": completions,
            "completion_ids": ids,
            **columns,
            **of_trl,
            **reward.kwargs,
        }
        where = f"objective.rewards: {reward.name}, for the prompt {_shown(prompts[0])}"
        try:
            found = function(**_accepted(function, arguments))
            found = asyncio.run(found) if inspect.iscoroutine(found) else found
            found = [None if value is None else float(value) for value in found]
        except Exception as error:
            raise UserError(f"{where} and {len(prompts) - 1} more: {type(error).__name__}: {error}") from error
        if len(found) != len(prompts):
            raise UserError(
                f"{where} and {len(prompts) - 1} more: {len(found)} values for {len(prompts)} answers; return one each"
            )
        for value, prompt, text in zip(found, prompts, texts, strict=True):
            if value is not None and not math.isfinite(value):
                raise UserError(
                    f"objective.rewards: {reward.name} returned {value} for the prompt {_shown(prompt)} and the answer "
                    f"{_shown(text)}; return a finite number, or None where it does not apply"
                )
        return found


def _nothing(*_: Any) -> None:
    """Keep nothing of what a function logs outside of training."""


def _accepted(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a function takes: all of them if it has `**kwargs`, as TRL asks for."""
    parameters = inspect.signature(function).parameters
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
        return arguments
    return {name: value for name, value in arguments.items() if name in parameters}


def _shown(prompt: Any) -> str:
    """The beginning of a prompt or an answer, in quotes."""
    text = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
    return json.dumps(text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}...", ensure_ascii=False)

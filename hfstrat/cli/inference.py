"""`hfstrat generate`, `chat` and `predict`: answers to prompts, a conversation, labels or numbers of texts."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hfstrat.data.messages import BadRow, parse_template_kwargs, parse_tools
from hfstrat.errors import UserError
from hfstrat.tasks import TASKS, generation
from hfstrat.tasks.artifact import check_output, check_task, load, task_of
from hfstrat.tasks.causal_lm import CausalLM
from hfstrat.tasks.generation import How
from hfstrat.tasks.heads import HeadText

COMMANDS = "/reset starts over, /quit exits"
IS_CLASSIFIER = "this is a classifier: use `hfstrat predict`"
IS_GENERATOR = "this model generates text: use `hfstrat generate`"
MAX_LENGTH = 1024  # tokens of a text, for a model without a run that defines it


def generate(
    target: str, prompts: list[str], file: Path | None, output: Path | None, how: How, quantization: str = "recorded"
) -> None:
    """Answer prompts: streamed to the terminal, or in batches to a .jsonl with `prompt` and `completion`.

    Raises:
        UserError: no prompts, a file that cannot be read, an output that exists.
    """
    inputs: list[Any] = [*prompts, *(_read_prompts(file) if file else [])]
    if not inputs:
        raise UserError("generate: no prompt; give --prompt TEXT or --file FILE")
    check_output(output)
    check_task(target, (CausalLM.name,), IS_CLASSIFIER)
    model, tokenizer, report = load(target, quantization, spreads=True)
    renderer = generation.renderer_of(tokenizer, report, how.plain)
    if output is None:
        for prompt in inputs:
            if len(inputs) > 1:
                print(f"> {generation.prompt_text(prompt)}", flush=True)
            generation.stream(model, renderer, prompt, how)
        return
    with _writer(output) as write:
        for prompt, text in zip(inputs, generation.in_batches(model, renderer, inputs, how), strict=True):
            write(json.dumps({"prompt": prompt, "completion": text}, ensure_ascii=False))
    print(f"{output}: {len(inputs)} answers")


def chat(target: str, how: How, quantization: str = "recorded") -> None:
    """Read messages until /quit or the end of the input, and stream the answers.

    Raises:
        UserError: a classifier, or a model that was trained on plain text.
    """
    check_task(target, (CausalLM.name,), IS_CLASSIFIER)
    model, tokenizer, report = load(target, quantization, spreads=True)
    renderer = generation.renderer_of(tokenizer, report, plain=False)
    if renderer.continues_text:
        raise UserError(f"{target}: this model continues texts and has no chat format; use `hfstrat generate {target} -p TEXT`")
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print(COMMANDS)
    messages: list[dict[str, Any]] = []
    while (line := _read_message(is_terminal)) is not None:
        if line == "/quit":
            return
        if line == "/reset":
            messages = []
            print("(a new conversation)", flush=True)
        elif line.startswith("/"):
            print(f"({line}: no such command; {COMMANDS})", flush=True)
        elif line:
            messages.append({"role": "user", "content": line})
            messages = _fit_context(model, renderer, messages, how)
            messages.append({"role": "assistant", "content": generation.stream(model, renderer, messages, how)})


def _read_message(is_terminal: bool) -> str | None:
    """The next message, None at the end of the input."""
    try:
        return input("> " if is_terminal else "").strip()
    except EOFError:
        return None


def _fit_context(model: Any, renderer: Any, messages: list[dict[str, Any]], how: How) -> list[dict[str, Any]]:
    """The messages without the oldest ones that exceed the context. Raises UserError if the last one alone exceeds it."""
    removed = 0
    while generation.room(model, len(renderer.prompt_ids(how.prompt(messages))), 1) < 1:
        if len(messages) < 3:
            raise UserError("this message alone exceeds the model's context; shorten it")
        messages, removed = messages[2:], removed + 2
    if removed:
        print(f"(the first {removed} messages no longer fit the model's context and are left out)", flush=True)
    return messages


def predict(target: str, texts: list[str], file: Path | None, output: Path | None, quantization: str = "recorded") -> None:
    """Print labels or numbers for texts, or write a .jsonl with `text` and `labels` with `scores`, or `values`.

    Raises:
        UserError: no texts, a file that cannot be read, an output that exists, or no classifier.
    """
    inputs: list[Any] = [*texts, *(_read_texts(file) if file else [])]
    if not inputs:
        raise UserError("predict: no text; give --text TEXT or --file FILE")
    check_output(output)
    check_task(target, tuple(name for name, task in TASKS.items() if not task.text.generates), IS_GENERATOR)
    model, tokenizer, report = load(target, quantization, spreads=True)
    import torch

    from hfstrat.data.labeled import Texts

    task = task_of(target).text
    assert isinstance(task, HeadText)
    tokenized = Texts(tokenizer, report.run.recipe.data.max_length if report else MAX_LENGTH)
    with _writer(output) as write:
        for row in inputs:
            found = task.outputs(model, tokenized, row, torch.float32)  # as the weights are, without autocast
            if output:
                columns = row if isinstance(row, dict) else {"text": row}
                write(json.dumps({**columns, **task.record(found)}, ensure_ascii=False))
            else:
                text = " ".join(task.prompt(row).split())
                write(f"{task.line(found)}\t{text}" if len(inputs) > 1 else task.line(found))
    if output:
        print(f"{output}: {len(inputs)} rows")


@contextmanager
def _writer(output: Path | None) -> Iterator[Callable[[str], Any]]:
    """A function that writes a line to the file, or prints it."""
    if output is None:
        yield lambda line: print(line, flush=True)
        return
    with output.open("w", encoding="utf-8") as file:
        yield lambda line: file.write(line + "\n")


def _read_file(file: Path) -> list[Any]:
    """The non-empty lines of a .txt as strings, or the rows of any other file as dicts."""
    from hfstrat.data import readers, sources

    path = sources.local_file(str(file), "--file")
    if path is None:
        raise UserError(f"--file: {file}: no such file")
    if readers.file_kind(path) == "text":
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return list(readers.read(path))


def _read_prompts(file: Path) -> list[Any]:
    found: list[Any] = []
    for number, row in enumerate(_read_file(file), 1):
        if isinstance(row, dict) and not ({"prompt", "messages"} & row.keys()):
            raise UserError(f"{file}: row {number} has neither 'prompt' nor 'messages'; it has {', '.join(row)}")
        try:
            found.append(row if isinstance(row, str) else row.get("prompt") or _conversation(row))
        except BadRow as error:
            raise UserError(f"{file}: row {number}: {error}") from None
    return found


def _conversation(row: dict[str, Any]) -> Any:
    """The messages of a row, with its tools and its own arguments of the chat template where it has some."""
    given = {"tools": parse_tools(row), "chat_template_kwargs": parse_template_kwargs(row)}
    more = {name: value for name, value in given.items() if value}
    return {"messages": row["messages"], **more} if more else row["messages"]


def _read_texts(file: Path) -> list[Any]:
    """The texts and pairs of texts of a file; labels are ignored."""
    from hfstrat.data.labeled import PAIRS, TEXTS

    found: list[Any] = []
    for number, row in enumerate(_read_file(file), 1):
        if isinstance(row, str):
            found.append(row)
            continue
        pair = next((pair for pair in PAIRS if set(pair) <= row.keys()), None)
        text = next((name for name in TEXTS if name in row), None)
        if pair is None and text is None:
            raise UserError(
                f"{file}: row {number} has no column such as text, or premise and hypothesis; it has {', '.join(row)}"
            )
        found.append({"text": row[pair[0]], "text_pair": row[pair[1]]} if pair else {"text": row[text]})
    return found

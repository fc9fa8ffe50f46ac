"""Using what was trained: answers to prompts, and an adapter merged into its base."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfstrat.errors import UserError
from hfstrat.tasks.artifact import check_output, check_task, load
from hfstrat.tasks.causal_lm import CausalLM

if TYPE_CHECKING:
    from hfstrat.tasks.generation import How


def generate(
    target: str,
    prompts: list[str],
    file: Path | None,
    output: Path | None,
    max_new_tokens: int,
    how: How | None = None,
    form: str = "recorded",
) -> None:
    """Answer prompts: streamed on the terminal, or in batches into a .jsonl with `prompt` and `completion`.

    Raises:
        UserError: no prompts, a file that cannot be read, an output that exists.
    """
    asked: list[Any] = [*prompts, *(_prompts(file) if file else [])]
    if not asked:
        raise UserError("generate: no prompt; give --prompt TEXT or --file FILE")
    check_output(output)
    check_task(target, (CausalLM.name,), "this is a classifier: `hfstrat predict` says its labels")
    from hfstrat.tasks import generation
    from hfstrat.tasks.generation import prompt_text

    how = how or generation.How(max_new_tokens)
    model, tokenizer, report = load(target, form, spreads=True)
    renderer = generation.renderer_of(tokenizer, report, how.plain)
    if output is None:
        for prompt in asked:
            if len(asked) > 1:
                print(f"> {prompt_text(prompt)}", flush=True)
            generation.stream(model, renderer, prompt, how)
        return
    with lines(output) as say:
        for prompt, text in zip(asked, generation.in_batches(model, renderer, asked, how), strict=True):
            say(json.dumps({"prompt": prompt, "completion": text}, ensure_ascii=False))
    print(f"{output}: {len(asked)} answers")


@contextmanager
def lines(output: Path | None) -> Iterator[Any]:
    if output is None:
        yield lambda line: print(line, flush=True)
        return
    with output.open("w", encoding="utf-8") as file:
        yield lambda line: file.write(line + "\n")


def _prompts(file: Path) -> list[Any]:
    from hfstrat.data import readers, sources

    path = sources.local_file(str(file), "--file")
    if path is None:
        raise UserError(f"--file: {file}: no such file")
    if readers.file_kind(path) == "text":
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    rows = list(readers.read(path))
    for number, row in enumerate(rows, 1):
        if not ({"prompt", "messages"} & row.keys()):
            raise UserError(f"{file}: row {number} has neither 'prompt' nor 'messages'; it has {', '.join(row)}")
    return [row.get("prompt") or row["messages"] for row in rows]

"""Using what was trained: answers to prompts, and an adapter merged into its base."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfstrat import forms
from hfstrat.errors import UserError
from hfstrat.outcome import quiet_libraries
from hfstrat.tasks import CausalLM, Task, of_artefact

if TYPE_CHECKING:
    from hfstrat.answers import How

PROBE_TEXT = "Once upon a time a model learnt from text. def add(a, b):\n    return a + b\nThe capital of France is"


def resolve(target: str) -> tuple[str, dict[str, Any]]:
    """The folder or Hub id to load, and the run's report where `target` is a run.

    Raises:
        UserError: a run without a result, or a path where there is nothing.
    """
    folder = Path(target).expanduser()
    if (folder / "final").is_dir():
        return str(folder / "final"), _report(folder)
    if (folder / "recipe.yaml").is_file() and not (folder / "config.json").is_file():
        raise UserError(f"{target}: this run has no result yet; `hfstrat train` with its recipe goes on")
    if folder.is_dir() and not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise UserError(f"{target}: this folder holds no model and no adapter (no config.json, no adapter_config.json)")
    if not folder.exists() and (target.startswith((".", "/", "~")) or target.count("/") != 1):
        raise UserError(f"{target}: no such folder; expected a run's folder, a model folder or a Hub id")
    return target, _report(folder.parent) if folder.name == "final" else {}


def _report(run: Path) -> dict[str, Any]:
    file = run / "report.json"
    report: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return report


def load(
    target: str, form: str = "recorded", dtype: str | None = None, spreads: bool = False, widened: bool = False
) -> tuple[Any, Any, dict[str, Any]]:
    """Model, tokenizer and the report behind them, for inference on this machine's device.

    Args:
        form: recorded, as it was trained: on a quantized base, if it was; none, without quantization; int8, nf4 or fp4.
        dtype: as `model.dtype`, or checkpoint for that of the stored weights; None: as the run's recipe says, or auto.
        spreads, widened: as for `placing.placed`.

    Raises:
        UserError: it cannot be loaded (so).
        RunError: a GPU has no room for it.
    """
    folder, report = resolve(target)
    forms.check(form, folder, report.get("result", {}).get("reload", {}).get("quantization"))
    quiet_libraries()
    import torch
    from transformers import AutoTokenizer

    from hfstrat import placing
    from hfstrat.config import Model
    from hfstrat.model import compute_dtype, source_of

    recipe = report["run"]["recipe"] if report else {}
    task = of_artefact(folder, recipe)
    wanted = dtype or recipe.get("model", {}).get("dtype", "auto")
    source, options = source_of(Model(**recipe["model"])) if recipe else (folder, {})
    options |= report.get("result", {}).get("reload", {})
    try:
        given = {"source": source, "task": task.name, **options}
        weights: Any = "auto" if dtype == "checkpoint" else compute_dtype(wanted)
        model = placing.placed(forms.load(folder, weights, given, form), spreads, widened)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except UserError:
        raise
    except torch.OutOfMemoryError as error:
        raise placing.no_room(target) from error
    except Exception as error:
        here = "" if Path(folder).exists() else "no such folder here, and "
        raise UserError(
            f"{target}: {here}it cannot be loaded: {(str(error) or type(error).__name__).splitlines()[0]}"
        ) from error
    return model.eval(), tokenizer, report


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
    check_task(target, CausalLM(), "this is a classifier: `hfstrat predict` says its labels")
    from hfstrat import answers
    from hfstrat.evaluate import prompt_text

    how = how or answers.How(max_new_tokens)
    model, tokenizer, report = load(target, form, spreads=True)
    renderer = answers.renderer_of(tokenizer, report, how.plain)
    if output is None:
        for prompt in asked:
            if len(asked) > 1:
                print(f"> {prompt_text(prompt)}", flush=True)
            answers.stream(model, renderer, prompt, how)
        return
    with lines(output) as say:
        for prompt, text in zip(asked, answers.in_batches(model, renderer, asked, how), strict=True):
            say(json.dumps({"prompt": prompt, "completion": text}, ensure_ascii=False))
    print(f"{output}: {len(asked)} answers")


def check_output(output: Path | None) -> None:
    """Raises UserError for a file that is there already, or that has no folder to be in."""
    if output and output.exists():
        raise UserError(f"{output} exists already; name another file")
    if output and not output.absolute().parent.is_dir():
        raise UserError(f"{output}: there is no folder {output.parent}; make it, or name another file")


def check_task(target: str, wanted: Task, instead: str) -> None:
    """Raises UserError where a saved model is for another task."""
    folder, report = resolve(target)
    if of_artefact(folder, report["run"]["recipe"] if report else {}).name != wanted.name:
        raise UserError(f"{target}: {instead}")


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
    if readers.kind_of(path) == "text":
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    rows = list(readers.read(path))
    for number, row in enumerate(rows, 1):
        if not ({"prompt", "messages"} & row.keys()):
            raise UserError(f"{file}: row {number} has neither 'prompt' nor 'messages'; it has {', '.join(row)}")
    return [row.get("prompt") or row["messages"] for row in rows]


def merge(target: str, output: Path) -> None:
    """Merge an adapter into its 16-bit base and write an ordinary model folder."""
    from hfstrat import merging

    merging.merge(target, output)

"""Using what was trained: answers to prompts, and an adapter merged into its base."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hfstrat.errors import UserError
from hfstrat.outcome import quiet_libraries
from hfstrat.tasks import CausalLM, Task, of_artefact

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


def load(target: str, dtype: str | None = None) -> tuple[Any, Any, dict[str, Any]]:
    """Model, tokenizer and the report behind them, for inference on this machine's device.

    Args:
        dtype: as `model.dtype`; None: as the run's recipe says, or auto.
    """
    quiet_libraries()
    import torch
    from transformers import AutoTokenizer

    from hfstrat.config import Model
    from hfstrat.model import compute_dtype, source_of
    from hfstrat.verify import load_artefact

    folder, report = resolve(target)
    recipe = report["run"]["recipe"] if report else {}
    task = of_artefact(folder, recipe)
    wanted = dtype or recipe.get("model", {}).get("dtype", "auto")
    source, options = source_of(Model(**recipe["model"])) if recipe else (folder, {})
    options |= report.get("result", {}).get("reload", {})
    try:
        model = load_artefact(folder, compute_dtype(wanted), {"source": source, "task": task.name, **options})
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        here = "" if Path(folder).exists() else "no such folder here, and "
        raise UserError(
            f"{target}: {here}it cannot be loaded: {(str(error) or type(error).__name__).splitlines()[0]}"
        ) from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer, report


def generate(target: str, prompts: list[str], file: Path | None, output: Path | None, max_new_tokens: int) -> None:
    """Answer prompts on the terminal, or into a .jsonl with `prompt` and `completion`.

    Raises:
        UserError: no prompts, a file that cannot be read, an output that exists.
    """
    asked: list[Any] = [*prompts, *(_prompts(file) if file else [])]
    if not asked:
        raise UserError("generate: no prompt; give --prompt TEXT or --file FILE")
    check_output(output)
    check_task(target, CausalLM(), "this is a classifier: `hfstrat predict` says its labels")
    model, tokenizer, report = load(target)
    import torch

    from hfstrat.data.render import Renderer
    from hfstrat.data.templates import NAMES
    from hfstrat.evaluate import answer, prompt_text

    run = report.get("run", {})
    template = run.get("recipe", {}).get("data", {}).get("template", "auto")
    renderer = Renderer(tokenizer, template if template in NAMES else "chat")  # a file's template is the tokenizer's own now
    renderer.continues = run.get("data", {}).get("train", {}).get("format") == "text"
    with lines(output) as say:
        for prompt in asked:
            text = answer(model, renderer, prompt, max_new_tokens, torch.float32)  # as the weights are, without autocast
            if output:
                say(json.dumps({"prompt": prompt, "completion": text}, ensure_ascii=False))
            else:
                say(f"> {prompt_text(prompt)}\n{text}\n" if len(asked) > 1 else text)
    if output:
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
    """Merge an adapter into its 16-bit base and write an ordinary model folder.

    The sum is made in float32 and rounded once. Prints the mean KL divergence (nats a token) of the merged model
    from base with adapter, on the run's own prompts and answers, and how often both choose the same token.

    Raises:
        UserError: no adapter, or an output folder in use.
    """
    folder, report = resolve(target)
    if Path(folder).is_dir() and not (Path(folder) / "adapter_config.json").is_file():
        raise UserError(f"{target}: there is no adapter to merge: this is a whole model already")
    if output.exists() and (output.is_file() or any(output.iterdir())):
        raise UserError(f"{output} is in use; name a new folder")
    model, tokenizer, _ = load(target)
    import torch

    if not hasattr(model, "merge_and_unload"):
        raise UserError(f"{target}: there is no adapter to merge: this is a whole model already")
    ids = _probe(Path(target), tokenizer, model.device)
    with torch.no_grad():
        before = model(input_ids=ids).logits.float().log_softmax(-1)
        dtype = model.get_base_model().dtype
        merged = model.float().merge_and_unload(safe_merge=True)
        dtype = dtype if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
        merged = merged.to(dtype)
        after = merged(input_ids=ids).logits.float().log_softmax(-1)
    divergence = (before.exp() * (before - after)).sum(-1).mean().item()
    agreement = (before.argmax(-1) == after.argmax(-1)).float().mean().item()
    merged.save_pretrained(output)
    tokenizer.save_pretrained(output)
    print(f"{output}: merged in {str(dtype).removeprefix('torch.')}")
    unit = of_artefact(folder, report["run"]["recipe"] if report else {}).unit
    count = before.shape[:-1].numel()
    print(f"KL(adapter || merged) = {divergence:.2e} nats a {unit}; the same first choice for {agreement:.2%} of {count}")


def _probe(run: Path, tokenizer: Any, device: Any) -> Any:
    import torch

    file = run / "report.json"
    answers = json.loads(file.read_text())["result"].get("answers", []) if file.is_file() else []
    text = "\n\n".join([*(f"{a['prompt']}\n\n{a['after']}" for a in answers), PROBE_TEXT])
    limit = min(512, tokenizer.model_max_length)
    return torch.tensor([tokenizer(text, truncation=True, max_length=limit)["input_ids"]], device=device)

"""`hfstrat merge`: merges an adapter into its 16-bit base, also if it was trained on a quantized one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hfstrat.errors import UserError
from hfstrat.models.load import read_json
from hfstrat.recipe import format
from hfstrat.tasks import TASKS, artifact
from hfstrat.tasks.report import Report, Result

ROWS, TOKENS = 16, 64  # held-out examples that are compared, and tokens of each: all their logits are in memory
PROMPTS = (
    artifact.PROBE_TEXT,
    "Write a short poem about the sea.",
    "Explain in two sentences why the sky is blue.",
    "def fibonacci(n):\n    ",
    "Translate to French: The weather is nice today.",
    "A train leaves at 9:40 and arrives at 12:05. How long does it take?",
)


def merge(target: str, output: Path) -> None:
    """Merge an adapter into the base that it was trained on, loaded in 16 bits, and write a complete model folder.

    The sum is computed in float32 and rounded once. Prints the mean KL divergence (nats per token) of the merged model from
    the trained one (the base, quantized if it was, with the adapter) on held-out examples of the run or on built-in prompts,
    and how often both predict the same token.

    Raises:
        UserError: no adapter, an output folder in use, or a base that is not that of the training.
    """
    folder, report = artifact.resolve(target)
    if Path(folder).is_dir() and not (Path(folder) / "adapter_config.json").is_file():
        raise UserError(f"{target}: no adapter to merge: this is a complete model already")
    if output.exists() and (output.is_file() or any(output.iterdir())):
        raise UserError(f"{output} is in use; name a new folder")
    check_base(folder, report)
    quantization = report.run.recipe.model.quantization if report and "quantization" in report.reload else None
    model, tokenizer, _ = artifact.load(target, widened=True)
    import torch

    if not hasattr(model, "merge_and_unload"):
        raise UserError(f"{target}: no adapter to merge: this is a complete model already")
    inputs, which = inputs_of(report, tokenizer)
    before = log_probabilities(model, inputs)
    if quantization:
        del model  # so that only one model is in memory
        model, _, _ = artifact.load(target, "none", widened=True)
    dtype = model.get_base_model().dtype
    dtype = dtype if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
    merged = model.float().merge_and_unload(safe_merge=True).to(dtype)
    after = log_probabilities(merged, inputs)
    merged.save_pretrained(output)
    tokenizer.save_pretrained(output)
    unquantized = ", into the unquantized base" if quantization else ""
    print(f"{output}: merged in {str(dtype).removeprefix('torch.')}{unquantized}")
    unit = artifact.task_of(target).text.unit
    divergence = sum((one.exp() * (one - two)).sum().item() for one, two in zip(before, after, strict=True))
    same = sum((one.argmax(-1) == two.argmax(-1)).sum().item() for one, two in zip(before, after, strict=True))
    count = sum(one.shape[:-1].numel() for one in before)
    name = f"{quantization.name} with adapter" if quantization else "adapter"
    print(
        f"KL({name} || merged) = {divergence / count:.2e} nats per {unit}; "
        f"the same top prediction for {format.percent(same / count, 2)} of {count} ({which})"
    )


def check_base(folder: str, report: Report | None) -> None:
    """Refuse a local base whose weights have changed since training (a base on the Hub is named with its commit)."""
    from hfstrat.models.fingerprint import model_fingerprint

    before = report.environment.model_sha256 if report else None
    if report is None or not before or not Path(report.run.recipe.model.name_or_path).expanduser().is_dir():
        return
    named = read_json(Path(folder) / "adapter_config.json").get("base_model_name_or_path")
    if named and Path(named).is_dir() and model_fingerprint(named) != before:
        raise UserError(f"{folder}: the weights of its base {named} have changed since training; restore them")


def inputs_of(report: Report | None, tokenizer: Any) -> tuple[list[dict[str, Any]], str]:
    """The inputs on which base and merged model are compared, and their description."""
    import torch

    rows = held_out(report, tokenizer)
    names = ("input_ids", "token_type_ids")
    found = [{name: torch.tensor([row[name][:TOKENS]]) for name in names if row.get(name)} for row in rows]
    if found:
        return found, f"{len(found)} held-out examples"
    answers = report.result.answers if report and isinstance(report.result, Result) else []
    texts = [*(f"{answer.prompt}\n\n{answer.after}" for answer in answers), *PROMPTS]
    return [{"input_ids": torch.tensor([tokenizer(text)["input_ids"][:TOKENS]])} for text in texts], f"{len(texts)} prompts"


def held_out(report: Report | None, tokenizer: Any) -> list[dict[str, Any]]:
    """Evaluation examples of the run, if its data are available; else an empty list."""
    if report is None:
        return []
    recipe = report.run.recipe
    try:
        data = TASKS[recipe.task].rows.prepare(recipe.data, tokenizer, recipe.seed, 0, recipe.evaluation.max_rows, None)
    except Exception:  # the data were moved, or are on another machine
        return []
    return [data.eval[index] for index in range(min(ROWS, len(data.eval)))]


def log_probabilities(model: Any, inputs: list[dict[str, Any]]) -> list[Any]:
    """Log-probabilities of each input, `[1, T, V]` or `[1, K]`, float32 on the CPU."""
    import torch

    model.eval()
    with torch.no_grad():
        moved = ({name: tensor.to(model.device) for name, tensor in one.items()} for one in inputs)
        return [model(**one).logits.float().log_softmax(-1).cpu() for one in moved]

"""`hfstrat merge`: an adapter goes into its base in 16 bits, also where it was trained on a quantized one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hfstrat.errors import UserError
from hfstrat.models.load import read_json
from hfstrat.tasks import TASKS, artifact
from hfstrat.tasks.report import Report, Result

ROWS, TOKENS = 16, 64  # held-out rows that are compared, and tokens of each: their logits are held


PROMPTS = (
    artifact.PROBE_TEXT,
    "Write a short poem about the sea.",
    "Explain in two sentences why the sky is blue.",
    "def fibonacci(n):\n    ",
    "Translate to French: The weather is nice today.",
    "A train leaves at 9:40 and arrives at 12:05. How long does it take?",
)


def merge(target: str, output: Path) -> None:
    """Merge an adapter into the base that it was trained on, read anew in 16 bits, and write an ordinary model folder.

    The sum is made in float32 and rounded once. Prints the mean KL divergence (nats a token) of the merged model from what
    was trained, base (quantized, if it was) with adapter, on held-out rows of the run or on built-in prompts, and how often
    both choose the same token.

    Raises:
        UserError: no adapter, an output folder in use, or another base than that of the training.
    """
    folder, report = artifact.resolve(target)
    if Path(folder).is_dir() and not (Path(folder) / "adapter_config.json").is_file():
        raise UserError(f"{target}: there is no adapter to merge: this is a whole model already")
    if output.exists() and (output.is_file() or any(output.iterdir())):
        raise UserError(f"{output} is in use; name a new folder")
    check_base(folder, report)
    quantization = report.run.recipe.model.quantization if report and "quantization" in report.reload else None
    model, tokenizer, _ = artifact.load(target, widened=True)
    import torch

    if not hasattr(model, "merge_and_unload"):
        raise UserError(f"{target}: there is no adapter to merge: this is a whole model already")
    inputs, which = inputs_of(report, tokenizer)
    before = said(model, inputs)
    if quantization:
        del model  # the two need not be in memory together
        model, _, _ = artifact.load(target, "none", widened=True)
    dtype = model.get_base_model().dtype
    dtype = dtype if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
    merged = model.float().merge_and_unload(safe_merge=True).to(dtype)
    after = said(merged, inputs)
    merged.save_pretrained(output)
    tokenizer.save_pretrained(output)
    unquantized = ", into the base that is not quantized" if quantization else ""
    print(f"{output}: merged in {str(dtype).removeprefix('torch.')}{unquantized}")
    unit = artifact.task_of(target).text.unit
    divergence = sum((one.exp() * (one - two)).sum().item() for one, two in zip(before, after, strict=True))
    same = sum((one.argmax(-1) == two.argmax(-1)).sum().item() for one, two in zip(before, after, strict=True))
    count = sum(one.shape[:-1].numel() for one in before)
    name = f"{quantization.name} with adapter" if quantization else "adapter"
    print(
        f"KL({name} || merged) = {divergence / count:.2e} nats a {unit}; "
        f"the same first choice for {same / count:.2%} of {count} ({which})"
    )


def check_base(folder: str, report: Report | None) -> None:
    """Refuse a local base that is not the one of the training any more (one on the Hub is named with its commit)."""
    from hfstrat.models.fingerprint import model_fingerprint

    before = report.environment.model_sha256 if report else None
    if report is None or not before or not Path(report.run.recipe.model.name_or_path).expanduser().is_dir():
        return
    named = read_json(Path(folder) / "adapter_config.json").get("base_model_name_or_path")
    if named and Path(named).is_dir() and model_fingerprint(named) != before:
        raise UserError(f"{folder}: its base {named} is not what it was in training (its weights changed); bring that back")


def inputs_of(report: Report | None, tokenizer: Any) -> tuple[list[dict[str, Any]], str]:
    """What base and merged model are compared on, and what that is in words."""
    import torch

    rows = held_out(report, tokenizer)
    names = ("input_ids", "token_type_ids")
    found = [{name: torch.tensor([row[name][:TOKENS]]) for name in names if row.get(name)} for row in rows]
    if found:
        return found, f"{len(found)} held-out rows"
    answers = report.result.answers if report and isinstance(report.result, Result) else []
    texts = [*(f"{answer.prompt}\n\n{answer.after}" for answer in answers), *PROMPTS]
    return [{"input_ids": torch.tensor([tokenizer(text)["input_ids"][:TOKENS]])} for text in texts], f"{len(texts)} prompts"


def held_out(report: Report | None, tokenizer: Any) -> list[dict[str, Any]]:
    """Evaluation rows of the run, where its data are still at hand."""
    if report is None:
        return []
    recipe = report.run.recipe
    try:
        data = TASKS[recipe.task].rows.prepare(recipe.data, tokenizer, recipe.seed, 0, recipe.evaluation.max_rows, None)
    except Exception:  # the data moved, or were another machine's
        return []
    return [data.eval[index] for index in range(min(ROWS, len(data.eval)))]


def said(model: Any, inputs: list[dict[str, Any]]) -> list[Any]:
    """Log-probabilities of each input, `[1, T, V]` or `[1, K]`, float32 on the CPU."""
    import torch

    model.eval()
    with torch.no_grad():
        asked = ({name: tensor.to(model.device) for name, tensor in one.items()} for one in inputs)
        return [model(**one).logits.float().log_softmax(-1).cpu() for one in asked]


def merge_run(target: str, output: Path) -> None:
    """Merge an adapter into its 16-bit base and write an ordinary model folder."""

    merge(target, output)

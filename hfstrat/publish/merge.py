"""`hfstrat merge`: an adapter becomes part of its base, and the merged model is held to the outputs of base and adapter.

Three comparisons, on the same inputs. In float32, where there is no rounding to hide behind, the merged model has the outputs
of the base with its adapter, and is far from the base alone. In the precision that is written, rounding changes them by no
more than it does in any model. And the written folder, loaded again, has the outputs of the model in memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hfstrat.errors import ARTIFACT, RunError, UserError, first_line
from hfstrat.models.load import read_json
from hfstrat.objectives import task_of
from hfstrat.publish.written import check_unused, complete
from hfstrat.recipe.format import plural
from hfstrat.tasks import artifact
from hfstrat.tasks.artifact import PROBE_TEXT
from hfstrat.tasks.report import Report, Result
from hfstrat.tasks.verify import TOLERANCE, tolerance

COMPLETE = "no adapter to merge: this is a complete model already"
STORED = "checkpoint"  # the precision of the stored base
DTYPES = (STORED, "bfloat16", "float16", "float32")
ROWS, TOKENS = 16, 64  # held-out examples that are compared, and tokens of each: all their logits are in memory
FLOOR = 1e-5  # share of the largest output that sums in another order may change in float32, also without any training
ROUNDING = 0.2  # share of the mean output that rounding all weights may change on average
PROMPTS = (
    PROBE_TEXT,
    "Write a short poem about the sea.",
    "Explain in two sentences why the sky is blue.",
    "def fibonacci(n):\n    ",
    "Translate to French: The weather is nice today.",
    "A train leaves at 9:40 and arrives at 12:05. How long does it take?",
)


def merge(target: str, output: Path, dtype: str = STORED) -> None:
    """Merge an adapter into the base that it was trained on, and write a complete model folder.

    The sum is computed in float32 and rounded once. Prints the mean KL divergence (nats per token) of the merged model from
    the trained one (the base, quantized if it was, with the adapter) on held-out examples of the run or on built-in prompts,
    and how often both predict the same token.

    Args:
        dtype: of the written weights: bfloat16, float16, float32, or checkpoint for that of the stored base (16 bits for one
            that was quantized in training or is a .gguf file; numbers are not rounded below the precision of the training).

    Raises:
        UserError: no adapter, an output folder in use, a base that is not that of the training, or no such dtype.
        RunError: the merged model differs from base and adapter by more than rounding; nothing is written then.
    """
    folder, report = artifact.resolve(target)
    if dtype not in DTYPES:
        raise UserError(f"--dtype: {dtype}: expected one of {', '.join(DTYPES)}")
    if Path(folder).is_dir() and not is_adapter(folder):
        raise UserError(f"{target}: {COMPLETE}")
    check_unused(output)
    check_base(folder, report)
    quantization = report.run.recipe.model.quantization if report and "quantization" in report.reload else None
    model, tokenizer, _ = artifact.load(target, widened=True)
    check_mergeable(model, target)
    inputs, which = inputs_of(report, tokenizer)
    before = outputs_of(model, inputs)
    stored = STORED if _has_stored_dtype(model, report, target) else None
    if quantization or stored:
        del model  # so that only one model is in memory
        model, _, _ = artifact.load(target, "none", stored, widened=True)
    written = _written_in(model, dtype, stored is None and artifact.task_of(target).metrics.of_distributions)
    merged, after = merged_in(model, written, inputs, target)
    with complete(output) as partial:
        save(merged, tokenizer, partial)
        del model, merged
        check_reloaded(partial, after, inputs, reload_options(target, report), written)
    name = str(written).removeprefix("torch.")
    print(f"{output}: merged in {name}{', into the unquantized base' if quantization else ''}")
    trained = f"{quantization.name} with adapter" if quantization else "adapter"
    print(f"{artifact.task_of(target).text.agreement(trained, before, after)} ({which})")
    if report and (options := report.run.recipe.data.chat_template_kwargs):
        given = ", ".join(f"{name}={value!r}" for name, value in options.items())
        print(f"trained with data.chat_template_kwargs: pass them to apply_chat_template: {given}")


def _has_stored_dtype(model: Any, report: Report | None, target: str) -> bool:
    """Whether the merged model has the precision of the stored base; numbers keep that of the training, which may be higher."""
    section = report.run.recipe.model if report else None
    is_quantized = bool(getattr(model.get_base_model().config, "quantization_config", None))
    is_gguf = section is not None and section.gguf_file
    return artifact.task_of(target).metrics.of_distributions and not is_quantized and not is_gguf


def _written_in(model: Any, wanted: str, in_16_bits: bool) -> Any:
    """The torch.dtype of the merged model: the wanted one, or that of the loaded base, or 16 bits, see `merge`."""
    import torch

    if wanted != STORED:
        return getattr(torch, wanted)
    dtype = model.get_base_model().dtype
    return torch.bfloat16 if in_16_bits and dtype not in (torch.bfloat16, torch.float16) else dtype


def merged_in(model: Any, dtype: Any, inputs: list[dict[str, Any]], target: str) -> tuple[Any, list[Any]]:
    """The model with its adapter merged, in `dtype`, and its outputs for the inputs. `model` is changed.

    Raises:
        RunError: merging or rounding changes the outputs by more than it may.
    """
    from hfstrat.models.load import cast_weights

    model = model.float()
    adapted = outputs_of(model, inputs)
    with model.disable_adapter():
        base = outputs_of(model, inputs)
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except (NotImplementedError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{target}: PEFT does not merge this {type_of(model)} adapter: {first_line(error)}") from error
    exact = outputs_of(merged, inputs)
    largest, moved = max(float(one.abs().max()) for one in adapted), difference(adapted, base)
    allowed = max(FLOOR * largest, min(tolerance("float32", True) * largest, moved / 4))
    what = f"{target}: merged in float32, the outputs differ from those with the adapter (which changes them by {moved:.3g})"
    refuse_beyond(difference(adapted, exact), allowed, what)
    cast_weights(merged, dtype)
    rounded = outputs_of(merged, inputs)
    name = str(dtype).removeprefix("torch.")
    if name != "float32":
        check_rounding(exact, rounded, f"{target}: rounding the merged weights to {name}")
        if (off := difference(exact, rounded)) > moved:
            print(f"warning: rounding to {name} changes the outputs by up to {off:.2g}, the adapter by up to {moved:.2g}")
    return merged, rounded


def type_of(model: Any) -> str:
    """PEFT's name of the adapter's type, such as LORA."""
    return str(getattr(model.active_peft_config.peft_type, "value", model.active_peft_config.peft_type))


def check_mergeable(model: Any, target: str) -> None:
    """Refuse an adapter that PEFT has no merge for, such as virtual tokens. Raises UserError."""
    if not hasattr(model, "peft_config"):
        raise UserError(f"{target}: {COMPLETE}")
    if not hasattr(model, "merge_and_unload"):
        raise UserError(
            f"{target}: PEFT does not merge a {type_of(model)} adapter: it is not an update of weights; load it with PEFT, as "
            "the model card shows"
        )


def reload_options(target: str, report: Report | None) -> dict[str, Any]:
    """The keywords of `artifact.load_artifact` for a complete model that was made from this result."""
    section = report.run.recipe.model if report else None
    options: dict[str, Any] = {"task": artifact.task_of(target).name}
    if section and section.trust_remote_code:
        options["trust_remote_code"] = True
    if section and section.attn_implementation != "auto":
        options["attn_implementation"] = section.attn_implementation
    return options


def check_reloaded(
    folder: Path, expected: list[Any], inputs: list[dict[str, Any]], options: dict[str, Any], dtype: Any
) -> None:
    """Compare a written folder, loaded again, with the outputs of the model in memory. Raises RunError."""
    import torch

    name = str(dtype).removeprefix("torch.")
    try:
        again = outputs_of(artifact.placed(artifact.load_artifact(str(folder), dtype, options)), inputs)
    except RuntimeError as error:  # DeBERTa's attention mixes types in 16 bits
        if dtype == torch.float32:
            raise
        print(
            f"warning: in {name} its forward pass fails in the installed transformers ({first_line(error)}); load it in float32"
        )
        again = outputs_of(artifact.placed(artifact.load_artifact(str(folder), torch.float32, options)), inputs)
    allowed = TOLERANCE[name] * max(float(one.abs().max()) for one in expected)
    refuse_beyond(difference(expected, again), allowed, f"{folder.name}: loaded again, its outputs differ from the model's")


def difference(one: list[Any], other: list[Any]) -> float:
    """The largest absolute difference of two lists of outputs; infinite where they have other shapes, NaN where one has NaN."""
    if any(a.shape != b.shape for a, b in zip(one, other, strict=True)):
        return float("inf")
    return max((float((a - b).abs().max()) for a, b in zip(one, other, strict=True)), key=lambda x: (x != x, x))


def check_rounding(exact: list[Any], rounded: list[Any], what: str) -> None:
    """Refuse outputs that rounding the weights changed more than it changes those of any model. Raises RunError.

    On average: a router of a mixture of experts that is near a tie sends single tokens elsewhere. Overflow gives NaN.
    """
    sizes = sum(one.numel() for one in exact)
    off = sum(float((a - b).abs().sum()) for a, b in zip(exact, rounded, strict=True)) / sizes
    size = sum(float(one.abs().sum()) for one in exact) / sizes
    refuse_beyond(off, ROUNDING * size, f"{what} changes the outputs, on average")


def refuse_beyond(found: float, allowed: float, what: str) -> None:
    """Raises RunError if a difference is larger than allowed, or not a number."""
    if not found <= allowed:
        raise RunError(f"{what} by {found:.3g}, expected at most {allowed:.3g}; nothing was written", ARTIFACT)


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

    found = held_out(report, tokenizer)
    if found:
        return found, f"{len(found)} held-out examples"
    answers = report.result.answers if report and isinstance(report.result, Result) else []
    texts = [*(f"{answer.prompt}\n\n{answer.after}" for answer in answers), *PROMPTS]
    return [{"input_ids": torch.tensor([tokenizer(text)["input_ids"][:TOKENS]])} for text in texts], plural(
        len(texts), "prompt"
    )


def held_out(report: Report | None, tokenizer: Any) -> list[dict[str, Any]]:
    """The inputs of evaluation examples of the run, if its data are available; else an empty list."""
    if report is None:
        return []
    recipe = report.run.recipe
    try:
        rows = task_of(recipe).rows
        data = rows.prepare(recipe.data, tokenizer, recipe.seed, 0, recipe.evaluation.max_rows, None)
        return [rows.inputs_of(data, data.eval[index], TOKENS) for index in range(min(ROWS, len(data.eval)))]
    except Exception:  # the data were moved, or are on another machine
        return []


def outputs_of(model: Any, inputs: list[dict[str, Any]]) -> list[Any]:
    """The outputs of each input, `[1, T, V]` or `[1, K]`, float32 on the CPU."""
    import torch

    model.eval()
    with torch.no_grad():
        dtype = next(model.parameters()).dtype  # of pixels
        moved = (
            {name: t.to(model.device, dtype if t.is_floating_point() else None) for name, t in one.items()} for one in inputs
        )
        return [model(**one).logits.float().cpu() for one in moved]


def is_adapter(folder: str) -> bool:
    return (Path(folder) / "adapter_config.json").is_file()


def save(model: Any, tokenizer: Any, output: Path) -> None:
    """Write a complete model folder."""
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)

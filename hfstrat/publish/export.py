"""A result in another form: `hfstrat merge` merges an adapter into its base, `hfstrat export` writes files for other programs.

safetensors: the form that transformers or sentence-transformers load (an adapter is merged). gguf: for llama.cpp and Ollama,
written with the `gguf` package, for Llama models with a byte-level BPE; other models are refused, since llama.cpp's own
converter supports more. onnx: by transformers' exporter (optimum's does not work with transformers 5). Each file is loaded
again and compared.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hfstrat.errors import RunError, UserError, first_line
from hfstrat.models.load import read_json
from hfstrat.tasks import TASKS, artifact, sentence_transformers
from hfstrat.tasks.artifact import PROBE_TEXT
from hfstrat.tasks.report import Report, Result

NEEDS = {"safetensors": [], "gguf": ["gguf"], "onnx": ["onnx", "onnxscript", "onnxruntime"]}  # packages
ALLOWED = {"gguf": 3e-2, "onnx": 1e-3}  # difference relative to the largest logit: matrices of a GGUF file are in 16 bits
ROWS, TOKENS = 16, 64  # held-out examples that are compared, and tokens of each: all their logits are in memory
PROMPTS = (
    PROBE_TEXT,
    "Write a short poem about the sea.",
    "Explain in two sentences why the sky is blue.",
    "def fibonacci(n):\n    ",
    "Translate to French: The weather is nice today.",
    "A train leaves at 9:40 and arrives at 12:05. How long does it take?",
)
INSTEAD = "llama.cpp's convert_hf_to_gguf.py supports more models (run it on a merged folder)"
LAYER = {  # modules of a block: transformers' name, GGUF's name
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def merge(target: str, output: Path) -> None:
    """Merge an adapter into the base that it was trained on, loaded in 16 bits, and write a complete model folder.

    The sum is computed in float32 and rounded once. Prints the mean KL divergence (nats per token) of the merged model from
    the trained one (the base, quantized if it was, with the adapter) on held-out examples of the run or on built-in prompts,
    and how often both predict the same token.

    Raises:
        UserError: no adapter, an output folder in use, or a base that is not that of the training.
    """
    import torch

    folder, report = artifact.resolve(target)
    complete = UserError(f"{target}: no adapter to merge: this is a complete model already")
    if Path(folder).is_dir() and not _is_adapter(folder):
        raise complete
    _check_unused(output)
    check_base(folder, report)
    quantization = report.run.recipe.model.quantization if report and "quantization" in report.reload else None
    model, tokenizer, _ = artifact.load(target, widened=True)
    if not hasattr(model, "merge_and_unload"):
        raise complete
    inputs, which = inputs_of(report, tokenizer)
    before = outputs_of(model, inputs)
    if quantization:
        del model  # so that only one model is in memory
        model, _, _ = artifact.load(target, "none", widened=True)
    task, dtype = artifact.task_of(target), model.get_base_model().dtype
    if task.metrics.of_distributions and dtype not in (torch.bfloat16, torch.float16):
        dtype = torch.bfloat16  # numbers would be rounded
    merged = _merged(model, dtype)
    after = outputs_of(merged, inputs)
    _save(merged, tokenizer, output)
    print(f"{output}: merged in {_dtype(merged)}{', into the unquantized base' if quantization else ''}")
    trained = f"{quantization.name} with adapter" if quantization else "adapter"
    print(f"{task.text.agreement(trained, before, after)} ({which})")


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


def outputs_of(model: Any, inputs: list[dict[str, Any]]) -> list[Any]:
    """The outputs of each input, `[1, T, V]` or `[1, K]`, float32 on the CPU."""
    import torch

    model.eval()
    with torch.no_grad():
        moved = ({name: tensor.to(model.device) for name, tensor in one.items()} for one in inputs)
        return [model(**one).logits.float().cpu() for one in moved]


def export(target: str, output: Path, form: str) -> None:
    """Write a run's result (or a model) into a new folder, or as a .gguf file.

    Raises:
        UserError: an unknown format, a missing package, a model that the format does not support.
        RunError: the logits of the written model differ.
    """
    if form not in NEEDS:
        raise UserError(f"--format: {form}; expected one of {', '.join(NEEDS)}")
    if missing := [name for name in NEEDS[form] if importlib.util.find_spec(name) is None]:
        raise UserError(f"--format {form}: needs {', '.join(missing)}: pip install {' '.join(missing)}")
    if form == "gguf" and output.suffix != ".gguf":
        raise UserError(f"{output}: expected a file name that ends in .gguf")
    _check_unused(output)
    folder, _ = artifact.resolve(target)
    if form == "safetensors" and _is_adapter(folder):
        return merge(target, output)
    if form == "safetensors" and sentence_transformers.is_one(folder):
        shutil.copytree(folder, output, dirs_exist_ok=True)  # as it was verified: saved again, it would lose its labels
        return print(f"{output}: loads with sentence-transformers")
    # in the stored dtype: that of this machine might round
    model, tokenizer, _ = artifact.load(target, "none", "checkpoint", widened=True)
    if hasattr(model, "merge_and_unload"):
        model = _merged(model, model.get_base_model().dtype)
    writers: dict[str, Callable[[Any, Any, Path], None]] = {"safetensors": _safetensors, "gguf": _gguf, "onnx": _onnx}
    return writers[form](model, tokenizer, output)


def _is_adapter(folder: str) -> bool:
    return (Path(folder) / "adapter_config.json").is_file()


def _check_unused(output: Path) -> None:
    if output.exists() and (output.is_file() or any(output.iterdir())):
        raise UserError(f"{output} is in use; name a new one")


def _merged(model: Any, dtype: Any) -> Any:
    return model.float().merge_and_unload(safe_merge=True).to(dtype)


def _save(model: Any, tokenizer: Any, output: Path) -> None:
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def _dtype(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")


def _safetensors(model: Any, tokenizer: Any, output: Path) -> None:
    _save(model, tokenizer, output)
    print(f"{output}: {_dtype(model)}, loads with transformers")


def _gguf(model: Any, tokenizer: Any, output: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    write_gguf(model, tokenizer, output)
    where = {"pretrained_model_name_or_path": str(output.absolute().parent), "gguf_file": output.name}
    again = AutoModelForCausalLM.from_pretrained(**where, quantization_config=GgufConfig(dequantize=True))
    if AutoTokenizer.from_pretrained(**where)(PROBE_TEXT)["input_ids"] != tokenizer(PROBE_TEXT)["input_ids"]:
        raise RunError(f"{output}: loaded again, its tokenizer gives different tokens; the file is kept for inspection")
    _compare(model.float(), again.float(), tokenizer, output, ALLOWED["gguf"])


def _onnx(model: Any, tokenizer: Any, output: Path) -> None:
    from transformers.exporters import ExportedModel, OnnxConfig, OnnxExporter

    model = model.float().cpu()
    model.config.use_cache = False
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        exported = OnnxExporter().export(model, _inputs(tokenizer, 2), OnnxConfig(dynamic=True))
    except Exception as error:
        why = f"{output}: transformers' ONNX exporter does not support a {type(model).__name__}: {first_line(error)}"
        raise UserError(why) from error
    _save(exported, tokenizer, output)
    _compare(model, ExportedModel.from_pretrained(output), tokenizer, output, ALLOWED["onnx"])


def _inputs(tokenizer: Any, rows: int) -> dict[str, Any]:
    import torch

    batch = torch.tensor([tokenizer(PROBE_TEXT)["input_ids"]] * rows)
    return {"input_ids": batch, "attention_mask": torch.ones_like(batch)}


def _compare(model: Any, again: Any, tokenizer: Any, output: Path, allowed: float) -> None:
    """Print the difference of the logits of the exported model, loaded again, from those of the model.

    Raises:
        RunError: the difference is too large.
    """
    import torch

    inputs = _inputs(tokenizer, 1)
    with torch.no_grad():
        want, got = (torch.as_tensor(each(**inputs).logits).float().cpu() for each in (model.cpu(), again))
    off, largest = float((want - got).abs().max()), float(want.abs().max())
    if not off <= allowed * largest:
        raise RunError(f"{output}: loaded again, its logits differ by {off:.3g} (largest {largest:.3g}); the file is kept")
    same = float((want.argmax(-1) == got.argmax(-1)).float().mean())
    print(
        f"{output}: loaded again: logits differ by at most {off:.2g} (largest {largest:.3g}), {same:.0%} same top predictions"
    )


def write_gguf(model: Any, tokenizer: Any, output: Path) -> None:
    """Write weights (matrices in 16 bits), config, tokenizer and chat template.

    Raises:
        UserError: the model or the tokenizer is not supported.
    """
    import gguf

    _check(model)
    words = _tokenizer(tokenizer)
    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    writer = gguf.GGUFWriter(str(output), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(_rope(config).get("rope_theta", 10000.0)))
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    _add_words(writer, gguf, tokenizer, words, config.vocab_size)
    for name, weight in _tensors(model, heads, kv_heads):
        writer.add_tensor(name, *_stored(gguf, weight, model.dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _rope(config: Any) -> dict[str, Any]:
    return dict(getattr(config, "rope_parameters", None) or {})


def _check(model: Any) -> None:
    name = type(model).__name__
    kind = _rope(model.config).get("rope_type", "default")
    if name != "LlamaForCausalLM" or kind != "default" or model.config.attention_bias or model.config.mlp_bias:
        what = name if name != "LlamaForCausalLM" else f"Llama model with {kind} positions or biases"
        raise UserError(f"--format gguf: a {what} is not supported; expected a plain Llama model. {INSTEAD}")


def _tokenizer(tokenizer: Any) -> dict[str, Any]:
    """The tokenizer's JSON with llama.cpp's name of its pre-tokenizer as `pre`."""
    content: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    split = content.get("pre_tokenizer") or {}
    steps = split.get("pretokenizers", [split])
    kinds = [step.get("type") for step in steps]
    if content["model"]["type"] == "BPE" and not content["model"].get("byte_fallback") and not content.get("normalizer"):
        if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
            return content | {"pre": "gpt-2"}
        if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1].get("use_regex", True):
            return content | {"pre": "smollm"}
    by = " and ".join(filter(None, kinds))
    how = f"split by {by}" if by else "without a pre-tokenizer"
    raise UserError(
        f"--format gguf: this tokenizer ({content['model']['type']}, {how}) is not supported; "
        f"expected a byte-level BPE like that of GPT-2 or SmolLM. {INSTEAD}"
    )


def _add_words(writer: Any, gguf: Any, tokenizer: Any, words: dict[str, Any], size: int) -> None:
    by_id = {index: word for word, index in tokenizer.get_vocab().items()}
    special = {token["id"]: token["special"] for token in words.get("added_tokens") or []}
    names = [by_id.get(index, f"[PAD{index}]") for index in range(size)]  # a padded embedding has rows without a token
    kinds = [gguf.TokenType.NORMAL if index in by_id else gguf.TokenType.UNUSED for index in range(size)]
    for index, control in special.items():
        kinds[index] = gguf.TokenType.CONTROL if control else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words["pre"])
    writer.add_token_list(names)
    writer.add_token_types(kinds)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in words["model"]["merges"]])
    for name in ("bos", "eos", "pad", "unk"):
        if (index := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    starts = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    writer.add_add_bos_token(starts)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _tensors(model: Any, heads: int, kv_heads: int) -> Any:
    """Names and weights in GGUF's order of rows: the two halves of each head's rotation are interleaved."""
    state = model.state_dict()
    yield "token_embd.weight", state["model.embed_tokens.weight"]
    for layer in range(model.config.num_hidden_layers):
        for ours, theirs in LAYER.items():
            weight = state[f"model.layers.{layer}.{ours}.weight"]
            if theirs in ("attn_q", "attn_k"):
                rows, count = weight.shape[0], heads if theirs == "attn_q" else kv_heads
                weight = weight.reshape(count, 2, rows // count // 2, -1).transpose(1, 2).reshape(weight.shape)
            yield f"blk.{layer}.{theirs}.weight", weight
    yield "output_norm.weight", state["model.norm.weight"]
    if not model.config.tie_word_embeddings:
        yield "output.weight", state["lm_head.weight"]


def _stored(gguf: Any, weight: Any, dtype: Any) -> tuple[Any, None, Any]:
    """Vectors in float32, matrices in the model's own 16 bits or float16."""
    import torch

    weight = weight.detach().cpu()
    if weight.ndim == 1:
        return weight.float().numpy(), None, gguf.GGMLQuantizationType.F32
    if dtype == torch.bfloat16:
        bits = weight.to(torch.bfloat16).contiguous().view(torch.uint8).reshape(weight.shape[0], -1)
        return bits.numpy(), None, gguf.GGMLQuantizationType.BF16
    return weight.to(torch.float16).contiguous().numpy(), None, gguf.GGMLQuantizationType.F16

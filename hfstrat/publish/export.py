"""`hfstrat export`: a result in the files of other programs, which are loaded again and compared before they get their name.

safetensors: the form that transformers or sentence-transformers load (an adapter is merged). gguf: for llama.cpp and Ollama
(`hfstrat.publish.gguf`). onnx: by transformers' exporter (optimum's does not work with transformers 5).
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hfstrat.errors import ARTIFACT, RunError, UserError, first_line
from hfstrat.publish.gguf import write_gguf
from hfstrat.publish.merge import (
    check_mergeable,
    check_reloaded,
    inputs_of,
    is_adapter,
    merge,
    merged_in,
    outputs_of,
    reload_options,
    save,
)
from hfstrat.publish.written import check_unused, complete
from hfstrat.tasks import artifact, sentence_transformers
from hfstrat.tasks.artifact import PROBE_TEXT

NEEDS = {"safetensors": [], "gguf": ["gguf"], "onnx": ["onnx", "onnxscript", "onnxruntime"]}  # packages
ALLOWED = {"gguf": 3e-2, "onnx": 1e-3}  # difference relative to the largest logit: matrices of a GGUF file are in 16 bits


def export(target: str, output: Path, form: str) -> None:
    """Write a run's result (or a model) into a new folder, or as a .gguf file.

    Raises:
        UserError: an unknown format, a missing package, a model that the format does not support.
        RunError: the written model has other outputs; nothing is left behind then.
    """
    if form not in NEEDS:
        raise UserError(f"--format: {form}; expected one of {', '.join(NEEDS)}")
    if missing := [name for name in NEEDS[form] if importlib.util.find_spec(name) is None]:
        raise UserError(f"--format {form}: needs {', '.join(missing)}: pip install {' '.join(missing)}")
    if form == "gguf" and output.suffix != ".gguf":
        raise UserError(f"{output}: expected a file name that ends in .gguf")
    check_unused(output)
    folder, report = artifact.resolve(target)
    if form == "safetensors" and is_adapter(folder):
        return merge(target, output)
    if form == "safetensors" and sentence_transformers.is_one(folder):
        return _copy(folder, output)
    # in the stored dtype: that of this machine might round
    model, tokenizer, _ = artifact.load(target, "none", "checkpoint", widened=True)
    if hasattr(model, "peft_config"):
        check_mergeable(model, target)
        model, _ = merged_in(model, model.get_base_model().dtype, inputs_of(report, tokenizer)[0], target)
    safetensors = functools.partial(_safetensors, options=reload_options(target, report))
    options = report.run.recipe.data.chat_template_kwargs if report else {}
    gguf = functools.partial(_gguf, options=options)
    writers: dict[str, Callable[[Any, Any, Path], str]] = {"safetensors": safetensors, "gguf": gguf, "onnx": _onnx}
    with complete(output) as partial:
        line = writers[form](model, tokenizer, partial)
    return print(f"{output}: {line}")


def _copy(folder: str, output: Path) -> None:
    """Copy a pooled classifier as it was verified: saved again, it would lose its labels."""
    with complete(output) as partial:
        shutil.copytree(folder, partial)
        one, two = (artifact.load_artifact(str(each), "auto", {}) for each in (folder, partial))
        different = [name for name, tensor in one.state_dict().items() if not tensor.equal(two.state_dict()[name])]
        if different:
            raise RunError(f"{output}: loaded again, {different[0]} differs; nothing was written", ARTIFACT)
    print(f"{output}: loads with sentence-transformers")


def _safetensors(model: Any, tokenizer: Any, output: Path, options: dict[str, Any]) -> str:
    inputs, _ = inputs_of(None, tokenizer)
    expected = outputs_of(model, inputs)
    save(model, tokenizer, output)
    check_reloaded(output, expected, inputs, options, model.dtype)
    return f"{str(model.dtype).removeprefix('torch.')}, loads with transformers"


def _gguf(model: Any, tokenizer: Any, output: Path, options: dict[str, Any]) -> str:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    write_gguf(model, tokenizer, output, options)
    where = {"pretrained_model_name_or_path": str(output.absolute().parent), "gguf_file": output.name}
    again = AutoModelForCausalLM.from_pretrained(**where, quantization_config=GgufConfig(dequantize=True))
    if AutoTokenizer.from_pretrained(**where)(PROBE_TEXT)["input_ids"] != tokenizer(PROBE_TEXT)["input_ids"]:
        raise RunError(f"{output.name}: loaded again, its tokenizer gives different tokens; nothing was written", ARTIFACT)
    return _compare(model.float(), again.float(), tokenizer, output, ALLOWED["gguf"])


def _onnx(model: Any, tokenizer: Any, output: Path) -> str:
    from transformers.exporters import ExportedModel, OnnxConfig, OnnxExporter

    model = model.float().cpu()
    model.config.use_cache = False
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        exported = OnnxExporter().export(model, _inputs(tokenizer, 2), OnnxConfig(dynamic=True))
    except Exception as error:
        why = f"{output.name}: transformers' ONNX exporter does not support a {type(model).__name__}: {first_line(error)}"
        raise UserError(why) from error
    save(exported, tokenizer, output)
    return _compare(model, ExportedModel.from_pretrained(output), tokenizer, output, ALLOWED["onnx"])


def _inputs(tokenizer: Any, rows: int) -> dict[str, Any]:
    import torch

    batch = torch.tensor([tokenizer(PROBE_TEXT)["input_ids"]] * rows)
    return {"input_ids": batch, "attention_mask": torch.ones_like(batch)}


def _compare(model: Any, again: Any, tokenizer: Any, output: Path, allowed: float) -> str:
    """A line with the difference of the logits of the exported model, loaded again, from those of the model.

    Raises:
        RunError: the difference is too large.
    """
    import torch

    inputs = _inputs(tokenizer, 1)
    with torch.no_grad():
        want, got = (torch.as_tensor(each(**inputs).logits).float().cpu() for each in (model.cpu(), again))
    off, largest = float((want - got).abs().max()), float(want.abs().max())
    if not off <= allowed * largest:
        raise RunError(
            f"{output.name}: loaded again, its logits differ by {off:.3g} (largest {largest:.3g}), expected at most "
            f"{allowed * largest:.3g}; nothing was written",
            ARTIFACT,
        )
    same = float((want.argmax(-1) == got.argmax(-1)).float().mean())
    return f"loaded again: logits differ by at most {off:.2g} (largest {largest:.3g}), {same:.0%} same top predictions"

"""`hfstrat export`: a result in the form that other programs read, loaded again from it and compared.

safetensors: transformers' own form (an adapter is merged). gguf: for llama.cpp and Ollama, written with the `gguf` package, for
Llama models with a byte-level BPE. onnx: by transformers' own exporter (optimum's does not work with transformers 5).
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hfstrat.errors import RunError, UserError
from hfstrat.use import PROBE_TEXT, load, merge, resolve

NEEDS = {"safetensors": [], "gguf": ["gguf"], "onnx": ["onnx", "onnxscript", "onnxruntime"]}
ALLOWED = {"gguf": 3e-2, "onnx": 1e-3}  # of the largest logit: a GGUF's matrices are in 16 bits


def export(target: str, output: Path, form: str) -> None:
    """Write a run's result (or a model) into a new folder, or as a .gguf file.

    Raises:
        UserError: a form that there is not, a package that is missing, a model that the form cannot hold.
        RunError: what was written says something else than the model.
    """
    if form not in NEEDS:
        raise UserError(f"--format: {form}; expected one of {', '.join(NEEDS)}")
    if missing := [name for name in NEEDS[form] if importlib.util.find_spec(name) is None]:
        raise UserError(f"--format {form}: needs {', '.join(missing)}: pip install {' '.join(missing)}")
    if form == "gguf" and output.suffix != ".gguf":
        raise UserError(f"{output}: a file that ends in .gguf is expected")
    if output.exists() and (output.is_file() or any(output.iterdir())):
        raise UserError(f"{output} is in use; name a new one")
    folder, _ = resolve(target)
    if form == "safetensors" and (Path(folder) / "adapter_config.json").is_file():
        return merge(target, output)
    model, tokenizer, _ = load(target, "none", "checkpoint", widened=True)  # in its own dtype: this machine's might round
    if hasattr(model, "merge_and_unload"):
        own = model.get_base_model().dtype
        model = model.float().merge_and_unload(safe_merge=True).to(own)
    writers: dict[str, Callable[[Any, Any, Path], None]] = {"safetensors": _safetensors, "gguf": _gguf, "onnx": _onnx}
    return writers[form](model, tokenizer, output)


def _safetensors(model: Any, tokenizer: Any, output: Path) -> None:
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    print(f"{output}: {str(model.dtype).removeprefix('torch.')}, loads with transformers")


def _gguf(model: Any, tokenizer: Any, output: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from hfstrat.export_gguf import write

    write(model, tokenizer, output)
    where = {"pretrained_model_name_or_path": str(output.absolute().parent), "gguf_file": output.name}
    again = AutoModelForCausalLM.from_pretrained(**where, quantization_config=GgufConfig(dequantize=True))
    if AutoTokenizer.from_pretrained(**where)(PROBE_TEXT)["input_ids"] != tokenizer(PROBE_TEXT)["input_ids"]:
        raise RunError(f"{output}: read again, its tokenizer makes other tokens of a text; it is kept for inspection")
    _compare(model.float(), again.float(), tokenizer, output, ALLOWED["gguf"])


def _onnx(model: Any, tokenizer: Any, output: Path) -> None:
    from transformers.exporters import ExportedModel, OnnxConfig, OnnxExporter

    model = model.float().cpu()
    model.config.use_cache = False
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        exported = OnnxExporter().export(model, dict(_inputs(tokenizer, 2)), OnnxConfig(dynamic=True))
    except Exception as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{output}: transformers' ONNX exporter does not take a {type(model).__name__}: {why}") from error
    exported.save_pretrained(output)
    tokenizer.save_pretrained(output)
    _compare(model, ExportedModel.from_pretrained(output), tokenizer, output, ALLOWED["onnx"])


def _inputs(tokenizer: Any, rows: int) -> Any:
    import torch

    ids = tokenizer(PROBE_TEXT)["input_ids"]
    batch = torch.tensor([ids] * rows)
    return {"input_ids": batch, "attention_mask": torch.ones_like(batch)}


def _compare(model: Any, again: Any, tokenizer: Any, output: Path, allowed: float) -> None:
    """Say how far what was read again is from the model.

    Raises:
        RunError: too far.
    """
    import torch

    inputs = _inputs(tokenizer, 1)
    with torch.no_grad():
        want, got = (torch.as_tensor(each(**inputs).logits).float().cpu() for each in (model.cpu(), again))
    off, largest = float((want - got).abs().max()), float(want.abs().max())
    if not off <= allowed * largest:
        raise RunError(f"{output}: read again, its logits are off by {off:.3g} (the largest is {largest:.3g}); it is kept")
    same = float((want.argmax(-1) == got.argmax(-1)).float().mean())
    print(f"{output}: read again: logits differ by at most {off:.2g} of {largest:.3g}, the same first choice for {same:.0%}")

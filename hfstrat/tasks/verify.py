"""Compares the saved artifact, loaded by plain transformers or peft in a fresh process, with the trained model.

Run as `python -m hfstrat.tasks.verify SPEC.json`: prints one line of JSON, or ends with `errors.OUT_OF_MEMORY`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from math import prod
from pathlib import Path
from typing import Any

from hfstrat import errors
from hfstrat.models.load import read_json, read_shapes
from hfstrat.tasks.artifact import load_artifact

PROBE_ROWS, PROBE_TOKENS = 2, 128
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 4e-3}  # share of the largest logit: kernels may differ
# Times that on another device, where sums are rounded differently: SmolLM2-135M in bfloat16 differs by 6.5e-2 from itself in
# float32, in float16 by 2.4e-3, and two rounded models may each differ by as much
ELSEWHERE = 10
ROUNDING = 0.02  # of the tolerance: where training changed less than that, the untrained logits say nothing
FULL = ("CUDA error: out of memory", "ALLOC_FAILED")  # a GPU that is full from the start raises no exception of its own
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC", "ACCELERATE_", "FSDP_", "HFSTRAT_")


def probe_logits(model: Any, inputs: dict[str, Any]) -> Any:
    """Logits (`[rows, tokens, V]`; of a classifier `[rows, labels]`) in float32 on the CPU, without autocast.

    Those of a detector are followed by its boxes: `[rows, queries, classes + 4]`.
    """
    import torch

    model.eval()
    device = next(model.parameters()).device
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())  # pixels have the type of the first layer

    def fitted(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(device, dtype) if value.is_floating_point() and not is_autocast(device) else value.to(device)

    inputs = {name: fitted(value) for name, value in inputs.items()}
    with torch.no_grad():
        outputs = model(**inputs)
    boxes = getattr(outputs, "pred_boxes", None)
    logits = outputs.logits.float()
    return (logits if boxes is None else torch.cat([logits, boxes.float()], dim=-1)).cpu()


def is_autocast(device: Any) -> bool:
    """Whether kernels choose the precision of their inputs."""
    import torch

    return bool(torch.is_autocast_enabled(device.type))


def untrained_logits(model: Any, inputs: dict[str, Any], compute_dtype: Any) -> Any:
    """The logits of the probe before training: those of the artifact have to be nearer to the trained model's than to these."""
    import torch

    device = next(model.parameters()).device
    with torch.autocast(device.type, compute_dtype, enabled=compute_dtype != torch.float32):
        return probe_logits(model, inputs)


def verify(folder: Path, probe: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Reload `folder` in a fresh process and compare its logits with those of the trained model.

    On the device of the trained model; on the CPU where a GPU has too little memory.

    Args:
        probe: `inputs` of a forward pass; `logits` of the trained model and `untrained` of the one before training, float32;
            `dtype` to load in; `device`, the kind of the one that gave the logits (cpu, cuda, ...).
        options: the `task`, and keywords for loading the base of an adapter (`source`, and those of `from_pretrained`).

    Returns:
        How much the logits differ, the `device` of the comparison and that of the trained model, `trained_on`.

    Raises:
        RunError: the artifact does not load, its logits differ, or there is no memory to load it again.
    """
    import torch

    device = first_device(folder, probe, options)
    with tempfile.TemporaryDirectory(prefix="hfstrat-verify-") as scratch:
        file = Path(scratch) / "probe.pt"
        torch.save({"inputs": probe["inputs"], "logits": probe["logits"]}, file)
        spec = {"folder": str(folder), "probe": str(file), "dtype": probe["dtype"], "options": options}
        child = compare(spec | {"device": device})
        if child.returncode == errors.OUT_OF_MEMORY and device != "cpu":
            device = "cpu"
            child = compare(spec | {"device": device})
    result = result_of(child, folder) | {"device": device, "trained_on": probe["device"]}
    moved = float((probe["logits"] - probe["untrained"]).abs().max()) if probe["untrained"] is not None else float("inf")
    result["moved_by_training"] = moved
    # within the precision, and far from the untrained model: one whose weights did not load would be near that. NaN fails.
    # Weights of step 0 are the untrained ones, from which nothing can be far: kernels round by the place in memory
    precision = tolerance(probe["dtype"], device == probe["device"]) * result["max_logit"]
    rounding = ROUNDING * precision
    allowed = precision if moved <= rounding else min(precision, max(moved / 4, rounding))
    if not (result["bit_equal"] or result["max_difference"] <= allowed):
        raise errors.RunError(
            f"the artifact in {folder} does not match the trained model: logits differ by {result['max_difference']:.3g}, "
            f"expected at most {allowed:.3g} (training changed them by {moved:.3g}); it is kept for inspection",
            errors.ARTIFACT,
        )
    return result


def tolerance(dtype: str, same_device: bool) -> float:
    """The allowed difference of logits, as a share of the largest."""
    return TOLERANCE[dtype] * (1 if same_device else ELSEWHERE)


def first_device(folder: Path, probe: dict[str, Any], options: dict[str, Any]) -> str:
    """The device to try first: that of the trained model, unless it is a GPU without enough free memory for the weights."""
    import torch

    if probe["device"] != "cuda" or not torch.cuda.is_available():
        return "cpu"
    least = weight_bytes(folder, options, getattr(torch, probe["dtype"]).itemsize)
    return "cuda" if least < torch.cuda.mem_get_info()[0] else "cpu"


def weight_bytes(folder: Path, options: dict[str, Any], size: int) -> int:
    """A lower bound of the memory for the weights, at `size` bytes each; remote and quantized weights are not counted."""
    adapter = read_json(folder / "adapter_config.json")
    base = Path(str(adapter.get("base_model_name_or_path") or folder))
    places = {folder} if options.get("quantization") else {folder, base}
    return size * sum(prod(shape) for place in places if place.is_dir() for shape in read_shapes(place).values())


def compare(spec: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """Load and compare in a fresh process; for the CPU the GPUs are hidden, since libraries would use them."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHER)}
    if spec["device"] == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    file = Path(spec["probe"]).with_name("spec.json")
    file.write_text(json.dumps(spec))
    command = [sys.executable, "-m", "hfstrat.tasks.verify", str(file)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def result_of(child: subprocess.CompletedProcess[str], folder: Path) -> dict[str, Any]:
    """The result of the fresh process. Raises RunError where it failed."""
    lines = child.stdout.strip().splitlines()
    if child.returncode in (errors.OUT_OF_MEMORY, -signal.SIGKILL):  # sent by the system when memory runs out
        raise errors.RunError(
            f"the artifact in {folder} was not compared: there is not enough memory to load it in a fresh process, "
            "not even on the CPU; it is kept, and is complete",
            errors.OUT_OF_MEMORY,
        )
    if child.returncode or not lines:
        cause = (child.stderr.strip().splitlines() or ["no output"])[-1]
        raise errors.RunError(f"the artifact in {folder} does not load in a fresh process: {cause}", errors.ARTIFACT)
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def compared(spec: dict[str, Any]) -> dict[str, Any]:
    """Load the artifact of `spec` in this process and compare its logits with the stored ones.

    Raises SystemExit: there is no memory for it (`errors.OUT_OF_MEMORY`), or the logits have another shape.
    """
    import torch

    probe = torch.load(spec["probe"], weights_only=True)
    try:
        model = load_artifact(spec["folder"], getattr(torch, spec["dtype"]), spec["options"]).to(spec["device"])
        logits, expected = probe_logits(model, probe["inputs"]), probe["logits"]
    except Exception as error:
        if errors.named(error).code == errors.OUT_OF_MEMORY or any(words in str(error) for words in FULL):
            raise SystemExit(errors.OUT_OF_MEMORY) from None
        raise
    if logits.shape != expected.shape:
        raise SystemExit(f"the logits have shape {tuple(logits.shape)}, expected {tuple(expected.shape)}")
    return {
        "max_difference": float((logits - expected).abs().max()),
        "max_logit": float(expected.abs().max()),
        "bit_equal": bool(torch.equal(logits, expected)),
        "top1_agreement": float((logits.argmax(-1) == expected.argmax(-1)).float().mean()),
        "loaded_with": type(model).__name__,
    }


def _main(spec_file: str) -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(json.dumps(compared(json.loads(Path(spec_file).read_text()))))


if __name__ == "__main__":
    _main(sys.argv[1])

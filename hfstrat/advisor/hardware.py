"""The machine: memory, accelerator, how processes share a model, and the constants measured on such machines. No torch."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from hfstrat.errors import UserError
from hfstrat.recipe import library
from hfstrat.recipe.section import seconds
from hfstrat.run import launch

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
LEAST_MEMORY, MOST_MEMORY = 2**26, 2**50
LEAST_TIME, MOST_TIME = 5.0, 366 * 86400.0
CONSTANTS = Path(__file__).parent / "constants.json"  # fitted by benchmarks/memory_prediction.py and time_prediction.py


class Device(NamedTuple):
    """An accelerator or the CPU: bytes of memory, and dense 16-bit operations per second by its data sheet (0: measured)."""

    name: str
    memory: float
    peak: float = 0.0
    is_cpu: bool = False


GIB = 2**30
DEVICES = {  # manufacturers' data sheets: memory, dense 16-bit tensor operations without sparsity
    "t4": Device("NVIDIA T4", 15 * GIB, 65e12),
    "l4": Device("NVIDIA L4", 22.5 * GIB, 121e12),
    "rtx3090": Device("NVIDIA GeForce RTX 3090", 24 * GIB, 71e12),
    "rtx4090": Device("NVIDIA GeForce RTX 4090", 24 * GIB, 165e12),
    "a10": Device("NVIDIA A10", 22.5 * GIB, 125e12),
    "l40s": Device("NVIDIA L40S", 45 * GIB, 362e12),
    "a100-40gb": Device("NVIDIA A100 40GB", 40 * GIB, 312e12),
    "a100": Device("NVIDIA A100 80GB", 80 * GIB, 312e12),
    "h100": Device("NVIDIA H100 80GB", 80 * GIB, 989e12),
    "h200": Device("NVIDIA H200", 141 * GIB, 989e12),
}


class Band(NamedTuple):
    """Median and worst relative error of a stored validation, and its number of runs."""

    median: float
    worst: float
    runs: int

    def words(self) -> str:
        return f"within {self.worst:.0%} (median {self.median:.0%}) in {self.runs} validation runs"


@lru_cache
def constants() -> dict[str, Any]:
    """The constants fitted to measured runs."""
    found: dict[str, Any] = json.loads(CONSTANTS.read_text(encoding="utf-8"))
    return found


def import_bytes(on_cpu: bool, reads_words: bool = True) -> float:
    """Memory of the imported libraries, which counts toward the peak of a process on a CPU.

    Args:
        reads_words: whether examples are texts, for whose baselines more is imported.
    """
    return float(constants()["cpu"]["imports" if reads_words else "imports_of_files"]) if on_cpu else 0.0


def memory_band(reads_words: bool = True, sees_images: bool = False) -> Band | None:
    """The error of memory predictions above the imported libraries; None if they were not validated.

    Args:
        reads_words: whether examples are texts.
        sees_images: whether these have images.
    """
    found = constants().get("pictures_band" if sees_images else "memory_band" if reads_words else "files_band")
    return Band(found["median"], found["worst"], found["count"]) if found else None


def time_band(source: str) -> float | None:
    """The worst relative error of times predicted from this source of rates; None if it was not validated."""
    found = constants().get("time_bands", {}).get(source)
    return float(found["worst"]) if found else None


class Sharing(NamedTuple):
    """How processes share a model: what is sharded over them, and what is offloaded to the memory of the host."""

    kind: str = "one process"
    processes: int = 1
    shards_weights: bool = False
    shards_gradients: bool = False
    shards_optimizer: bool = False
    offloads_optimizer: bool = False
    offloads_weights: bool = False


def parse_memory(text: str) -> float:
    """'16GiB' in bytes. Raises UserError for anything that is not a plausible amount of memory."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    if match is None or match[2] == "i":
        raise UserError(f"--memory: {text}: expected an amount of memory such as 16GiB or 24GB")
    amount = float(match[1]) * UNITS[match[2]]
    if not LEAST_MEMORY <= amount <= MOST_MEMORY:
        raise UserError(f"--memory: {text} is {amount:,.0f} bytes; expected between 64MiB and 1024TiB, such as 16GiB")
    return amount


def parse_time(text: str, option: str = "--time") -> float:
    """'2h' in seconds. Raises UserError for anything that is not a plausible duration of a run."""
    try:
        found = seconds(text)
    except ValueError as error:
        raise UserError(f"{option}: {text}: {error}") from None
    if not LEAST_TIME <= found <= MOST_TIME:
        raise UserError(f"{option}: {text} is {found:,.0f} s; expected between {LEAST_TIME:.0f}s and a year (8784h)")
    return found


def find_device(name: str) -> Device:
    """The device of this name, or that of this machine for `auto`. Raises UserError with the nearest name."""
    key = re.sub(r"[\s_]|nvidia|geforce", "", name.lower())
    if key == "auto":
        return _gpu_here() or cpu()
    if key == "cpu":
        return cpu()
    if key in DEVICES:
        return DEVICES[key]
    near = get_close_matches(key, ["cpu", "auto", *DEVICES], n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(
        f"--device: {name}: unknown; {hint}expected auto, cpu or one of {', '.join(DEVICES)} (for another GPU: name a similar "
        "one and set --memory)"
    )


def cpu() -> Device:
    from hfstrat.models.fingerprint import processor

    return Device(f"{processor() or 'CPU'}, {cores()} core{'s' * (cores() != 1)}", memory_here(), is_cpu=True)


def available_cores() -> list[int]:
    """The numbers of the cores that this process may run on."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def cores() -> int:
    return len(available_cores())


def memory_here() -> float:
    """Bytes available to a process of this machine, within the limit of its control group."""
    info = Path("/proc/meminfo")
    found = float(8 * GIB)
    if info.exists():
        lines = dict(line.split(":", 1) for line in info.read_text().splitlines())
        found = float(lines.get("MemAvailable", lines["MemTotal"]).split()[0]) * 1024
    limit, used = (_number(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    return found if limit is None else min(found, limit - (used or 0.0))


def _number(file: Path) -> float | None:
    try:
        return float(file.read_text())
    except (OSError, ValueError):
        return None


def _gpu_here() -> Device | None:
    """The first GPU listed by nvidia-smi, if the driver gives access to one."""
    tool = shutil.which("nvidia-smi")
    if tool is None or launch.count_gpus() == 0:
        return None
    query = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    lines = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20).stdout.strip().splitlines()
    if not lines:
        return None
    name, _, mebibytes = lines[0].rpartition(",")
    key = re.sub(r"[\s_]|nvidia|geforce", "", name.lower())
    known = next((device for short, device in reversed(DEVICES.items()) if short.split("-")[0] in key), None)
    return Device(name.strip(), float(mebibytes) * 2**20, known.peak if known else 0.0)


class Busyness:
    """The share of the cores of this process that others have used since it was made."""

    def __init__(self) -> None:
        self.before = self.now()

    @staticmethod
    def now() -> tuple[float, float, float]:
        """Seconds of these cores, those in which they did nothing, and those of this process."""
        import psutil

        every = psutil.cpu_times(percpu=True)
        mine = [core for core in available_cores() if core < len(every)] or range(len(every))
        times = [every[core] for core in mine]
        idle = sum(core.idle + getattr(core, "iowait", 0.0) for core in times)
        return sum(sum(core[:8]) for core in times), idle, time.process_time()

    def of_others(self) -> float:
        total, idle, own = (now - before for now, before in zip(self.now(), self.before, strict=True))
        return max(0.0, (total - idle - own) / total) if total else 0.0


def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16, by the same flag that torch reads."""
    info = Path("/proc/cpuinfo")
    return info.exists() and "avx512_bf16" in info.read_text()


def read_sharing(name: str | None, processes: int | None = None) -> Sharing:
    """How an Accelerate config shares a model. Raises UserError if no such config exists."""
    if name is None:
        return Sharing() if not processes or processes == 1 else Sharing("ddp", processes)
    try:
        file = Path(name) if Path(name).is_file() else library.find("accelerate_configs", name)
    except UserError as error:
        raise UserError(f"--accelerate-config: {error}") from None
    settings = launch.read_config(file)
    count, kind = processes or int(settings.get("num_processes") or 1), str(settings.get("distributed_type"))
    if kind == "FSDP":
        return _fsdp(settings.get("fsdp_config") or {}, count)
    if kind == "DEEPSPEED":
        return _zero(settings.get("deepspeed_config") or {}, count)
    return Sharing() if count == 1 else Sharing("ddp", count)


def _fsdp(found: dict[str, Any], count: int) -> Sharing:
    strategy = str(found.get("fsdp_sharding_strategy", found.get("fsdp_reshard_after_forward", "FULL_SHARD"))).upper()
    keeps = strategy in ("SHARD_GRAD_OP", "FALSE", "2")  # gathered weights are released only after the backward pass
    offloads = bool(found.get("fsdp_offload_params"))
    return Sharing("fsdp2" if not keeps else "fsdp, gathered once", count, not keeps, True, True, offloads, offloads)


def _zero(found: dict[str, Any], count: int) -> Sharing:
    stage = int(found.get("zero_stage") or 2)
    offloads = [str(found.get(f"offload_{what}_device", "none")) != "none" for what in ("optimizer", "param")]
    return Sharing(f"zero{stage}", count, stage >= 3, stage >= 2, stage >= 1, offloads[0], offloads[1] and stage >= 3)

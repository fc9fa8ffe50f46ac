"""How a run is started: one process by exec, several through `accelerate launch` as a child."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from hfstrat import errors, outcome, shipped
from hfstrat.errors import UserError

LAUNCHER_SPEAKS = ("Traceback (most recent call last)", "torch/distributed/elastic", "torch.distributed.elastic")


@dataclass(frozen=True)
class Launch:
    """A command and its environment."""

    command: list[str]
    environment: dict[str, str]
    processes: int

    def line(self) -> str:
        return shlex.join(self.command)


def plan_launch(arguments: list[str], config: str | None, processes: int | None, program: str = "hfstrat.train") -> Launch:
    """The command for a run.

    Args:
        arguments: of the program; for `hfstrat.train` recipe, overrides and flags.
        config: name or path of an Accelerate config; None: `single`, or one for several processes that fits this machine.
        processes: how many; None: what the config says.
        program: the module that is run.

    Raises:
        UserError: an unknown config, or a number of processes that it or the machine cannot have.
    """
    gpus = count_gpus()
    if config is None:
        config = "single" if processes in (None, 1) else ("ddp" if gpus else "cpu_ddp")
    file = Path(config) if Path(config).is_file() else shipped.find("accelerate_configs", config)
    settings = _read(file)
    wanted = processes or int(settings.get("num_processes") or 1)
    on_cpu = bool(settings.get("use_cpu"))
    local = wanted // max(1, int(settings.get("num_machines") or 1))
    if wanted > 1 and str(settings.get("distributed_type")) == "NO":
        raise UserError(f"--num-processes {wanted}: {config} is for one process; use --accelerate-config ddp or cpu_ddp")
    if wanted > 1 and not on_cpu and local > gpus:
        raise UserError(f"--num-processes {wanted}: this machine has {gpus} GPU(s); on CPUs use --accelerate-config cpu_ddp")
    environment = dict(os.environ) | {"HFSTRAT_PROCESSES": str(wanted)}
    kind = str(settings.get("distributed_type"))
    if wanted == 1 and kind in ("NO", "MULTI_GPU", "MULTI_CPU") and settings.get("mixed_precision") in (None, "no"):
        visible = environment.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        single = {"CUDA_VISIBLE_DEVICES": visible, "ACCELERATE_USE_CPU": str(on_cpu).lower()}
        return Launch([sys.executable, "-m", program, *arguments], environment | single, 1)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // max(1, local))))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file), "--num_processes", str(wanted)]
    if "main_process_port" not in settings and local == wanted:
        command += ["--main_process_port", "0"]  # a free one, so that two runs do not meet
    return Launch([*command, "-m", program, *arguments], environment, wanted)


def _read(file: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{file}: this is no valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(settings, dict) or "distributed_type" not in settings:
        raise UserError(f"{file}: this is no Accelerate config: it has no distributed_type")
    return settings


def count_gpus() -> int:
    """GPUs of this machine that may be used, without torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = Path("/proc/driver/nvidia/gpus")
    there = len(list(found.iterdir())) if found.is_dir() else _asked_nvidia_smi()
    return there if visible is None else min(there, len([v for v in visible.split(",") if v.strip() not in ("", "-1")]))


def _asked_nvidia_smi() -> int:
    """Where the driver has no folder in /proc, as under WSL2."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return 0
    listed = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def start(launch: Launch) -> int:
    """Carry out a launch; returns the exit code. One process replaces this one and does not return."""
    if launch.processes == 1 and launch.command[2] != "accelerate.commands.launch":
        sys.stdout.flush()
        os.execve(launch.command[0], launch.command, launch.environment)
    with tempfile.TemporaryDirectory(prefix="hfstrat-launch-") as scratch:
        file = Path(scratch) / "outcome.json"
        environment = launch.environment | {outcome.FILE: str(file)}
        # a session of its own: a Ctrl-C reaches the processes once, through us
        child = subprocess.Popen(
            launch.command, env=environment, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True
        )
        received = _forward_signals(child)
        assert child.stderr is not None
        kept = _relay(child.stderr)
        code = child.wait()
        if received:
            print(errors.named(KeyboardInterrupt()), file=sys.stderr)
            return errors.INTERRUPTED
        if not file.exists():
            sys.stderr.writelines(kept)
            if code:
                print(f"the launcher ended with code {code}; no process said why (killed, or out of memory?)", file=sys.stderr)
            return errors.CRASH if code else errors.OK
        told = json.loads(file.read_text())
    if told["code"] == errors.CRASH:
        sys.stderr.writelines(kept)
    if told["sentence"]:
        rank = f"rank {told['rank']}: " if told["rank"] else ""
        print(rank + told["sentence"], file=sys.stderr)
    return int(told["code"])


def _forward_signals(child: subprocess.Popen[str]) -> list[int]:
    """Pass Ctrl-C and a polite kill on; the list fills with what came."""
    received: list[int] = []

    def forward(number: int, frame: object) -> None:
        received.append(number)
        child.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    return received


def _relay(stream: IO[str]) -> list[str]:
    """Pass the processes' stderr on until the launcher itself speaks; keep its words back."""
    kept: list[str] = []
    for line in stream:
        if kept or any(mark in line for mark in LAUNCHER_SPEAKS):
            kept.append(line)
        else:
            sys.stderr.write(line)
    return kept

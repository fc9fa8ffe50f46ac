"""Starts a run: one process by exec, several through `accelerate launch` as a child process."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import yaml

from hfstrat import errors
from hfstrat.errors import UserError
from hfstrat.recipe import library
from hfstrat.trainer import distributed, heartbeat, signals

LAUNCHER_MARKS = ("Traceback (most recent call last)", "torch/distributed/elastic", "torch.distributed.elastic")


@dataclass(frozen=True)
class Launch:
    """A command and its environment."""

    command: list[str]
    environment: dict[str, str]
    processes: int
    wrapping: str = distributed.ALONE  # how the processes share the model

    def line(self) -> str:
        return shlex.join(self.command)


class Machines(NamedTuple):
    """Options for several machines, by accelerate's names; None: as in the config."""

    num_machines: int | None = None
    machine_rank: int | None = None
    main_process_ip: str | None = None
    main_process_port: int | None = None


def plan_launch(
    arguments: list[str],
    config: str | None,
    processes: int | None,
    machines: Machines | None = None,
    program: str = "hfstrat.train",
) -> Launch:
    """The command for a run.

    Args:
        arguments: of the program; for `hfstrat.train` the recipe, overrides and flags.
        config: name or path of an Accelerate config; None: `single`, or one for several processes that suits this machine.
        processes: their number on all machines; None: as in the config.
        program: the module to run.

    Raises:
        UserError: an unknown config, or a number of processes that it or this machine does not support.
    """
    gpus, machines = count_gpus(), machines or Machines()
    if config is None:
        several = "multi_node_ddp" if (machines.num_machines or 1) > 1 else "ddp"
        alone = processes in (None, 1) and (machines.num_machines or 1) == 1
        config = "single" if alone else (several if gpus else "cpu_ddp")
    file = Path(config) if Path(config).is_file() else library.find("accelerate_configs", config)
    settings = read_config(file)
    wanted = processes or int(settings.get("num_processes") or 1)
    on_cpu, kind = bool(settings.get("use_cpu")), str(settings.get("distributed_type"))
    count = machines.num_machines or int(settings.get("num_machines") or 1)
    wrapping = distributed.WRAPPINGS.get(kind, distributed.ALONE if wanted == 1 else distributed.DDP)
    _check_possible(config, kind, wanted, count, on_cpu, gpus)
    environment = dict(os.environ) | {distributed.REQUESTED: str(wanted), distributed.WRAPPING: wrapping}
    if wanted == 1 and kind in ("NO", "MULTI_GPU", "MULTI_CPU") and settings.get("mixed_precision") in (None, "no"):
        visible = environment.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        single = {"CUDA_VISIBLE_DEVICES": visible, "ACCELERATE_USE_CPU": str(on_cpu).lower()}
        return Launch([sys.executable, "-m", program, *arguments], environment | single, 1)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // max(1, wanted // count))))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file), "--num_processes", str(wanted)]
    command += _of_machines(machines, settings, count)
    return Launch([*command, "-m", program, *arguments], environment, wanted, wrapping)


def _of_machines(given: Machines, settings: dict[str, Any], count: int) -> list[str]:
    """Accelerate's flags for the address of the main process. Raises UserError if it is missing."""
    if count == 1:  # a free port, so that two runs do not collide
        port = given.main_process_port if given.main_process_port is not None else settings.get("main_process_port", 0)
        return ["--main_process_port", str(port)]
    options = {name: value for name, value in given._asdict().items() if value is not None}
    missing = [name for name in ("main_process_ip", "main_process_port") if options.get(name, settings.get(name)) is None]
    if missing:
        raise UserError(
            f"--{missing[0].replace('_', '-')}: missing; {count} machines need the address of the first one: on each, give "
            "--main-process-ip, --main-process-port and its own --machine-rank (0 on the first)"
        )
    rank = options.get("machine_rank", settings.get("machine_rank", 0))
    if not 0 <= int(rank) < count:
        raise UserError(f"--machine-rank: {rank}; {count} machines are numbered 0 to {count - 1}")
    return [word for name, value in ({"num_machines": count} | options).items() for word in (f"--{name}", str(value))]


def _check_possible(config: str, kind: str, wanted: int, machines: int, on_cpu: bool, gpus: int) -> None:
    """Raise UserError for a launch that is not possible on this machine."""
    if wanted > 1 and kind == "NO":
        raise UserError(f"--num-processes {wanted}: {config} is for one process; use --accelerate-config ddp or cpu_ddp")
    if wanted % machines:
        near = sorted({max(1, wanted // machines) * machines, (wanted // machines + 1) * machines})
        raise UserError(
            f"--num-processes: {wanted} processes in total cannot be divided among {machines} machines; "
            f"use {' or '.join(map(str, near))}"
        )
    if kind == "DEEPSPEED" and importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            f"--accelerate-config {config}: DeepSpeed is not installed: pip install 'hfstrat[deepspeed]', or use fsdp2"
        )
    if kind == "FSDP" and (on_cpu or not gpus):
        raise UserError(
            f"--accelerate-config {config}: FSDP needs GPUs, and none is available here (accelerate has no CPU backend for "
            "it and would train without FSDP); on CPUs use --accelerate-config cpu_ddp"
        )
    on_cpu = on_cpu or (kind == "DEEPSPEED" and os.environ.get("DS_ACCELERATOR") == "cpu")  # DeepSpeed's own variable
    local = wanted // machines
    if not on_cpu and local > gpus and (wanted > 1 or kind == "DEEPSPEED"):
        raise UserError(f"--num-processes {wanted}: this machine has {gpus} GPU(s); on CPUs use --accelerate-config cpu_ddp")


def read_config(file: Path) -> dict[str, Any]:
    """The settings of an Accelerate config. Raises UserError if it is none."""
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{file}: not valid YAML: {errors.first_line(error)}") from None
    if not isinstance(settings, dict) or "distributed_type" not in settings:
        raise UserError(f"{file}: not an Accelerate config: it has no distributed_type")
    return settings


def count_gpus() -> int:
    """The number of visible GPUs of this machine, without torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = Path("/proc/driver/nvidia/gpus")
    count = len(list(found.iterdir())) if found.is_dir() else _count_by_nvidia_smi()
    return count if visible is None else min(count, len([v for v in visible.split(",") if v.strip() not in ("", "-1")]))


def _count_by_nvidia_smi() -> int:
    """The number of GPUs where the driver has no folder in /proc, as under WSL2."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return 0
    listed = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def start(launch: Launch) -> int:
    """Start a launch; returns the exit code. A single process replaces this one, so the call does not return."""
    if launch.processes == 1 and launch.command[2] != "accelerate.commands.launch":
        sys.stdout.flush()
        os.execve(launch.command[0], launch.command, launch.environment)
    with tempfile.TemporaryDirectory(prefix="hfstrat-launch-") as scratch:
        file = Path(scratch) / "outcome.json"
        environment = launch.environment | {heartbeat.FILE: str(file)}
        # its own session: Ctrl-C reaches the processes only once, forwarded by us
        child = subprocess.Popen(
            launch.command, env=environment, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True
        )
        received = _forward_signals(child, str(file))
        assert child.stderr is not None
        launcher_lines = _relay(child.stderr)
        code = child.wait()
        if received and (len(received) > 1 or not file.exists()):
            print(errors.named(KeyboardInterrupt()), file=sys.stderr)
            return errors.INTERRUPTED
        if not file.exists():
            sys.stderr.writelines(launcher_lines)
            if code:
                cause = f"{first_to_fail(launcher_lines)}no process reported a cause (killed, or out of memory?)"
                print(f"the launcher ended with code {code}; {cause}", file=sys.stderr)
            return errors.CRASH if code else errors.OK
        outcome = json.loads(file.read_text())
    if outcome["code"] == errors.CRASH:
        sys.stderr.writelines(launcher_lines)
    if outcome["sentence"]:
        rank = f"rank {outcome['rank']}: " if outcome["rank"] and outcome["code"] != errors.INTERRUPTED else ""
        print(rank + outcome["sentence"], file=sys.stderr)
    return int(outcome["code"])


def first_to_fail(lines: list[str]) -> str:
    """The process that failed first according to the launcher; empty if it does not report one."""
    text = "".join(lines).rpartition("Root Cause")[2]
    rank, ended = re.search(r"\brank\s*:\s*(\d+)", text), re.search(r"\bexitcode\s*:\s*(-?\d+)", text)
    if not rank or not ended:
        return ""
    number = int(ended[1])
    return f"rank {rank[1]} {f'was ended by signal {-number}' if number < 0 else f'ended with code {number}'} first; "


def _forward_signals(child: subprocess.Popen[str], file: str) -> list[int]:
    """Forward SIGINT and SIGTERM to the processes, and kill them at a second Ctrl-C; returns the list that collects signals.

    The launcher itself gets the signal only if no process has started: it would kill them after 30 s, saved or not.
    """
    received: list[int] = []

    def forward(number: int, frame: object) -> None:
        again = bool(received) and number == signal.SIGINT
        if not received or again:
            received.append(number)
        if not signals.stop_all(file, now=again) or again:
            child.send_signal(signal.SIGKILL if again else number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    return received


def _relay(stream: IO[str]) -> list[str]:
    """Forward the stderr of the processes until the launcher itself writes; returns the lines of the launcher."""
    launcher_lines: list[str] = []
    for line in stream:
        if launcher_lines or any(mark in line for mark in LAUNCHER_MARKS):
            launcher_lines.append(line)
        else:
            sys.stderr.write(line)
    return launcher_lines

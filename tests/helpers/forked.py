"""Processes that are forked from one that has imported everything: a start takes one second instead of ten."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODULES = [
    "hfstrat.train",
    "hfstrat.run.setup",
    "hfstrat.tasks.verify",
    "hfstrat.strategies.distill.strategy",
    "hfstrat.strategies.frozen.precompute",
    "peft",
    "torch.distributed",
]


def start(
    target: Callable[..., None], args: tuple[Any, ...], processes: int, environment: dict[str, str], log: Path
) -> list[Any]:
    """Start `target(*args)` in one group of processes, with this environment; what they print goes to `log`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(MODULES)
    common = environment | {"OMP_NUM_THREADS": "1"}
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        common |= {"ACCELERATE_USE_CPU": "true", "LOCAL_WORLD_SIZE": str(processes)}
    members = []
    for rank in range(processes):
        own = common | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {})
        members.append(context.Process(target=_begin, args=(own, str(log), target, args)))
    for member in members:
        member.start()
    return members


def _begin(environment: dict[str, str], log: str, target: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    import torch

    torch.set_num_threads(1)  # the server imported torch before this was set in the environment
    target(*args)

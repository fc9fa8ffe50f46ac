"""Runs of two processes: many in one group, compared with the same runs in this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers import distributed_worker, forked

TESTS = Path(__file__).parents[1]


def in_world(
    folder: Path, runs: list[dict[str, Any]], processes: int = 2, timeout: int = 400, **environment: str
) -> dict[str, Any]:
    """Run `runs` (`name`, `recipe`, `overrides`, ...) in one group of processes; return how each ended, by name."""
    spec, log = folder / "spec.json", folder / "world.log"
    spec.write_text(json.dumps(runs))
    log.unlink(missing_ok=True)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HFSTRAT_PROC", "HFSTRAT_WRAP", "ACCELERATE_", "FSDP_"))}
    if "ACCELERATE_USE_DEEPSPEED" in environment:  # which is read when accelerate is imported
        _launched(spec, log, processes, timeout, clean | environment)
    else:
        members = forked.start(distributed_worker.main, (spec,), processes, clean | environment, log)
        end = time.monotonic() + timeout
        while any(member.is_alive() for member in members) and time.monotonic() < end:
            if any(member.exitcode for member in members):
                break  # the others would wait for it
            time.sleep(0.05)
        for member in members:
            member.join(1)
            member.kill()
            member.join()
        assert not any(member.exitcode for member in members), log.read_text()[-9000:]
    ended = {run["name"]: json.loads((folder / f"{run['name']}.json").read_text()) for run in runs}
    wanted = {run["name"]: run.get("ends", "done") for run in runs}
    odd = {name: told for name, told in ended.items() if told["status"] != wanted[name]}
    assert not odd, f"{json.dumps(odd, indent=1)}\n{log.read_text()[-12000:]}"
    return ended


def _launched(spec: Path, log: Path, processes: int, timeout: int, environment: dict[str, str]) -> None:
    """The same by `torch.distributed.run`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), *filter(None, [environment.get("PYTHONPATH")])])
    with log.open("w") as out:
        done = subprocess.run(
            [*command, "-m", "helpers.distributed_worker", str(spec)],
            stdout=out,
            stderr=subprocess.STDOUT,
            timeout=timeout,
            check=False,
            env={**environment, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
    assert done.returncode == 0, log.read_text()[-9000:]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of all safetensors files of a result."""
    files = sorted((folder / "final").rglob("*.safetensors"))
    return {f"{file.parent.name}/{name}": t for file in files for name, t in load_file(file).items()}


def measured_losses(result: dict[str, Any]) -> dict[str, float]:
    """The losses on each evaluation set, before and after."""
    return {
        f"{name} {side}": one[side]["loss"]["value"]
        for name, one in result.get("measured", {}).items()
        for side in ("before", "after")
        if "loss" in one.get(side, {})
    }


def same(one: dict[str, Any], two: dict[str, Any], folders: tuple[Path, Path], rtol: float = 1e-3, atol: float = 5e-5) -> None:
    """Assert equal losses and weights, up to the order of sums."""
    losses = [[entry["loss"] for entry in result["losses"]] for result in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=2e-5)
    if one.get("metrics_before"):
        assert two["metrics_before"]["loss"] == pytest.approx(one["metrics_before"]["loss"], rel=1e-5)
    assert two["metrics_after"]["loss"] == pytest.approx(one["metrics_after"]["loss"], rel=1e-4)
    assert two["verified"]["bit_equal"], two["verified"]
    assert measured_losses(two) == pytest.approx(measured_losses(one), rel=1e-4)
    ours, theirs = (weights(folder) for folder in folders)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")

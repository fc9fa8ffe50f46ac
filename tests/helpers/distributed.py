"""Runs of two processes: many in one group, compared with the same runs in this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

TESTS = Path(__file__).parents[1]


def in_world(
    folder: Path, runs: list[dict[str, Any]], processes: int = 2, timeout: int = 400, **environment: str
) -> dict[str, Any]:
    """Run `runs` (`name`, `recipe`, `overrides`, ...) in one group of processes; return how each ended, by name."""
    spec = folder / "spec.json"
    spec.write_text(json.dumps(runs))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HFSTRAT_PROC", "HFSTRAT_WRAP", "ACCELERATE_", "FSDP_"))}
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), *filter(None, [clean.get("PYTHONPATH")])])
    done = subprocess.run(
        [*command, "-m", "helpers.distributed_worker", str(spec)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**clean, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    ended = {run["name"]: json.loads((folder / f"{run['name']}.json").read_text()) for run in runs}
    wanted = {run["name"]: run.get("ends", "done") for run in runs}
    odd = {name: told for name, told in ended.items() if told["status"] != wanted[name]}
    assert not odd, f"{json.dumps(odd, indent=1)}\n{done.stderr[-12000:]}"
    return ended


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

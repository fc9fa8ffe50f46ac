"""One process, two processes, a failing launcher: equal numbers, and one sentence per error."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.commands import PYTHON, hfstrat, losses
from helpers.runs import run
from safetensors.torch import load_file

from hfstrat import errors, strategies
from hfstrat.errors import UserError
from hfstrat.recipe import library
from hfstrat.run import launch
from hfstrat.trainer import distributed
from hfstrat.trainer.distributed import join_world


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "adapter_model.safetensors")


@pytest.mark.slow
def test_two_processes_equal_one(recipe: Any, tmp_path: Path) -> None:
    """Equal losses, gradients and weights; each of an odd number of evaluation examples counts once."""
    settings = ["model.dtype=float32", "data.eval_size=13", "training.per_device_train_batch_size=2"]
    one = recipe(*settings, f"output_dir={tmp_path / 'one'}")
    run(one)
    words = ["train", one.source, *settings, f"output_dir={tmp_path / 'two'}", "--num-processes", "2"]
    done = hfstrat(*words)
    assert done.returncode == 0, done.stderr
    assert "2 processes x 2 passes of 2 sequences" in done.stdout
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    for name, tensor in adapter(tmp_path / "one").items():
        torch.testing.assert_close(adapter(tmp_path / "two")[name], tensor, rtol=1e-3, atol=2e-5)
    reports = [json.loads((tmp_path / name / "report.json").read_text())["result"] for name in ("one", "two")]
    assert reports[0]["metrics_before"] == pytest.approx(reports[1]["metrics_before"], rel=1e-6)
    assert reports[1]["verified"]["bit_equal"]


@pytest.mark.slow
def test_a_mistake_on_every_rank_is_one_sentence(recipe: Any, tmp_path: Path) -> None:
    """Both processes find the mistake after importing torch: the user does not see the launcher's traceback."""
    file = tmp_path / "bad.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n' * 300 + '{"prompt": "a", "completion": null}\n')
    done = hfstrat("train", recipe().source, f"data.train={file}", "--num-processes", "2")
    assert done.returncode == errors.USER
    assert done.stderr.count("row 301: 'completion' is null, expected text") == 1
    assert "Traceback" not in done.stderr + done.stdout
    assert "ChildFailed" not in done.stderr + done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_accelerate_launch_runs_the_same_entry(recipe: Any, tmp_path: Path) -> None:
    config = library.find("accelerate_configs", "cpu_ddp")
    words = ["--config_file", str(config), "--main_process_port", "0", "-m", "hfstrat.train", recipe().source, "seed=3"]
    done = hfstrat(*words, module="accelerate.commands.launch")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "report.json").read_text())["run"]["recipe"]["seed"] == 3


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_with_a_message(recipe: Any, tmp_path: Path) -> None:
    words = [*PYTHON, "hfstrat", "train", recipe().source, "training.max_steps=100000", "--num-processes", "2"]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: (tmp_path / "run" / "recipe.yaml").exists(), 300)
        victims = ranks_of(child.pid)
        os.kill(victims[-1], signal.SIGKILL)
        out, err = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == errors.CRASH, out + err
    assert "rank 1 was ended by signal 9 first; no process reported a cause" in err


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["1", "2"])
def test_sigterm_is_an_interruption(recipe: Any, tmp_path: Path, processes: str) -> None:
    words = [*PYTHON, "hfstrat", "train", recipe().source, "training.max_steps=100000", "--num-processes", processes]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: (tmp_path / "run" / "recipe.yaml").exists(), 300)
        time.sleep(1)
        child.terminate()
        out, err = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == errors.INTERRUPTED, out + err
    assert err.count("interrupted") == 1
    assert "Traceback" not in err


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)


def ranks_of(parent: int) -> list[int]:
    """The training processes started by the launcher."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_text().split("\0")
            environment = (entry / "environ").read_text()
        except OSError:
            continue
        if "-m" in words and "hfstrat.train" in words and "\0LOCAL_RANK=" in environment:
            found.append(int(entry.name))
    return sorted(found)


def test_one_process_sees_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    planned = launch.plan_launch(["r.yaml"], None, None)
    assert planned.environment["CUDA_VISIBLE_DEVICES"] == "2"
    assert planned.command[1:] == ["-m", "hfstrat.train", "r.yaml"]


def test_threads_are_shared_between_local_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    planned = launch.plan_launch(["r.yaml"], "cpu_ddp", 2)
    assert planned.environment["OMP_NUM_THREADS"] == "4"
    assert "--num_processes 2" in planned.line()


@pytest.mark.parametrize(
    ("config", "processes", "words"),
    [
        ("ddpp", None, "did you mean 'ddp'"),
        ("single", 2, "is for one process"),
        ("ddp", 2, r"has 0 GPU\(s\)"),
    ],
)
def test_impossible_launches_are_refused(
    monkeypatch: pytest.MonkeyPatch, config: str, processes: int | None, words: str
) -> None:
    monkeypatch.setattr(launch, "count_gpus", lambda: 0)
    with pytest.raises(UserError, match=words):
        launch.plan_launch(["r.yaml"], config, processes)


def test_separate_runs_instead_of_one_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate can start N separate runs where one run of N processes was requested."""
    monkeypatch.setenv("HFSTRAT_PROCESSES", "2")
    with pytest.raises(UserError, match="but the world size is 1"):
        join_world()


def test_data_parallel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HFSTRAT_PROCESSES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(UserError, match="--num-processes 4"):
        join_world()


@pytest.mark.parametrize("name", library.names("accelerate_configs"))
def test_every_key_of_a_config_is_read(name: str) -> None:
    """accelerate's config class reads the file, and the launcher's parser reads its sections."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    file = library.find("accelerate_configs", name)
    config = load_config_from_file(str(file))
    flags = {action.dest for action in launch_command_parser()._actions}
    for section in ("fsdp_config", "deepspeed_config"):
        assert set(getattr(config, section)) <= flags
    settings = yaml.safe_load(file.read_text())
    assert settings["num_machines"] == (2 if name.startswith("multi_node") else 1)
    assert "use it" in "".join(line.lower() for line in file.read_text().splitlines() if line.startswith("#")) or name in (
        "single",
        "cpu_ddp",
    )


def test_the_bundled_accelerate_configs() -> None:
    names = "cpu_ddp ddp deepspeed_zero2 deepspeed_zero3 fsdp2 fsdp2_offload multi_node_ddp multi_node_fsdp2 single"
    assert library.names("accelerate_configs") == names.split()


def test_accelerate_reads_the_fsdp2_config_as_intended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin is built from the environment that the launcher sets."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.launch import prepare_multi_gpu_env

    for name, offload in (("fsdp2", False), ("fsdp2_offload", True)):
        words = ["--config_file", str(library.find("accelerate_configs", name)), "--num_processes", "4", "x.py"]
        left = prepare_multi_gpu_env(_validate_launch_command(launch_command_parser().parse_args(words))[0])
        assert left["ACCELERATE_USE_FSDP"] == "true"
        with monkeypatch.context() as patch:
            for key, value in left.items():
                if key.startswith("FSDP_"):
                    patch.setenv(key, value)
            plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2
        assert plugin.reshard_after_forward is True
        assert "FULL" in str(plugin.state_dict_type)
        assert plugin.auto_wrap_policy is not None
        assert plugin.cpu_ram_efficient_loading is False
        assert (type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy") is offload


def test_several_machines_rendezvous_at_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "count_gpus", lambda: 8)
    machines = launch.Machines(2, 1, "10.0.0.1", 29501)
    planned = launch.plan_launch(["r.yaml"], "multi_node_fsdp2", 16, machines)
    words = "--num_processes 16 --num_machines 2 --machine_rank 1 --main_process_ip 10.0.0.1 --main_process_port 29501 -m"
    assert words in planned.line()
    assert planned.wrapping == distributed.FSDP
    assert "multi_node_ddp.yaml" in launch.plan_launch(["r.yaml"], None, 16, machines).line()
    monkeypatch.setattr(launch, "count_gpus", lambda: 0)
    assert "cpu_ddp.yaml" in launch.plan_launch(["r.yaml"], None, 2, machines).line()


@pytest.mark.parametrize(
    ("config", "processes", "machines", "gpus", "words"),
    [
        (
            "multi_node_ddp",
            16,
            launch.Machines(machine_rank=0),
            8,
            "--main-process-ip: missing; 2 machines need the address",
        ),
        ("ddp", 4, launch.Machines(2, 0, "h"), 8, "--main-process-port: missing"),
        ("multi_node_ddp", 16, launch.Machines(2, 2, "h"), 8, "2 machines are numbered 0 to 1"),
        ("multi_node_ddp", 15, launch.Machines(2, 0, "h"), 8, r"15 processes .* among 2 machines; use 14 or 16"),
        ("multi_node_ddp", 32, launch.Machines(2, 0, "h"), 8, r"this machine has 8 GPU\(s\)"),
        ("fsdp2", 2, launch.Machines(), 0, "FSDP needs GPUs"),
        ("deepspeed_zero3", 2, launch.Machines(), 0, r"has 0 GPU\(s\)"),
    ],
)
def test_impossible_rendezvous_settings_are_refused(
    monkeypatch: pytest.MonkeyPatch, config: str, processes: int, machines: launch.Machines, gpus: int, words: str
) -> None:
    monkeypatch.setattr(launch, "count_gpus", lambda: gpus)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    with pytest.raises(UserError, match=words):
        launch.plan_launch(["r.yaml"], config, processes, machines)


def test_missing_deepspeed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "count_gpus", lambda: 2)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'hfstrat\[deepspeed\]', or use fsdp2"):
        launch.plan_launch(["r.yaml"], "deepspeed_zero2", 2)


@pytest.mark.parametrize("kind", ["Linear", "DistributedDataParallel", "FSDPModule", "DeepSpeedEngine", "DataParallel"])
@pytest.mark.parametrize("asked", ["alone", "ddp", "fsdp", "deepspeed"])
def test_the_wrapping_is_the_requested_one(monkeypatch: pytest.MonkeyPatch, asked: str, kind: str) -> None:
    monkeypatch.setenv("HFSTRAT_WRAPPING", asked)
    wrapped = type(kind, (), {})()
    right = {"ddp": "DistributedDataParallel", "fsdp": "FSDPModule", "deepspeed": "DeepSpeedEngine"}
    if kind == "DataParallel" or (asked in right and right[asked] != kind):
        with pytest.raises(UserError, match="use" if kind == "DataParallel" else f"should be wrapped in {right[asked]}"):
            distributed.check_wrapped(wrapped, 2)
    else:
        distributed.check_wrapped(wrapped, 2)


def test_the_wrapping_is_read_from_accelerates_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HFSTRAT_WRAPPING", "WORLD_SIZE", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.wrapping() == distributed.ALONE
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert distributed.wrapping() == distributed.DDP
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert distributed.wrapping() == distributed.FSDP
    assert distributed.is_sharded()


def test_strategies_that_cannot_be_sharded_are_refused_before_torch(recipe: Any, tiny: Path) -> None:
    for section, wrapping, words in (
        ("{name: partial, last_n_layers: 1, precompute: true}", "fsdp", "set auto or false"),
        ("{name: partial, last_n_layers: 1, frozen_dropout: false}", "fsdp", "remove it"),
        ("{name: partial, last_n_layers: 2, gradual_unfreezing: {every: 1}}", "ddp", "needs a single process"),
        ("{name: head, untie: true}", "deepspeed", "ddp, or strategy partial"),
        ("{name: lora, use_dora: true}", "deepspeed", "fsdp2 or ddp"),
        (f"{{name: distill, student: lora, on_policy: true, teacher: {tiny}}}", "fsdp", "remove on_policy"),
    ):
        wanted = recipe(f"strategy={section}").recipe
        with pytest.raises(UserError, match=words):
            strategies.build(wanted.strategy).check(wanted, wrapping, network=False)

"""Two machines simulated on this one: two network namespaces joined by a veth pair, with gloo."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import run
from safetensors.torch import load_file

from hfstrat import errors
from hfstrat.trainer.heartbeat import Heartbeat

NAMES = (f"hfa{os.getpid() % 10000}", f"hfb{os.getpid() % 10000}")
FIRST, SECOND = "10.77.0.1", "10.77.0.2"
SETTINGS = ["model.dtype=float32", "training.per_device_train_batch_size=2", "data.eval_size=13"]


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[str, str]]:
    """Two namespaces with addresses 10.77.0.1 and 10.77.0.2; skips where they cannot be created."""
    one, two = NAMES
    steps = [
        f"ip netns add {one}",
        f"ip netns add {two}",
        f"ip link add v{one} type veth peer name v{two}",
        f"ip link set v{one} netns {one}",
        f"ip link set v{two} netns {two}",
        f"ip -n {one} addr add {FIRST}/24 dev v{one}",
        f"ip -n {two} addr add {SECOND}/24 dev v{two}",
        f"ip -n {one} link set v{one} up",
        f"ip -n {two} link set v{two} up",
        f"ip -n {one} link set lo up",
        f"ip -n {two} link set lo up",
    ]
    try:
        for step in steps:
            try:
                done = subprocess.run(step.split(), capture_output=True, text=True, check=False)
            except FileNotFoundError:
                pytest.skip("needs the ip command")
            if done.returncode:
                pytest.skip(f"network namespaces are not permitted here: {step}: {done.stderr.strip()}")
        yield NAMES
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def start(host: str, rank: int, source: str, words: list[str], port: int, **environment: str) -> subprocess.Popen[str]:
    """`hfstrat train` on one of the hosts."""
    machines = [
        "--num-machines",
        "2",
        "--machine-rank",
        str(rank),
        "--main-process-ip",
        FIRST,
        "--main-process-port",
        str(port),
    ]
    command = ["ip", "netns", "exec", host, sys.executable, "-m", "hfstrat", "train", source, *words]
    return subprocess.Popen(
        [*command, "--accelerate-config", "cpu_ddp", "--num-processes", "2", *machines],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "GLOO_SOCKET_IFNAME": f"v{host}", "OMP_NUM_THREADS": "1", **environment},
    )


def ended(child: subprocess.Popen[str], seconds: float) -> str:
    try:
        out, err = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        kill(child)
        raise
    return out + (err or "")


def kill(child: subprocess.Popen[str]) -> None:
    """Kill everything that was started on the host."""
    if child.poll() is not None:
        return
    for process in below(child.pid):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    child.wait(10)


def below(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(entry.parent.name))
    found, queue = [], [pid]
    while queue:
        found.append(queue.pop())
        queue += children.get(found[-1], [])
    return found


@pytest.mark.slow
def test_a_run_on_two_hosts_resumes_after_one_is_killed(hosts: Any, recipe: Any, tmp_path: Path) -> None:
    one = recipe(*SETTINGS, "training.max_steps=40", f"output_dir={tmp_path / 'one'}")
    run(one)
    words = [*SETTINGS, "training.max_steps=40", f"output_dir={tmp_path / 'two'}"]
    caches = [{"HFSTRAT_CACHE": str(tmp_path / f"cache{rank}")} for rank in (0, 1)]  # each host has its own disk

    both = [start(host, rank, one.source, words, 29611, **caches[rank]) for rank, host in enumerate(hosts)]
    try:
        wait_for(lambda: any((tmp_path / "two").glob("checkpoint-*/hfstrat_complete.json")), 120)
        kill(both[1])
        began = time.monotonic()
        printed = ended(both[0], 60)
        assert time.monotonic() - began < 60
        assert both[0].returncode == errors.CRASH, printed
        assert "rank 1 on " in printed, printed
        assert "gone" in printed
    finally:
        for child in both:
            kill(child)
    both = [start(host, rank, one.source, words, 29612, **caches[rank]) for rank, host in enumerate(hosts)]
    printed = ended(both[0], 150)
    assert both[0].returncode == 0, printed
    assert ended(both[1], 30) is not None
    assert both[1].returncode == 0
    reports = [json.loads((tmp_path / name / "report.json").read_text())["result"] for name in ("one", "two")]
    assert reports[1]["resumed_from"]
    assert reports[1]["metrics_after"]["loss"] == pytest.approx(reports[0]["metrics_after"]["loss"], rel=1e-4)
    losses = [{entry["step"]: entry["loss"] for entry in report["losses"]} for report in reports]
    for step, loss in losses[1].items():
        assert loss == pytest.approx(losses[0][step], rel=1e-4), step
    ours, theirs = (load_file(tmp_path / name / "final" / "adapter_model.safetensors") for name in ("one", "two"))
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-2, atol=1e-3)


def wait_for(condition: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


class Store(dict[str, bytes]):
    """Acts as torch's TCPStore, in this process."""

    def set(self, key: str, value: str) -> None:
        if self.get("down"):
            raise RuntimeError("Connection refused")
        self[key] = value.encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)


def beats(monkeypatch: pytest.MonkeyPatch, silence: float) -> tuple[Store, list[Heartbeat], list[str]]:
    monkeypatch.setattr("hfstrat.trainer.heartbeat.BEAT", 0.02)
    monkeypatch.setattr("hfstrat.trainer.heartbeat.AFTER_ERROR", 0.2)
    store, told = Store(), list[str]()
    pair = [Heartbeat(store, rank, 2, silence) for rank in (0, 1)]
    for each in pair:
        monkeypatch.setattr(each, "_end", told.append)
        each.start()
    wait_for(lambda: all(each.seen for each in pair), 5)
    return store, pair, told


def test_a_rank_that_falls_silent_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _, pair, told = beats(monkeypatch, silence=0.3)
    assert pair[0].silent(0.2) == []
    pair[1].stop()
    wait_for(lambda: told, 5)
    pair[0].stop()
    assert told[0].startswith("rank 1 on ")
    assert "resumes from the last complete checkpoint" in told[0]


def test_a_broken_connection_is_explained_by_who_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    from hfstrat.trainer import heartbeat

    _, pair, told = beats(monkeypatch, silence=60)
    monkeypatch.setattr(heartbeat, "_heartbeat", pair[0])
    assert not isinstance(heartbeat.explain(ValueError("a mistake of ours")), heartbeat.ProcessLost)
    pair[1].stop()
    found = heartbeat.explain(RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:1234"))
    pair[0].stop()
    assert isinstance(found, heartbeat.ProcessLost)
    assert str(found).startswith("rank 1 on ")
    assert not told


def test_a_lost_rendezvous_names_the_machine_of_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    store, pair, told = beats(monkeypatch, silence=0.3)
    store["down"] = b"yes"
    wait_for(lambda: told, 5)
    for each in pair:
        each.stop()
    assert any("rank 0" in sentence for sentence in told)

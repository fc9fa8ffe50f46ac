"""The programs of `engines.programs`: `python -S engine_programs.py NAME ARGUMENT...`. State is in the folder $ENGINE.

sbatch starts a controller, which runs the script's body in its own session, sends it the signal of `#SBATCH --signal` when the
file `JOB.USR1` appears, kills it as if its node had failed when `JOB.NODE_FAIL` appears, and starts it again after a requeue.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

HOME = Path(os.environ.get("ENGINE", "."))


def load(job: str) -> dict:
    return json.loads((HOME / f"{job}.json").read_text())


def store(job: str, **values: object) -> None:
    file = HOME / f"{job}.json"
    new = json.dumps((load(job) if file.exists() else {}) | values)
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(new)
    partial.replace(file)


def sbatch(words: list[str]) -> int:
    script = Path(words[-1])
    options = dict(re.findall(r'(?m)^#SBATCH --([a-z-]+)(?:="?([^"\n]*)"?)?$', script.read_text()))
    if options.get("partition") == "nosuch":
        print("sbatch: error: invalid partition specified: nosuch", file=sys.stderr)
        return 1
    job = str(100 + len(list(HOME.glob("*.json"))))
    copy = HOME / f"{job}.sh"  # as Slurm does: a later change of the file has no effect
    copy.write_text(script.read_text())
    store(job, state="PENDING", options=options, restarts=0, code=0)
    command = [sys.executable, "-S", __file__, "controller", job]
    with open(HOME / f"{job}.controller", "wb") as log:  # not our own output, whose end sbatch's caller waits for
        subprocess.Popen(command, start_new_session=True, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    print(job if "--parsable" in words else f"Submitted batch job {job}")
    return 0


def controller(words: list[str]) -> int:
    job = words[0]
    options = load(job)["options"]
    nodes = options["nodes"]
    while True:
        restarts = load(job)["restarts"]
        environment = {
            "SLURM_JOB_ID": job,
            "SLURM_JOB_NODELIST": f"host[0-{int(nodes) - 1}]",
            "SLURM_NNODES": nodes,
            "SLURM_RESTART_COUNT": str(restarts),
        }
        if not restarts:
            del environment["SLURM_RESTART_COUNT"]  # Slurm sets it only after a restart
        store(job, state="RUNNING")
        with open(options["output"].replace("%j", job), "ab") as log:
            child = subprocess.Popen(
                ["bash", str(HOME / f"{job}.sh")],
                stdout=log,
                stderr=log,
                cwd=options["chdir"],
                start_new_session=True,
                env={**os.environ, **environment},
            )
            failed, requeued = watch(job, child, options)
        if "requeue" in options and (failed or requeued):
            store(job, restarts=restarts + 1, state="PENDING")
            continue
        code = child.returncode
        cancelled = (HOME / f"{job}.CANCELLED").exists()
        state = "CANCELLED" if cancelled else "NODE_FAIL" if failed else "COMPLETED" if code == 0 else "FAILED"
        store(job, state=state, code=max(code, 0))
        return 0


def watch(job: str, child: subprocess.Popen, options: dict) -> tuple[bool, bool]:
    """Wait for a session; returns whether its node failed, and whether it asked to be requeued."""
    marks = {name: HOME / f"{job}.{name}" for name in ("USR1", "NODE_FAIL", "REQUEUE", "CANCEL")}
    failed = False
    while child.poll() is None:
        if marks["USR1"].exists():
            marks["USR1"].unlink()
            assert options["signal"].startswith("B:USR1@"), options["signal"]
            os.kill(child.pid, signal.SIGUSR1)
        if marks["NODE_FAIL"].exists():
            marks["NODE_FAIL"].unlink()
            failed = True
            os.killpg(child.pid, signal.SIGKILL)
        if marks["CANCEL"].exists():
            marks["CANCEL"].rename(HOME / f"{job}.CANCELLED")
            os.killpg(child.pid, signal.SIGTERM)
        time.sleep(0.02)
    requeued = marks["REQUEUE"].exists()
    marks["REQUEUE"].unlink(missing_ok=True)
    return failed, requeued


def squeue(words: list[str]) -> int:
    job = words[words.index("-j") + 1]
    if not (HOME / f"{job}.json").exists():
        print("slurm_load_jobs error: Invalid job id specified", file=sys.stderr)
        return 1
    state = load(job)["state"]
    if state in ("PENDING", "RUNNING"):
        print(state)
    return 0


def sacct(words: list[str]) -> int:
    found = load(words[words.index("-j") + 1])
    state = "CANCELLED by 1000" if found["state"] == "CANCELLED" else found["state"]
    print(f"{state}|{found['code']}:0")
    return 0


def scontrol(words: list[str]) -> int:
    if words[0] == "requeue":
        (HOME / f"{words[1]}.REQUEUE").touch()
        return 0
    if words[:2] == ["show", "hostnames"]:
        first, last = re.findall(r"\d+", words[2])
        print("127.0.0.1")
        for number in range(int(first) + 1, int(last) + 1):
            print(f"host{number}")
        return 0
    found = load(words[2])
    print(f"JobId={words[2]} JobState={found['state']} Reason=None\n   Restarts=0 ExitCode={found['code']}:0")
    return 0


def scancel(words: list[str]) -> int:
    (HOME / f"{words[0]}.CANCEL").touch()
    return 0


def srun(words: list[str]) -> int:
    """One process for each node, which get the signals that srun gets; the highest exit code."""
    command = words[next(place for place, word in enumerate(words) if not word.startswith("-")) :]
    tasks = []
    signal.signal(signal.SIGTERM, lambda number, frame: [task.send_signal(number) for task in tasks])
    for node in range(int(os.environ["SLURM_NNODES"])):
        tasks.append(subprocess.Popen(command, env={**os.environ, "SLURM_NODEID": str(node), "SLURM_PROCID": str(node)}))
    codes = [task.wait() for task in tasks]
    return max(code if code >= 0 else 128 - code for code in codes)


def sky(words: list[str]) -> int:
    """Run a task here and now, with /hfstrat-store and ~ in folders of their own, and keep its log."""
    managed = words[0] == "jobs"
    command = words[1] if managed else words[0]
    name = words[words.index("--name" if managed else "--cluster") + 1] if "launch" in command else words[-1]
    log = HOME / f"{name}.log"
    if command == "logs":
        if "--status" in words:
            return 0 if log.exists() else 102
        print(log.read_text(), end="")
        return 0 if (HOME / f"{name}.code").read_text() == "0" else 100
    if command == "queue":
        print("ID  TASK  NAME  STATUS\nNo in-progress managed jobs.")
        return 0
    sys.path[:0] = json.loads(os.environ["ENGINE_PATHS"])
    import yaml

    task = yaml.safe_load(Path(words[-1]).read_text())
    for place, source in task.get("file_mounts", {}).items():
        if isinstance(source, str):
            there = HOME / "home" / place.removeprefix("~/")
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(source, there, dirs_exist_ok=True) if Path(source).is_dir() else shutil.copy(source, there)
    activate = HOME / "home" / "hfstrat" / "venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True, exist_ok=True)
    activate.touch()
    environment = {**os.environ, "HOME": str(HOME / "home"), "SKYPILOT_TASK_ID": "task-1"}
    environment |= {"SKYPILOT_NODE_RANK": "0", "SKYPILOT_NODE_IPS": "127.0.0.1", "SKYPILOT_NUM_NODES": str(task["num_nodes"])}
    environment |= {words[n + 1]: os.environ[words[n + 1]] for n, word in enumerate(words) if word == "--secret"}
    body = task["run"].replace("/hfstrat-store", str(HOME / "bucket"))
    attempts = 1 + task["resources"].get("job_recovery", {}).get("max_restarts_on_errors", 0)
    for attempt in range(attempts):
        if attempt:  # another machine
            shutil.rmtree(HOME / "home" / "hfstrat" / "runs", ignore_errors=True)
        with log.open("a") as file:
            code = subprocess.run(["bash", "-c", body], stdout=file, stderr=file, env=environment, check=False).returncode
        if code == 0:
            break
    (HOME / f"{name}.code").write_text(str(code))
    return 0


def rsync(words: list[str]) -> int:
    shutil.copytree(HOME / "home" / words[-2].partition(":")[2], words[-1], dirs_exist_ok=True)
    return 0


def aws(words: list[str]) -> int:
    assert words[:2] == ["s3", "sync"], words
    shutil.copytree(HOME / "bucket" / words[2].split("/", 3)[3], words[3], dirs_exist_ok=True)
    return 0


def uv(words: list[str]) -> int:
    """`uv run --with PACKAGE COMMAND...` without installing anything."""
    assert words[:2] == ["run", "--with"], words
    os.execvp(words[3], words[3:])


if __name__ == "__main__":
    sys.exit(globals()[sys.argv[1]](sys.argv[2:]))

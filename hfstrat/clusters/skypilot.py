"""SkyPilot: a task on any cloud or Kubernetes. With a bucket or a shared volume it is a managed job, which recovers."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any, ClassVar

import yaml

from hfstrat.clusters import package, paths, remote
from hfstrat.clusters.engine import Engine, Plan, Submitted, ask, need, now
from hfstrat.clusters.hf_jobs import TOKEN, token_here
from hfstrat.clusters.job import SKYPILOT, Job, Options
from hfstrat.errors import CRASH, OK, UserError, first_line

MOUNT = "/hfstrat-store"
WORK = "~/hfstrat"
IDLE_MINUTES = 30  # a cluster stops by itself after this time without a job; its disk, with the result, is kept
FETCH = {  # what copies a folder of a bucket to this machine
    "s3": ["aws", "s3", "sync"],
    "gs": ["gcloud", "storage", "rsync", "--recursive"],
}
RENDEZVOUS = """\
NODE=$SKYPILOT_NODE_RANK
HOST0=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)
PORT=29500
"""
SETUP = """\
python3 -m pip install --quiet uv
python3 -m uv venv --quiet --allow-existing --python 3.12 ~/hfstrat/venv
python3 -m uv pip install --quiet --python ~/hfstrat/venv/bin/python {packages}
"""


class _Text(yaml.SafeDumper):
    """Writes texts of several lines as blocks."""


def _block(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Text.add_representer(str, _block)


class SkyPilot(Engine):
    name: ClassVar[str] = SKYPILOT

    @staticmethod
    def default_gpus(options: Options) -> int:
        return 1 if options.gpus is None else options.gpus

    @staticmethod
    def priced_as(options: Options) -> list[str]:
        return [options.infra] if options.infra else []

    @staticmethod
    def gpu_of(options: Options) -> str | None:
        return options.gpu_type

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        options = job.options
        if job.gpus and not options.gpu_type:
            raise UserError("--gpu-type: missing; the GPU that SkyPilot looks for, such as A100 (`sky gpus list` shows them)")
        if options.gpu_type and not job.gpus:
            raise UserError(f"--gpu-type: {options.gpu_type}, and --gpus is 0; remove one of the two")
        self.shared = job.is_mounted(str(job.output_dir))
        if job.nodes > 1 and not self.shared:
            raise UserError(
                f"--nodes: {job.nodes} machines need an output_dir that all of them share; mount a volume to which many "
                f"machines may write (--volume my-volume:/shared) and set output_dir=/shared/{job.name}"
            )
        if options.storage is not None and self.shared:
            raise UserError("--storage: output_dir is on a --volume already, which is kept; remove --storage")
        if options.storage is not None and not re.fullmatch(r"(s3|gs|r2|nebius|oci|azure|hf)://[\w./-]+", options.storage):
            raise UserError(f"--storage: {options.storage}: expected a bucket such as s3://my-bucket or gs://my-bucket")
        if options.spot and not self.is_managed:
            raise UserError("--spot: a machine that is taken away loses its checkpoints; give --storage s3://my-bucket too")

    @property
    def is_managed(self) -> bool:
        """Whether the job outlives its machines: what it keeps is in a bucket or on a volume."""
        return self.job.options.storage is not None or self.shared

    @property
    def restarts(self) -> int:
        return self.job.options.max_restarts if self.is_managed else 0

    def plan(self) -> Plan:
        job = self.job
        found, specs = remote.local_places(job), self._specs()
        names = paths.remote_names(found)
        uploads = {names[each.value].split("/")[1]: paths.glob_root(each.path) for each in found}
        uploads |= {wheel.name: wheel for wheel in package.local(specs).values()}
        file = job.folder / "task.yaml"
        logs = f"sky jobs logs --name {job.name}" if self.is_managed else f"sky logs {job.name}"
        notes = [*(f"installs {spec}" for spec in specs), *remote.notes_on_files(job, found)]
        if not self.is_managed:
            notes.append(
                f"the cluster {job.name} stops after {IDLE_MINUTES} idle minutes and keeps its disk; `sky down {job.name}` "
                "removes it. Without --storage the job does not restart by itself"
            )
        return Plan(
            files={file: self._text(names, uploads, specs)},
            command=shlex.join(self._command(file)),
            follow=logs,
            cancel=f"sky jobs cancel --yes --name {job.name}" if self.is_managed else f"sky down --yes {job.name}",
            result=self._result(),
            notes=notes,
            uploads=uploads,
        )

    def _specs(self) -> list[str]:
        return [] if self.job.options.container and not self.job.options.package else package.specs(self.job)

    def _result(self) -> str:
        job = self.job
        if self.shared:
            return f"{job.output_dir} on the volume"
        if job.options.storage:
            return f"{job.options.storage.rstrip('/')}/{job.name}/run, fetched to {job.output_dir}"
        return f"{job.name}:{WORK}/{remote.output_dir(job)}, fetched to {job.output_dir}"

    def _command(self, file: Path) -> list[str]:
        job = self.job
        secrets = [word for name in self._secrets() for word in ("--secret", name)]
        if self.is_managed:
            return ["sky", "jobs", "launch", "--yes", "--detach-run", "--name", job.name, *secrets, str(file)]
        stop = ["--idle-minutes-to-autostop", str(IDLE_MINUTES)]
        return ["sky", "launch", "--yes", "--detach-run", "--cluster", job.name, *stop, *secrets, str(file)]

    def _secrets(self) -> dict[str, str]:
        """Their values are passed through the environment: SkyPilot reads them by name."""
        token = token_here()
        return ({TOKEN: token} if token else {}) | self.job.secrets

    def _text(self, names: dict[str, str], uploads: dict[str, Path], specs: list[str]) -> str:
        job = self.job
        mounts: dict[str, Any] = {f"{WORK}/files/{name}": str(source.absolute()) for name, source in uploads.items()}
        if job.options.storage:
            mounts[MOUNT] = {"source": job.options.storage, "mode": "MOUNT"}
        task: dict[str, Any] = {"name": job.name, "num_nodes": job.nodes, "resources": self._resources()}
        if mounts:
            task["file_mounts"] = mounts
        if job.mounts:
            task["volumes"] = {mount: _source(volume, mount) for volume, mount in job.mounts.items()}
        if specs:
            there = {spec: f"{WORK}/files/{path.name}" for spec, path in package.local(specs).items()}
            packages = " ".join(there.get(spec) or shlex.quote(spec) for spec in specs)
            task["setup"] = SETUP.format(packages=packages)
        task["run"] = self._script(names, bool(specs))
        text = yaml.dump(task, Dumper=_Text, sort_keys=False, allow_unicode=True, width=1000)
        return f"# written by hfstrat launch; submit it with: {shlex.join(self._command(job.folder / 'task.yaml'))}\n{text}"

    def _resources(self) -> dict[str, Any]:
        job, options = self.job, self.job.options
        found: dict[str, Any] = {}
        if options.infra:
            found["infra"] = options.infra
        if job.gpus:
            found["accelerators"] = f"{options.gpu_type}:{job.gpus}"
        if options.cpus:
            found["cpus"] = f"{options.cpus}+"
        if options.container:
            found["image_id"] = f"docker:{options.container.removeprefix('docker:')}"
        if self.is_managed:
            found["use_spot"] = options.spot
            # not `recover_on_exit_codes`: those restarts are not counted
            found["job_recovery"] = {"max_restarts_on_errors": options.max_restarts}
        return found

    def _script(self, names: dict[str, str], installed: bool) -> str:
        job = self.job
        store = f"{MOUNT}/{job.name}" if job.options.storage else None
        lines = (". ~/hfstrat/venv/bin/activate",) if installed else ()
        rank = RENDEZVOUS if job.nodes > 1 else ""
        launch = "$SKYPILOT_TASK_ID"  # the same for all attempts of a managed job
        return remote.text(job, names, work=WORK, store=store, launch=launch, is_kept=self.shared, lines=lines, rank=rank)

    def check(self) -> None:
        need("sky", "pip install 'skypilot[aws]' (or another cloud) and `sky check`")

    def submit(self, plan: Plan) -> Submitted:
        ask(self._command(next(iter(plan.files))), env={**os.environ, **self._secrets()})
        return Submitted(self.name, self.job.name, self.job.name, now())

    def is_active(self, submitted: Submitted) -> bool:
        return _in_queue(submitted) if self.is_managed else _on_a_cluster(submitted)

    @staticmethod
    def waits_or_runs(submitted: Submitted) -> bool | None:
        if shutil.which("sky") is None:
            return None
        try:
            return _on_a_cluster(submitted) or _in_queue(submitted)
        except UserError:
            return None

    def follow(self, submitted: Submitted) -> int:
        words = ["jobs", "logs", "--name", submitted.id] if self.is_managed else ["logs", submitted.id]
        code = subprocess.run(["sky", *words], check=False).returncode
        print(f"job       {submitted.id} ended with code {code} of `sky logs`", flush=True)
        return OK if code == OK else CRASH

    def fetch(self, submitted: Submitted) -> Path:
        job, folder = self.job, self.job.output_dir
        if self.shared:
            raise UserError(
                f"output_dir: {folder} is on the volume {', '.join(job.mounts)}; read it from a machine that mounts it"
            )
        folder.mkdir(parents=True, exist_ok=True)
        if job.options.storage is None:
            source = f"{submitted.id}:hfstrat/{remote.output_dir(job)}/"
            ask(["rsync", "--archive", source, f"{folder}/"])
        else:
            self._fetch_from_bucket(f"{job.options.storage.rstrip('/')}/{job.name}/run", folder)
        if not (folder / "report.json").is_file():
            raise UserError(f"{folder}: no result yet (no report.json); checkpoints, if any, are there")
        return folder

    def _fetch_from_bucket(self, source: str, folder: Path) -> None:
        scheme = source.partition("://")[0]
        if scheme == "hf":
            from huggingface_hub import HfApi

            try:
                HfApi().sync_bucket(source, str(folder), quiet=True)
            except (OSError, RuntimeError, ValueError) as error:
                raise UserError(f"{source}: not fetched: {first_line(error)}") from None
            return
        if scheme not in FETCH:
            raise UserError(f"{source}: hfstrat fetches from {', '.join(FETCH)} and hf; copy this folder to {folder} yourself")
        need(FETCH[scheme][0], f"it copies {source} to {folder}")
        ask([*FETCH[scheme], source, str(folder)])


def _source(volume: str, mount: str) -> str:
    return volume[: volume.rindex(f":{mount}")]


def _on_a_cluster(submitted: Submitted) -> bool:
    """Whether a job that is not managed waits or runs on its machines."""
    done = subprocess.run(["sky", "logs", "--status", submitted.id], capture_output=True, text=True, check=False)
    return done.returncode == 101  # the job has not finished


def _in_queue(submitted: Submitted) -> bool:
    """Whether a managed job waits or runs."""
    queue = ask(["sky", "jobs", "queue", "--skip-finished"])
    return re.search(rf"(?m)(^|\s){re.escape(submitted.name)}(\s|$)", queue) is not None

"""Hugging Face Jobs: one container on a flavor of hardware, with a bucket that outlives it."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from hfstrat.clusters import package, paths, remote
from hfstrat.clusters.engine import Engine, Plan, Submitted, now
from hfstrat.clusters.job import HF_JOBS, Job, Options
from hfstrat.errors import CRASH, OK, RunError, UserError, first_line

BUCKET = "hfstrat-runs"  # of the namespace, unless --storage names another one
MOUNT, WORK = "/hfstrat-store", "/tmp/hfstrat"
GPUS = {  # the beginning of a flavor: the device of `hfstrat advise`
    "t4": "t4",
    "l40s": "l40s",
    "l4": "l4",
    "a10g": "a10",
    "a100": "a100",
    "h200": "h200",
    "h100": "h100",
}
POLL = 5.0
SCRIPT = "HFSTRAT_JOB"  # the variable that holds the script: a job has no files of its own
TOKEN = "HF_TOKEN"

Result = TypeVar("Result")


class HfJobs(Engine):
    name: ClassVar[str] = HF_JOBS

    @staticmethod
    def default_gpus(options: Options) -> int:
        flavor = flavor_of(options)
        gpus = gpus_of(flavor)
        if options.gpus is not None and options.gpus != gpus:
            raise UserError(f"--gpus: {options.gpus}; flavor {flavor} has {gpus}; remove --gpus, or choose another --flavor")
        return gpus

    @staticmethod
    def priced_as(options: Options) -> list[str]:
        return [flavor_of(options)]

    @staticmethod
    def gpu_of(options: Options) -> str | None:
        flavor = flavor_of(options)
        return next((device for start, device in GPUS.items() if flavor.startswith(start)), None)

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        if job.nodes > 1:
            raise UserError(
                f"--nodes: {job.nodes}; a job of Hugging Face is one machine, since several would need a shared output_dir; "
                "choose a flavor with more GPUs, such as h200x8, or --on slurm"
            )
        if job.limit is None:
            raise UserError("--time: missing; Hugging Face ends a job after its time, so give one, such as 2h")
        self.bucket = job.options.storage or BUCKET
        if not re.fullmatch(r"(hf://buckets/)?([\w.-]+/)?[\w.-]+", self.bucket):
            raise UserError(f"--storage: {self.bucket}: expected a bucket of the Hub, such as me/hfstrat-runs")
        self.bucket = self.bucket.removeprefix("hf://buckets/")
        self.volumes = [_volume(each) for each in job.mounts]

    def plan(self) -> Plan:
        job = self.job
        found, specs = remote.local_places(job), self._specs()
        names = paths.remote_names(found)
        uploads = {names[each.value].split("/")[1]: paths.glob_root(each.path) for each in found}
        wheels = package.local(specs)
        uploads |= {wheel.name: wheel for wheel in wheels.values()}
        if uploads and not job.options.upload:
            first = found[0] if found else None
            key, value = (first.key, first.value) if first else ("--package", str(next(iter(wheels.values()))))
            more = f", and {len(uploads) - 1} more" if len(uploads) > 1 else ""
            raise UserError(
                f"{key}: {value}: only on this machine{more}; give --upload to copy it to your private bucket, or name a "
                "repository of the Hub"
            )
        body = self._script(names, "LAUNCH")
        folder = job.folder
        return Plan(
            files={folder / "job.sh": body},
            command=self._line(specs),
            follow="hf jobs logs --follow {id}",
            cancel="hf jobs cancel {id}",
            result=f"hf://buckets/{self.bucket}/{job.name}/run, fetched to {job.output_dir}",
            notes=[*self._notes(specs), *remote.notes_on_files(job, found)],
            uploads=uploads,
        )

    def _specs(self) -> list[str]:
        """Packages to install; none for a container that has hfstrat."""
        return [] if self.job.options.container and not self.job.options.package else package.specs(self.job)

    def _script(self, names: dict[str, str], launch: str) -> str:
        store = f"{MOUNT}/{self.job.name}"
        lines = (f"ln -sfn {store}/files files",) if names else ()
        return remote.text(self.job, names, work=WORK, store=store, launch=launch, lines=lines)

    def _notes(self, specs: list[str]) -> list[str]:
        notes = [f"installs {spec}" for spec in specs]
        if self.job.options.container and specs:
            notes.append(f"{self.job.options.container} must contain uv, which installs them")
        if self.job.loaded.recipe.hub.push_to_hub:
            notes.append(f"the job pushes its result to {self.job.loaded.recipe.hub.repo_id} too (hub.push_to_hub)")
        return notes

    def _arguments(self, specs: list[str]) -> dict[str, Any]:
        """What `run_uv_job` and `run_job` share, without secrets and volumes."""
        options = self.job.options
        return {
            "image": options.container,
            "flavor": flavor_of(options),
            "timeout": int(self.job.limit or 0),
            "attempts": options.max_restarts + 1,
            "name": self.job.name,
            "namespace": options.namespace,
        }

    def _line(self, specs: list[str]) -> str:
        """The call, to read."""
        shown = {key: value for key, value in self._arguments(specs).items() if value is not None}
        secrets = [TOKEN, *self.job.secrets]
        shown |= {"dependencies": specs} if specs else {}
        volumes = [f"hf://buckets/{self.bucket}:{MOUNT}", *self.job.mounts]
        words = ", ".join(f"{key}={value!r}" for key, value in shown.items())
        call = "run_uv_job('bash', script_args=['-c', ...]" if specs else "run_job(command=['bash', '-c', ...]"
        return f"huggingface_hub.{call}, {words}, volumes={volumes}, secrets={secrets} (values are not shown))"

    def check(self) -> None:
        from huggingface_hub import constants, get_token

        if constants.HF_HUB_OFFLINE:
            raise UserError("--on hf-jobs: HF_HUB_OFFLINE is set; unset it, or look at the job with --dry-run")
        if get_token() is None:
            raise UserError("--on hf-jobs: no token of the Hub on this machine; log in with `hf auth login`")
        offered = {each.name: each for each in _asked(lambda api: api.list_jobs_hardware())}
        flavor = flavor_of(self.job.options)
        if flavor not in offered:
            raise UserError(f"--flavor: {flavor}: the Hub offers {', '.join(offered) or 'none'}")
        accelerator = offered[flavor].accelerator
        gpus = int(accelerator.quantity) if accelerator else 0
        if gpus != self.job.gpus:
            raise UserError(f"--gpus: {self.job.gpus}; the Hub offers flavor {flavor} with {gpus}; give --gpus {gpus}")

    def submit(self, plan: Plan) -> Submitted:
        from huggingface_hub import Volume, get_token

        namespace = self.job.options.namespace or str(_asked(lambda api: api.whoami())["name"])
        bucket = self.bucket if "/" in self.bucket else f"{namespace}/{self.bucket}"
        _asked(lambda api: api.create_bucket(bucket, private=True, exist_ok=True))
        if not _asked(lambda api: api.bucket_info(bucket)).private:
            raise UserError(f"--storage: {bucket} is public, and the job would write its checkpoints there; name a private one")
        self._upload(plan, bucket)
        specs = self._specs()
        names = paths.remote_names(remote.local_places(self.job))
        body = self._script(names, time.strftime("%Y%m%d-%H%M%S"))
        volumes = [Volume(type="bucket", source=bucket, mount_path=MOUNT, read_only=False), *self.volumes]
        arguments = self._arguments(specs) | {
            "env": {SCRIPT: body},
            "secrets": {TOKEN: get_token(), **self.job.secrets},
            "volumes": volumes,
            "namespace": namespace,
        }
        run = ["bash", "-c", f'eval "${SCRIPT}"']
        if specs:
            there = {spec: f"{MOUNT}/{self.job.name}/files/{path.name}" for spec, path in package.local(specs).items()}
            packages = [there.get(spec, spec) for spec in specs]
            job = _asked(lambda api: api.run_uv_job(run[0], script_args=run[1:], dependencies=packages, **arguments))
        else:
            job = _asked(lambda api: api.run_job(command=run, **arguments))
        return Submitted(self.name, f"{namespace}/{job.id}", self.job.name, now(), job.url)

    def _upload(self, plan: Plan, bucket: str) -> None:
        """Copy local files to the bucket; of folders only what has changed."""
        from huggingface_hub import HfApi

        for name, source in plan.uploads.items():
            there = f"{self.job.name}/files/{name}"
            print(f"upload    {source} to hf://buckets/{bucket}/{there}", flush=True)
            if source.is_dir():
                _asked(partial(HfApi.sync_bucket, source=str(source), dest=f"hf://buckets/{bucket}/{there}", quiet=True))
            else:
                _asked(partial(HfApi.batch_bucket_files, bucket_id=bucket, add=[(source, there)]))

    @staticmethod
    def waits_or_runs(submitted: Submitted) -> bool | None:
        namespace, _, job = submitted.id.partition("/")
        try:
            found = _asked(lambda api: api.inspect_job(job_id=job, namespace=namespace))
        except (UserError, RunError):
            return None
        return str(found.status.stage) not in _terminal()

    def is_active(self, submitted: Submitted) -> bool:
        return str(self._look(submitted).status.stage) not in _terminal()

    def _look(self, submitted: Submitted) -> Any:
        namespace, _, job = submitted.id.partition("/")
        return _asked(lambda api: api.inspect_job(job_id=job, namespace=namespace))

    def follow(self, submitted: Submitted) -> int:
        namespace, _, number = submitted.id.partition("/")

        def show(api: Any) -> None:
            for line in api.fetch_job_logs(job_id=number, namespace=namespace, follow=True):
                print(line, flush=True)

        _asked(show)
        while self.is_active(submitted):  # the log may end before the job does
            time.sleep(POLL)
        status = self._look(submitted).status
        print(f"job       {submitted.id} ended: {status.stage}{f': {status.message}' if status.message else ''}", flush=True)
        return OK if status.stage == "COMPLETED" else CRASH

    def fetch(self, submitted: Submitted) -> Path:
        namespace = submitted.id.partition("/")[0]
        bucket = self.bucket if "/" in self.bucket else f"{namespace}/{self.bucket}"
        folder = self.job.output_dir
        source = f"hf://buckets/{bucket}/{self.job.name}/run"
        folder.mkdir(parents=True, exist_ok=True)
        _asked(lambda api: api.sync_bucket(source, str(folder), quiet=True))
        if not (folder / "report.json").is_file():
            raise UserError(f"{source}: no result yet (no report.json); checkpoints, if any, are in {folder}")
        return folder


def _asked(call: Callable[[Any], Result]) -> Result:
    """What the Hub answers. Raises UserError for its refusals, RunError where it cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return call(HfApi())
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        kind = UserError if 400 <= status < 500 else RunError
        raise kind(f"--on hf-jobs: the Hub refused ({status}): {error.server_message or first_line(error)}") from None
    except (OSError, RuntimeError, ValueError) as error:
        raise RunError(f"--on hf-jobs: the Hub could not be reached: {first_line(error)}; nothing more was done") from None


def flavor_of(options: Options) -> str:
    """The hardware. Raises UserError where it is missing or unknown to the installed huggingface_hub."""
    from huggingface_hub import JobHardware

    known = [each.value for each in JobHardware]
    if not options.flavor:
        raise UserError(f"--flavor: missing; the hardware of the job, one of {', '.join(known)}")
    if options.flavor not in known:
        near = get_close_matches(options.flavor, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"--flavor: {options.flavor}: unknown to the installed huggingface_hub; {hint}expected one of {', '.join(known)}"
        )
    return options.flavor


def gpus_of(flavor: str) -> int:
    """The GPUs of a flavor by its name: `l4x4` has 4, `a100-large` one, `cpu-xl` none."""
    if flavor.startswith("cpu"):
        return 0
    found = re.search(r"x(\d+)$", flavor)
    return int(found[1]) if found else 1


def _volume(text: str) -> Any:
    """A volume as the Hub writes it. Raises UserError."""
    from huggingface_hub import Volume
    from huggingface_hub.utils import parse_hf_mount

    try:
        found = parse_hf_mount(text)
    except ValueError as error:
        raise UserError(f"--volume: {text}: {first_line(error)}; expected such as hf://buckets/me/data:/data") from None
    if found.mount_path.rstrip("/") == MOUNT:
        raise UserError(f"--volume: {MOUNT} is where hfstrat keeps checkpoints; mount at another path")
    source = found.source
    path = source.path_in_repo or None
    return Volume(
        type=source.type,
        source=source.id,
        mount_path=found.mount_path,
        revision=source.revision,
        read_only=found.read_only,
        path=path,
    )


def _terminal() -> tuple[str, ...]:
    from huggingface_hub._jobs_api import TERMINAL_JOB_STAGES

    return tuple(stage.value for stage in TERMINAL_JOB_STAGES)


def token_here() -> str | None:
    """The token of this machine."""
    from huggingface_hub import get_token

    return os.environ.get(TOKEN) or get_token()

"""A job: the options of `hfstrat launch`, checked, and the recipe that it trains."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path

from hfstrat.errors import UserError
from hfstrat.publish.scrub import SECRETS
from hfstrat.recipe import library
from hfstrat.recipe.load import Loaded, located
from hfstrat.recipe.section import seconds
from hfstrat.run import launch
from hfstrat.trainer import distributed
from hfstrat.trainer.plan import sequences_per_process

SLURM, HF_JOBS, SKYPILOT = "slurm", "hf-jobs", "skypilot"
READ_BY = {  # options that not every engine reads
    "partition": (SLURM,),
    "account": (SLURM,),
    "sbatch": (SLURM,),
    "module": (SLURM,),
    "venv": (SLURM,),
    "flavor": (HF_JOBS,),
    "namespace": (HF_JOBS,),
    "upload": (HF_JOBS,),
    "storage": (HF_JOBS, SKYPILOT),
    "package": (HF_JOBS, SKYPILOT),
    "infra": (SKYPILOT,),
    "spot": (SKYPILOT,),
    "gpu_type": (SLURM, SKYPILOT),
    "cpus": (SLURM, SKYPILOT),
}
MOST_NODES, MOST_GPUS, MOST_RESTARTS = 1024, 16, 1000
LONGEST_NAME = 40
LEAST_TIME, MOST_TIME = 60.0, 366 * 86400.0
SECRET_NAME = re.compile(  # not TOKENIZERS_PARALLELISM
    r"(^|_)(TOKENS?|SECRETS?|PASSWORD|PASSWD|CREDENTIALS?|(API|ACCESS|PRIVATE)?KEY)(_|$)", re.IGNORECASE
)
SECRET_SET = re.compile(r"\b(\w+)=(?![$`]|[\"'][$`])[\"']?\S")  # a variable and its value, if that is not computed
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Options:
    """The options of the command line, as given; see its help."""

    nodes: int = 1
    gpus: int | None = None
    gpu_type: str | None = None
    time: str | None = None
    name: str | None = None
    accelerate_config: str | None = None
    max_restarts: int = 10
    cpus: int | None = None
    env: tuple[str, ...] = ()
    secret: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    container: str | None = None
    volume: tuple[str, ...] = ()
    package: tuple[str, ...] = ()
    partition: str | None = None
    account: str | None = None
    sbatch: tuple[str, ...] = ()
    module: tuple[str, ...] = ()
    venv: str | None = None
    flavor: str | None = None
    namespace: str | None = None
    storage: str | None = None
    upload: bool = False
    infra: str | None = None
    spot: bool = False


@dataclass(frozen=True)
class Job:
    """What an engine submits.

    overrides: of the recipe, as given on the command line.
    limit: seconds of one session; None: as the engine decides.
    config: name or path of an Accelerate config; None: one process.
    secrets: environment variables whose values are neither written nor printed.
    mounts: folder on the remote machine of each volume, by its source.
    """

    loaded: Loaded
    overrides: tuple[str, ...]
    options: Options
    name: str
    nodes: int
    gpus: int
    limit: float | None
    config: str | None
    env: dict[str, str]
    secrets: dict[str, str] = field(repr=False)
    mounts: dict[str, str] = field(default_factory=dict)

    @property
    def processes(self) -> int:
        """On all machines: one for each GPU, or one for each machine without GPUs."""
        return self.nodes * max(1, self.gpus)

    @property
    def output_dir(self) -> Path:
        return Path(self.loaded.recipe.output_dir).expanduser()

    @property
    def folder(self) -> Path:
        """Files of the launch, beside output_dir: that one holds only what a run writes."""
        beside = Path("runs") / self.name if self.is_mounted(str(self.output_dir)) else self.output_dir
        return beside.with_name(f"{beside.name}.launch")

    def is_mounted(self, path: str) -> bool:
        """Whether a path is on a volume, so that it need not exist here."""
        return any(Path(path).is_relative_to(mount) for mount in self.mounts.values())


def make(engine: str, loaded: Loaded, overrides: tuple[str, ...], options: Options, gpus: int) -> Job:
    """Check the options that all engines share.

    Args:
        gpus: of one machine; the engine knows the default.

    Raises:
        UserError: the first wrong option; the message begins with its name.
    """
    check_read(engine, options)
    _between("--nodes", options.nodes, 1, MOST_NODES)
    _between("--gpus", gpus, 0, MOST_GPUS)
    _between("--max-restarts", options.max_restarts, 0, MOST_RESTARTS)
    if options.cpus is not None:
        _between("--cpus", options.cpus, 1, 1024)
    limit = None if options.time is None else parse_time(options.time)
    name = options.name or default_name(loaded.recipe.output_dir, engine in READ_BY["storage"])
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", name):
        raise UserError(f"--name: {name}: expected lower-case letters, digits and dashes, at most 40, beginning with a letter")
    config, _ = config_of(options.accelerate_config, options.nodes, gpus)
    job = Job(
        loaded=loaded,
        overrides=overrides,
        options=options,
        name=name,
        nodes=options.nodes,
        gpus=gpus,
        limit=limit,
        config=config,
        env=_environment(options.env),
        secrets=_secrets(options.secret),
        mounts=_mounts(options.volume),
    )
    _check_text(job)
    if job.processes > 1 and loaded.recipe.training.global_batch_tokens is None:
        with located(loaded):
            sequences_per_process(loaded.recipe.training.global_batch_size, job.processes)
    return job


def check_read(engine: str, options: Options) -> None:
    """Refuse options that this engine would not read. Raises UserError."""
    for each in fields(options):
        readers = READ_BY.get(each.name)
        if readers and engine not in readers and getattr(options, each.name) != each.default:
            option = each.name.replace("_", "-")
            raise UserError(f"--{option}: not read with --on {engine}, only with {' or '.join(readers)}; remove it")


def _between(option: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise UserError(f"{option}: {value}; expected a number from {least} to {most}")


def parse_time(text: str) -> float:
    """The seconds of '2h', '90min', or of Slurm's 'HH:MM:SS' and 'D-HH:MM:SS'. Raises UserError."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)", text.strip())
    try:
        if match:
            days, hours, minutes, rest = (int(part or 0) for part in match.groups())
            found = float(days * 86400 + hours * 3600 + minutes * 60 + rest)
        else:
            found = seconds(text)
    except ValueError:
        raise UserError(f"--time: {text}: expected a time such as 90min, 2h, 12:00:00 or 1-12:00:00") from None
    if not LEAST_TIME <= found <= MOST_TIME:
        raise UserError(f"--time: {text} is {found:,.0f} s; expected between one minute and a year")
    return found


def default_name(output_dir: str, shared: bool) -> str:
    """A name for the job from output_dir, another one for each.

    Args:
        shared: whether jobs of one name share a folder, as in a bucket: then projects with the same `runs/chat` get two names.
    """
    words = re.sub(r"[^a-z0-9]+", "-", Path(output_dir).expanduser().name.lower()).strip("-")
    name = f"hfstrat-{words}"
    if not shared and len(name) <= LONGEST_NAME and Path(output_dir) == Path("runs", words):
        return name
    place = Path(output_dir).expanduser().absolute() if shared else Path(output_dir)
    number = hashlib.sha256(str(place).encode()).hexdigest()[:6]
    return f"{name[: LONGEST_NAME - 7].rstrip('-')}-{number}"


def config_of(name: str | None, nodes: int, gpus: int) -> tuple[str | None, str]:
    """The Accelerate config of a job and how its processes share the model; the config is None for one process.

    Raises:
        UserError: an unknown config, or one for which these machines are not suitable.
    """
    processes = nodes * max(1, gpus)
    if name is None:
        if processes == 1:
            return None, distributed.ALONE
        name = "cpu_ddp" if not gpus else ("multi_node_ddp" if nodes > 1 else "ddp")
    try:
        file = Path(name) if Path(name).is_file() else library.find("accelerate_configs", name)
    except UserError as error:
        raise UserError(f"--accelerate-config: {error}") from None
    settings = launch.read_config(file)
    kind = str(settings.get("distributed_type"))
    if processes > 1 and kind == "NO":
        raise UserError(f"--accelerate-config: {name} is for one process, and this job has {processes}; use ddp or fsdp2")
    if not gpus and not settings.get("use_cpu") and kind != "NO":
        raise UserError(f"--accelerate-config: {name} needs GPUs, and --gpus is 0; use cpu_ddp, or give --gpus")
    if gpus and settings.get("use_cpu"):
        raise UserError(f"--accelerate-config: {name} is for CPUs, and --gpus is {gpus}; use ddp, or --gpus 0")
    return name, distributed.WRAPPINGS.get(kind, distributed.DDP if processes > 1 else distributed.ALONE)


def _environment(given: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for each in given:
        name, sign, value = each.partition("=")
        if not sign or not VARIABLE.fullmatch(name):
            shown = name if sign else each
            raise UserError(f"--env: {shown}: expected NAME=VALUE, such as NCCL_SOCKET_IFNAME=eth0")
        if SECRET_NAME.search(name) or SECRETS.search(value):
            raise UserError(
                f"--env: {name} looks like a secret, and --env is written into files; export it here and give --secret {name}"
            )
        if "\n" in value:
            raise UserError(f"--env: {name}: the value has a line break; set it in a file that --before sources")
        found[name] = value
    return found


def _secrets(given: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for each in given:
        name = each.partition("=")[0]
        if name != each or not VARIABLE.fullmatch(name):  # the value is not repeated
            raise UserError(f"--secret: {name}: expected only the name of an environment variable; its value is read from here")
        if not os.environ.get(name):
            raise UserError(f"--secret: {name} is not set in this environment; export it before hfstrat launch")
        found[name] = os.environ[name]
    return found


def _mounts(given: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for each in given:
        source, sign, mount = each.rpartition(":")
        if sign and mount in ("ro", "rw"):  # as of the Hub
            source, sign, mount = source.rpartition(":")
        if not sign or not source or not mount.startswith("/") or mount == "/":
            raise UserError(f"--volume: {each}: expected SOURCE:/PATH, the path being that in the job, such as my-volume:/data")
        found[each] = mount
    return found


def _check_text(job: Job) -> None:
    """Refuse secrets in what is written, and line breaks where a line is meant. Raises UserError."""
    for line in job.options.before:
        if found := next((name for name in SECRET_SET.findall(line) if SECRET_NAME.search(name)), None):
            raise UserError(f"--before: {found} looks like a secret, which would be written into a file; give --secret {found}")
    values = {key: value for key, value in vars(job.options).items() if key != "secret"}
    for name, value in values.items():
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and (SECRETS.search(text) or any(secret in text for secret in job.secrets.values())):
                option = name.replace("_", "-")
                raise UserError(f"--{option}: holds a secret, which would be written into a file; give it by --secret NAME")
            if isinstance(text, str) and "\n" in text:
                raise UserError(f"--{name.replace('_', '-')}: holds a line break; give one line")


def check_no_secret(job: Job, text: str) -> None:
    """Refuse to write a text that holds a secret, as from a recipe or an override. Raises UserError."""
    if SECRETS.search(text) or any(secret in text for secret in job.secrets.values()):
        raise UserError(
            f"{job.loaded.source}: this recipe or one of its overrides holds a token, which would be written into a file; "
            "remove it, and give it by --secret NAME"
        )

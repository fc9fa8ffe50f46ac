"""`hfstrat launch`: a recipe as a job on other machines. Nothing here imports torch, except to time a CPU for --prices."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from hfstrat.errors import INTERRUPTED, USER, UserError

Repeated = list[str] | None


def launch(
    recipe: Annotated[str, Argument(metavar="RECIPE", help="A recipe file (YAML)")],
    overrides: Annotated[
        list[str] | None, Argument(metavar="[KEY=VALUE]...", help="Such as training.learning_rate=1e-4")
    ] = None,
    on: Annotated[str, Option(metavar="ENGINE", help="slurm, hf-jobs or skypilot")] = "",
    nodes: Annotated[int, Option(metavar="N", help="Number of machines")] = 1,
    gpus: Annotated[
        int | None, Option(metavar="N", help="GPUs of each machine; 0: CPUs only; default: 1, or of --flavor")
    ] = None,
    gpu_type: Annotated[str | None, Option(metavar="NAME", help="Type of the GPUs, such as a100")] = None,
    time: Annotated[
        str | None, Option(metavar="TIME", help="Limit of one session, such as 2h or 1-12:00:00; the run resumes in the next")
    ] = None,
    accelerate_config: Annotated[
        str | None, Option(metavar="NAME|PATH", help="How to distribute; default: ddp for several GPUs")
    ] = None,
    max_restarts: Annotated[int, Option(metavar="N", help="Most sessions after the first one")] = 10,
    name: Annotated[str | None, Option(metavar="NAME", help="Name of the job; default: from output_dir")] = None,
    cpus: Annotated[int | None, Option(metavar="N", help="Cores of each machine")] = None,
    env: Annotated[Repeated, Option(metavar="KEY=VALUE", help="Environment variable of the job; can be repeated")] = None,
    secret: Annotated[
        Repeated, Option(metavar="NAME", help="Variable of this environment to pass without writing its value")
    ] = None,
    before: Annotated[Repeated, Option(metavar="COMMAND", help="Shell command to run before training")] = None,
    container: Annotated[str | None, Option(metavar="IMAGE", help="Container image that has hfstrat")] = None,
    volume: Annotated[Repeated, Option(metavar="SOURCE:/PATH", help="Volume to mount, in the form of the engine")] = None,
    package: Annotated[
        Repeated, Option(metavar="SPEC", help="hf-jobs, skypilot: package or wheel to install; default: this hfstrat")
    ] = None,
    storage: Annotated[
        str | None, Option(metavar="BUCKET", help="hf-jobs, skypilot: bucket that keeps checkpoints and the result")
    ] = None,
    partition: Annotated[str | None, Option(metavar="NAME", help="slurm: partition")] = None,
    account: Annotated[str | None, Option(metavar="NAME", help="slurm: account")] = None,
    sbatch: Annotated[Repeated, Option(metavar="KEY=VALUE", help="slurm: further option of sbatch, such as mem=64G")] = None,
    module: Annotated[Repeated, Option(metavar="NAME", help="slurm: environment module to load")] = None,
    venv: Annotated[str | None, Option(metavar="DIR", help="slurm: virtual environment; default: that of this command")] = None,
    flavor: Annotated[str | None, Option(metavar="NAME", help="hf-jobs: hardware, such as a100-large")] = None,
    namespace: Annotated[str | None, Option(metavar="NAME", help="hf-jobs: organization that pays; default: you")] = None,
    upload: Annotated[bool, Option("--upload", help="hf-jobs: copy local files of the recipe to your private bucket")] = False,
    infra: Annotated[str | None, Option(metavar="NAME", help="skypilot: cloud, region or Kubernetes context")] = None,
    spot: Annotated[bool, Option("--spot", help="skypilot: machines that may be taken away; the run resumes")] = False,
    prices: Annotated[
        Path | None, Option(metavar="FILE", help="Your prices per hour (YAML or CSV), for the expected cost")
    ] = None,
    follow: Annotated[bool, Option("--follow", help="Show the log until the job ends, then fetch the result")] = False,
    fetch: Annotated[bool, Option("--fetch", help="Fetch the result of the submitted job, and submit nothing")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Print everything that would be written and run; do nothing")] = False,
) -> None:
    """Train a recipe on a cluster: Slurm, Hugging Face Jobs or SkyPilot. The job resumes by itself."""
    given = {key: value for key, value in locals().items() if key not in COMMON}
    options = {key: tuple(value or ()) if key in LISTS else value for key, value in given.items()}
    if dry_run and (follow or fetch):
        raise UserError(
            f"--dry-run: nothing is submitted, so {'--follow' if follow else '--fetch'} has no job; give one of the two"
        )
    raise typer.Exit(run(recipe, tuple(overrides or ()), on, options, prices, Action(follow, fetch, dry_run)))


COMMON = ("recipe", "overrides", "on", "prices", "follow", "fetch", "dry_run")
LISTS = ("env", "secret", "before", "volume", "package", "sbatch", "module")


class Action:
    """What to do with the job."""

    def __init__(self, follow: bool, fetch: bool, dry_run: bool) -> None:
        self.follow, self.fetch, self.dry_run = follow, fetch, dry_run


def run(recipe: str, overrides: tuple[str, ...], on: str, options: dict[str, Any], prices: Path | None, action: Action) -> int:
    """Run the command; returns its exit code. Raises UserError before anything is written."""
    from hfstrat.clusters import engine as engines
    from hfstrat.clusters import engine_of
    from hfstrat.clusters import job as jobs
    from hfstrat.recipe.load import load_recipe

    kind, chosen = engine_of(on), jobs.Options(**options)
    loaded = load_recipe(recipe, overrides)
    jobs.check_read(kind.name, chosen)
    job = jobs.make(kind.name, loaded, overrides, chosen, kind.default_gpus(chosen))
    earlier = engines.recorded(job)
    if earlier and earlier.engine == kind.name and chosen.name is None:
        job = replace(job, name=earlier.name)  # what it kept has this name, also where the project has moved since
    engine = kind(job)
    if action.fetch:
        return _fetch(engine, earlier)
    plan = engine.plan()
    if not action.dry_run:
        engine.check()
        if earlier and earlier.engine != kind.name:
            _check_other(job, earlier)
        elif earlier and engine.is_active(earlier):
            return _join(engine, earlier, plan, action.follow)
    checked = _check_recipe(job, action.dry_run)
    costs = _costs(engine, prices) if prices else []
    _show(engine, [*plan.notes, *checked], costs)
    if action.dry_run:
        _show_plan(job, plan)
        return 0
    engines.write(plan, job)
    submitted = engine.submit(plan)
    engines.record(job, submitted)
    print(f"submitted job {submitted.id}{f', {submitted.url}' if submitted.url else ''}", flush=True)
    if action.follow:
        return _follow(engine, submitted, plan)
    _show_next(job, plan, submitted)
    return 0


def _join(engine: Any, earlier: Any, plan: Any, follow: bool) -> int:
    """Follow the job that is active already. Raises UserError if that was not requested."""
    if follow:
        return _follow(engine, earlier, plan)
    raise UserError(
        f"output_dir: job {earlier.id} for {engine.job.output_dir} waits or runs already; see it with --follow, end it with "
        f"`{plan.cancel.format(id=_number(earlier.id))}`, or name another output_dir"
    )


def _check_other(job: Any, earlier: Any) -> None:
    """Refuse a job beside that of another engine, which may still write the same result. Raises UserError."""
    from hfstrat.clusters import engine as engines
    from hfstrat.clusters import engine_of

    active = engine_of(earlier.engine).waits_or_runs(earlier)
    if active is False:
        return
    if active:
        state, ways = "waits or runs already", f"end it, see it with --on {earlier.engine} --follow, or"
    else:
        state, ways = "cannot be seen from here", f"if it has ended, remove {job.folder / engines.RECORD}; or"
    told = f"job {earlier.id} for {job.output_dir}, submitted with --on {earlier.engine}, {state}"
    raise UserError(f"output_dir: {told}; {ways} name another output_dir")


def _check_recipe(job: Any, offline: bool) -> list[str]:
    """Check the recipe as `hfstrat train` does; returns notes about what cannot be checked here."""
    from hfstrat.clusters import paths
    from hfstrat.clusters.job import config_of
    from hfstrat.run import preflight

    found = paths.places(paths.raw(job.loaded.source, job.overrides))
    mounted = [f"{place.key} = {place.value}" for place in found if job.is_mounted(str(place.path))]
    if mounted:
        return [f"not checked here, since it is on a volume: {', '.join(mounted)}"]
    wrapping = config_of(job.options.accelerate_config, job.nodes, job.gpus)[1]
    preflight.check(job.loaded, network=not offline, wrapping=wrapping)
    return []


def _costs(engine: Any, file: Path) -> list[str]:
    """Lines about time and cost."""
    from hfstrat.clusters import prices

    job, kind = engine.job, type(engine)
    found = prices.read(str(file))
    per_hour, basis = found.per_hour(job.nodes, job.gpus, kind.gpu_of(job.options), kind.priced_as(job.options))
    time = predicted(job, kind.gpu_of(job.options))
    lines = [f"time      {time.words()}"]
    costs = prices.cost_lines(found, per_hour, basis, time, job.limit, engine.restarts + 1)
    return lines + [f"cost      {line}" for line in costs]


def predicted(job: Any, gpu: str | None) -> Any:
    """The time of the recipe on the machines of the job, as `hfstrat advise` predicts it."""
    from hfstrat.advisor import hardware, recipes, speed
    from hfstrat.clusters.prices import Time

    try:
        if job.gpus and gpu is None:
            return Time(basis="the type of the GPU is unknown")
        device = hardware.find_device(gpu if job.gpus and gpu else "cpu")
        rate = speed.rate_of(device)
        band = rate.band if job.processes == 1 else None
        shared = rate._replace(value=rate.value * job.processes, processes=job.processes, band=band)
        found = recipes.predict_one(job.loaded.recipe, shared, device)[0]
    except UserError as error:
        return Time(basis=str(error).removeprefix("--device: "))
    low, high = found.get("seconds_band", (None, None))
    basis = f"by {rate.source}" + (", if all processes share the work ideally" if job.processes > 1 else "")
    return Time(found["seconds"], low, high, basis)


def _show(engine: Any, notes: list[str], costs: list[str]) -> None:
    """Print the job in a few lines."""
    from hfstrat.recipe import format

    job = engine.job
    machines = f"{format.plural(job.nodes, 'machine')} x {format.plural(job.gpus, 'GPU') if job.gpus else 'no GPU'}"
    processes = f"{format.plural(job.processes, 'process', 'processes')}{f' by {job.config}' if job.config else ''}"
    limit = f", sessions of {format.duration(job.limit)}" if job.limit else ""
    restarts = f"at most {format.plural(engine.restarts, 'restart')}" if engine.restarts else "no restart"
    print(f"job       {job.name} on {engine.name}: {machines}, {processes}{limit}, {restarts}")
    for line in costs:
        print(line)
    for note in notes:
        print(f"note      {note}")


def _show_plan(job: Any, plan: Any) -> None:
    """Print everything that would be written and run."""
    from hfstrat.clusters.job import check_no_secret

    for text in [*plan.files.values(), plan.command]:
        check_no_secret(job, text)
    for file, text in plan.files.items():
        print(f"write     {file}\n{'-' * 80}\n{text.rstrip()}\n{'-' * 80}")
    for name, source in plan.uploads.items():
        print(f"copy      {source} to files/{name}")
    print(f"run       {plan.command}")
    _next(plan, "ID")
    print("dry run   nothing was written or submitted")


def _show_next(job: Any, plan: Any, submitted: Any) -> None:
    _next(plan, _number(submitted.id))
    print("next      the same command with --follow shows the log, with --fetch it fetches the result")


def _next(plan: Any, number: str) -> None:
    print(f"follow    {plan.follow.format(id=number)}")
    print(f"cancel    {plan.cancel.format(id=number)}")
    print(f"result    {plan.result}", flush=True)


def _follow(engine: Any, submitted: Any, plan: Any) -> int:
    """Follow a job, and fetch its result if it ends well. Ctrl-C ends the following only."""
    number = _number(submitted.id)
    print(f"follow    job {submitted.id}; Ctrl-C ends only this view, `{plan.cancel.format(id=number)}` the job", flush=True)
    try:
        code = int(engine.follow(submitted))
    except KeyboardInterrupt:
        print(f"\nthe job continues; follow it with: {plan.follow.format(id=number)}", file=sys.stderr)
        return INTERRUPTED
    return code or _fetch(engine, submitted)


def _fetch(engine: Any, submitted: Any) -> int:
    """Fetch the result and print its state."""
    from hfstrat.tasks import report

    job = engine.job
    if submitted is None:
        raise UserError(f"--fetch: no job was submitted for output_dir = {job.output_dir}; run the command without --fetch")
    if submitted.engine != engine.name:
        raise UserError(f"--fetch: the job of {job.output_dir} was submitted with --on {submitted.engine}; give that")
    engine.job = replace(job, name=submitted.name)
    folder = engine.fetch(submitted)
    state = report.status(folder)
    print(f"result    {folder}: {state}")
    return 0 if state == "done" else USER


def _number(identifier: str) -> str:
    """The number of a job as its programs take it, without the namespace of the Hub."""
    return identifier.rpartition("/")[2]


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(launch)

"""The commands: arguments in, one call out. Nothing here imports torch."""

from __future__ import annotations

import functools
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from hfstrat import __version__
from hfstrat.cli import launch as cli_launch
from hfstrat.cli import migrate, results, skill
from hfstrat.errors import INTERRUPTED, RunError, UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Train language models by a recipe that names a strategy: scratch, head, partial, full, lora, peft or distill.",
)
recipes_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="List or copy the bundled recipes.")
app.add_typer(recipes_app, name="recipes")
cache_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Inspect or clear the cache of prepared data and computations."
)
app.add_typer(cache_app, name="cache")

RecipeArgument = Annotated[str, Argument(metavar="RECIPE", help="A recipe file (YAML)")]
Overrides = Annotated[list[str] | None, Argument(metavar="[KEY=VALUE]...", help="Such as training.learning_rate=1e-4")]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace an earlier run in output_dir")]


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    accelerate_config: Annotated[
        str | None, Option(metavar="NAME|PATH", help="How to distribute: single, ddp, fsdp2, ..., or your own file")
    ] = None,
    num_processes: Annotated[int | None, Option(min=1, metavar="N", help="Number of processes, such as one per GPU")] = None,
    num_machines: Annotated[int | None, Option(min=1, metavar="N", help="Number of machines that share the processes")] = None,
    machine_rank: Annotated[int | None, Option(metavar="N", help="Number of this machine, from 0")] = None,
    main_process_ip: Annotated[str | None, Option(metavar="HOST", help="Address of machine 0")] = None,
    main_process_port: Annotated[int | None, Option(metavar="PORT", help="A free port of machine 0")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Train a model from a recipe."""
    from hfstrat.publish import push
    from hfstrat.recipe.load import load_recipe, located
    from hfstrat.run import launch, preflight

    loaded = load_recipe(recipe, overrides or [])
    arguments = [recipe, *(overrides or []), *(["--overwrite"] if overwrite else [])]
    machines = launch.Machines(num_machines, machine_rank, main_process_ip, main_process_port)
    started = launch.plan_launch(arguments, accelerate_config, num_processes, machines)
    preflight.check(loaded, overwrite, wrapping=started.wrapping if started.processes > 1 else None)
    with located(loaded):
        for line in push.prepare(loaded.recipe):
            print(line, flush=True)
    if started.processes > 1 and loaded.recipe.training.global_batch_tokens is None:
        from hfstrat.trainer.plan import sequences_per_process

        with located(loaded):
            sequences_per_process(loaded.recipe.training.global_batch_size, started.processes)
    if started.processes == 1:
        from hfstrat.advisor.recipes import before_run
        from hfstrat.run.prediction import for_environment

        started.environment.update(for_environment(loaded.recipe, before_run(loaded)))
    print(f"hfstrat {__version__}, command: {started.line()}", flush=True)
    if num_machines is None and started.processes < (gpus := launch.count_gpus()):
        print(f"this machine has {gpus} GPUs; --num-processes {gpus} uses them all", flush=True)
    raise typer.Exit(launch.start(started))


@app.command()
def check(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    rows: Annotated[int, Option(min=0, help="Number of training examples to show")] = 3,
    every: Annotated[bool, Option("--all", help="Show default settings and frozen modules too")] = False,
    as_json: Annotated[bool, Option("--json", help="Print data statistics and examples as JSON instead")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Check a recipe without training: trainable parameters, data statistics, masked examples, settings."""
    from hfstrat.cli import check as cli_check
    from hfstrat.recipe.load import load_recipe, located
    from hfstrat.run import launch, preflight

    loaded = load_recipe(recipe, overrides or [])
    preflight.check(loaded, overwrite)
    with located(loaded):
        if as_json:
            cli_check.show_json(loaded, rows)
        else:
            cli_check.show(loaded, rows, every)
    if not as_json:
        print(f"{'command':<9} {launch.plan_launch([recipe, *(overrides or [])], None, None).line()}")


@app.command()
def compare(
    recipes: Annotated[
        list[str] | None,
        Argument(metavar="[RECIPE]... [KEY=VALUE]...", help="Recipe files, and overrides for all of them"),
    ] = None,
    budget: Annotated[
        str, Option(metavar="10min|2M-tokens|500-steps", help="What each run may spend: time, tokens or steps")
    ] = "",
    model: Annotated[
        str | None, Option(metavar="MODEL", help="Instead of recipes: a model folder or Hub id, with --data")
    ] = None,
    data: Annotated[str | None, Option(metavar="DATA", help="Instead of recipes: the training data, with --model")] = None,
    strategies: Annotated[
        str | None, Option(metavar="NAME,...", help="With --model: only these; default: all possible")
    ] = None,
    task: Annotated[str | None, Option(metavar="TASK", help="With --model: the task; default: from the columns")] = None,
    evaluate: Annotated[str | None, Option(metavar="DATA", help="Evaluation data; default: held out")] = None,
    seeds: Annotated[int, Option(min=1, help="Number of runs of each recipe, with different seeds")] = 3,
    output: Annotated[Path, Option("--output", "-o", help="Folder for runs, comparison.json and report.html")] = Path(
        "runs/compare"
    ),
    timeout: Annotated[str | None, Option(metavar="TIME", help="Stop a run that takes longer in total, e.g. 1h")] = None,
    retry: Annotated[bool, Option("--retry", help="Repeat failed runs; finished ones are never repeated")] = False,
) -> None:
    """Train recipes or strategies side by side: same data, same evaluation, same budget, one process per run."""
    from hfstrat.advisor.recipes import predict
    from hfstrat.comparison import compare
    from hfstrat.engine.entries import Request, parse_budget
    from hfstrat.recipe.section import seconds

    if not budget:
        raise UserError("--budget: missing; give what each run may spend, such as 10min, 2M-tokens or 500-steps")
    try:
        limit = None if timeout is None else seconds(timeout)
    except ValueError as error:
        raise UserError(f"--timeout: {timeout}: {error}") from None
    given = recipes or []
    overrides = [argument for argument in given if "=" in argument and not Path(argument).is_file()]
    files, spent = [argument for argument in given if argument not in overrides], parse_budget(budget)
    request = Request(files, overrides, model, data, strategies, task, spent, seeds, output, evaluate, limit, retry)
    raise typer.Exit(compare.compare(request, predict))


@app.command()
def tune(
    recipes: Annotated[
        list[str] | None,
        Argument(metavar="[RECIPE]... [KEY=VALUE]...", help="Recipe files, and overrides for all of them"),
    ] = None,
    model: Annotated[
        str | None, Option(metavar="MODEL", help="Instead of recipes: a model folder or Hub id, with --data")
    ] = None,
    data: Annotated[str | None, Option(metavar="DATA", help="Instead of recipes: the training data, with --model")] = None,
    time: Annotated[
        str, Option(metavar="TIME", help="Time until the model is ready, verification included, such as 30min")
    ] = "",
    eval_data: Annotated[
        str | None, Option(metavar="DATA", help="Measures the winner, chooses nothing; default: a part of the held-out rows")
    ] = None,
    strategies: Annotated[
        str | None, Option(metavar="NAME,...", help="With --model: only these; default: all possible")
    ] = None,
    search: Annotated[
        str | None,
        Option(metavar="KEY,...", help="Searched besides the strategy, such as learning_rate,r; default: learning_rate"),
    ] = None,
    task: Annotated[str | None, Option(metavar="TASK", help="With --model: the task; default: from the columns")] = None,
    output_dir: Annotated[Path, Option("--output-dir", "-o", help="Folder of the result, and of the search")] = Path(
        "runs/tune"
    ),
    seed: Annotated[int, Option(min=0, help="Seed of the runs, of the held-out rows and of the search")] = 42,
    join: Annotated[
        Path | None, Option(metavar="DIR", help="Work on the search in this folder, which another process has started")
    ] = None,
) -> None:
    """Search strategies and settings until a deadline; leave the best model as a finished run."""
    from hfstrat.cli import tune as cli_tune
    from hfstrat.tuning import space
    from hfstrat.tuning import tune as tuning
    from hfstrat.tuning.options import Options, parse_time

    given = recipes or []
    if join is not None:
        if given or model or data or time:
            raise UserError("--join: the search has its options already; give the folder alone")
        raise typer.Exit(tuning.join(join.absolute(), cli_tune.runner))
    overrides = [argument for argument in given if "=" in argument and not Path(argument).is_file()]
    files, keys = [argument for argument in given if argument not in overrides], space.parse_keys(search)
    options = Options(
        files, overrides, model, data, strategies, task, parse_time(time), eval_data, keys, str(output_dir.absolute()), seed
    )
    with cli_tune.helpers(output_dir.absolute()):
        raise typer.Exit(tuning.tune(options, cli_tune.adviser(options), cli_tune.runner))


@app.command()
def advise(
    overrides: Annotated[
        list[str] | None,
        Argument(metavar="[data.KEY=VALUE]...", help="How --data is read, e.g. 'data.columns={review: text}'"),
    ] = None,
    model: Annotated[str | None, Option(metavar="MODEL", help="Model folder or Hub id")] = None,
    data: Annotated[str | None, Option(metavar="DATA", help="File or folder with training data")] = None,
    task: Annotated[str | None, Option(metavar="TASK", help="The task; default: detected from the columns")] = None,
    memory: Annotated[
        str | None, Option(metavar="SIZE", help="Memory of one device, such as 16GiB; default: available")
    ] = None,
    time: Annotated[str | None, Option(metavar="TIME", help="Time limit of a complete run, such as 2h")] = None,
    device: Annotated[str, Option(metavar="NAME", help="auto, cpu, or a GPU such as a100")] = "auto",
    accelerate_config: Annotated[str | None, Option(metavar="NAME|PATH", help="How the run is distributed")] = None,
    num_processes: Annotated[int | None, Option(min=1, metavar="N", help="Number of processes")] = None,
    goal: Annotated[str, Option(metavar="GOAL", help="quality, speed or size")] = "quality",
    strategies: Annotated[str | None, Option(metavar="NAME,...", help="Only these, such as head,lora")] = None,
    measure: Annotated[
        str, Option(metavar="TIME", help="Probe the data and time real steps for at most this long; auto: 20s where possible")
    ] = "auto",
    no_measure: Annotated[bool, Option("--no-measure", help="Predict from known runs alone, without starting torch")] = False,
    reports: Annotated[
        str | None, Option(metavar="DIR", help="Past runs that show speed and quality here; default: runs")
    ] = None,
    write: Annotated[
        Path | None, Option(metavar="DIR", help="Write recipes of the first one and those within its interval")
    ] = None,
    parameters: Annotated[str | None, Option(metavar="SIZE", help="Without --model: its size, such as 1.1B")] = None,
    vocab: Annotated[int | None, Option(min=2, metavar="N", help="With --parameters: size of the vocabulary")] = None,
    rows: Annotated[int | None, Option(metavar="N", help="Without --data: number of examples")] = None,
    tokens: Annotated[int | None, Option(metavar="N", help="Without --data: total number of tokens")] = None,
    classes: Annotated[int, Option(min=0, metavar="N", help="Without --data: number of classes, if any")] = 0,
    json: Annotated[bool, Option("--json", help="Print everything as JSON")] = False,
) -> None:
    """Recommend strategies for a model, data, a machine and a time limit, with reasons."""
    from hfstrat.cli import advise as cli_advise

    request = cli_advise.Request(model, data, task, memory, time, device, accelerate_config, num_processes, goal, strategies)
    request = replace(request, measure=None if no_measure else measure, reports=reports, parameters=parameters, vocab=vocab)
    request = replace(request, rows=rows, tokens=tokens, classes=classes, overrides=tuple(overrides or ()))
    cli_advise.advise(request, write, json)


@recipes_app.command("ls")
def recipes_ls() -> None:
    """List the bundled recipes."""
    from hfstrat.recipe import library

    for name in library.names("recipes"):
        print(f"{name:<24} {library.title(library.find('recipes', name))}")


@recipes_app.command("cp")
def recipes_cp(
    name: Annotated[str, Argument(help="A name from `hfstrat recipes ls`")],
    target: Annotated[Path | None, Argument(help="File or folder to copy to")] = None,
) -> None:
    """Copy a bundled recipe, to change it."""
    import shutil

    from hfstrat.recipe import library

    source = library.find("recipes", name)
    target = target or Path(source.name)
    target = target / source.name if target.is_dir() else target
    if target.exists():
        raise UserError(f"{target} exists already; name another file")
    if not target.parent.is_dir():
        raise UserError(f"{target.parent}: no such folder; create it, or name another")
    shutil.copyfile(source, target)
    print(target)


@cache_app.command("ls")
def cache_ls() -> None:
    """List the cache entries, the least recently used first."""
    from hfstrat.cli import cache

    print("\n".join(cache.lines()))


@cache_app.command("rm")
def cache_rm(
    names: Annotated[list[str] | None, Argument(metavar="[NAME]...", help="Names from `hfstrat cache ls`")] = None,
    every: Annotated[bool, Option("--all", help="Remove everything")] = False,
    older_than: Annotated[
        str | None, Option(metavar="TIME", help="Only entries unused for this long, such as 30d or 12h")
    ] = None,
) -> None:
    """Remove cache entries, except those in use. They are created again when needed."""
    from hfstrat.cli import cache

    print("\n".join(cache.remove(names or [], every, older_than)))


@app.command()
def schema(report: Annotated[bool, Option("--report", help="The schema of report.json")] = False) -> None:
    """Print the JSON schema of a recipe, for editors."""
    import json

    from hfstrat.recipe.schema import Recipe
    from hfstrat.tasks.report import Report

    print(json.dumps((Report if report else Recipe).model_json_schema(), indent=2))


results.add_to(app)
migrate.add_to(app)
skill.add_to(app)
cli_launch.add_to(app)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, Option("--version", help="Print the version")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@functools.cache
def command() -> Any:
    """The click command of all commands, whose options typer takes a tenth of a second to read."""
    return typer.main.get_command(app)


def main() -> None:
    """The `hfstrat` command: a RunError is one sentence and its exit code, never a traceback."""
    try:
        command()()
    except RunError as error:
        print(error, file=sys.stderr)
        sys.exit(error.code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)

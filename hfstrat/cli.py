"""Commands: arguments in, one call out. Nothing here imports torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from hfstrat import __version__
from hfstrat.errors import RunError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Train language models by a recipe that names a strategy: full, partial, lora, scratch.",
)
recipes_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The recipes that come with hfstrat.")
app.add_typer(recipes_app, name="recipes")
cache_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="What was prepared once and is kept on the disk.")
app.add_typer(cache_app, name="cache")

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file (YAML)")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as training.learning_rate=1e-4")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in output_dir")]
Target = Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run's folder, an adapter, a model folder or a Hub id")]


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    accelerate_config: Annotated[
        str | None, typer.Option(metavar="NAME|PATH", help="How to distribute: single, ddp, cpu_ddp or a file of yours")
    ] = None,
    num_processes: Annotated[int | None, typer.Option(min=1, metavar="N", help="How many processes, such as one a GPU")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Carry out a recipe."""
    from hfstrat import launch, preflight
    from hfstrat.loading import load_recipe
    from hfstrat.located import located

    loaded = load_recipe(recipe, overrides or [])
    arguments = [recipe, *(overrides or []), *(["--overwrite"] if overwrite else [])]
    started = launch.plan_launch(arguments, accelerate_config, num_processes)
    preflight.check(loaded, overwrite)
    if started.processes > 1:
        from hfstrat.plan import share_of

        with located(loaded):
            share_of(loaded.recipe.training.global_batch_size, started.processes)
    print(f"hfstrat {__version__}: {started.line()}", flush=True)
    if started.processes < (gpus := launch.count_gpus()):
        print(f"this machine has {gpus} GPUs; --num-processes {gpus} uses them all", flush=True)
    raise typer.Exit(launch.start(started))


@app.command()
def check(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=0, help="How many training rows to show")] = 3,
    overwrite: Overwrite = False,
) -> None:
    """Show what a recipe means: every value and its origin, what learns, the first rows as the model sees them."""
    from hfstrat import checkup, preflight
    from hfstrat.loading import load_recipe
    from hfstrat.located import located

    loaded = load_recipe(recipe, overrides or [])
    footprint = preflight.check(loaded, overwrite)
    with located(loaded):
        checkup.show(loaded, footprint, rows)


@recipes_app.command("ls")
def recipes_ls() -> None:
    """List them."""
    from hfstrat import shipped

    for name in shipped.names("recipes"):
        print(f"{name:<24} {shipped.title(shipped.find('recipes', name))}")


@recipes_app.command("cp")
def recipes_cp(
    name: Annotated[str, typer.Argument(help="A name from `hfstrat recipes ls`")],
    target: Annotated[Path | None, typer.Argument(help="File or folder to copy to")] = None,
) -> None:
    """Copy one here, to be changed."""
    import shutil

    from hfstrat import shipped
    from hfstrat.errors import UserError

    source = shipped.find("recipes", name)
    target = target or Path(source.name)
    target = target / source.name if target.is_dir() else target
    if target.exists():
        raise UserError(f"{target} exists already; name another file")
    if not target.parent.is_dir():
        raise UserError(f"{target.parent}: no such folder; make it first, or name another")
    shutil.copyfile(source, target)
    print(target)


@cache_app.command("ls")
def cache_ls() -> None:
    """List what is kept, the one used longest ago first."""
    from hfstrat import cache_list

    print("\n".join(cache_list.lines()))


@cache_app.command("rm")
def cache_rm(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Names from `hfstrat cache ls`")] = None,
    every: Annotated[bool, typer.Option("--all", help="Remove everything")] = False,
    older_than: Annotated[str | None, typer.Option(metavar="TIME", help="Only what was not used for so long: 30d, 12h")] = None,
) -> None:
    """Remove what is kept. It is made again when it is needed; what a run is using stays."""
    from hfstrat import cache_list

    print("\n".join(cache_list.remove(names or [], every, older_than)))


@app.command()
def schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    import json

    from hfstrat.config import Recipe

    print(json.dumps(Recipe.model_json_schema(), indent=2))


@app.command()
def generate(
    target: Target,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt; may be given several times")] = None,
    file: Annotated[Path | None, typer.Option(help="Prompts: lines of .txt, or 'prompt' or 'messages' of .jsonl")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the answers to this .jsonl")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of an answer, at most")] = 128,
) -> None:
    """Answer prompts, greedily."""
    from hfstrat import use

    use.generate(target, prompt or [], file, output, max_new_tokens)


@app.command()
def predict(
    target: Target,
    text: Annotated[list[str] | None, typer.Option("--text", "-t", help="A text; may be given several times")] = None,
    file: Annotated[Path | None, typer.Option(help="Texts: lines of .txt, or rows with a text or a pair of texts")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write texts, labels and scores to this .jsonl")] = None,
) -> None:
    """Say the labels that a classifier gives to texts."""
    from hfstrat import predict as prediction

    prediction.predict(target, text or [], file, output)


@app.command()
def evaluate(
    target: Target,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Of data and evaluation")] = None,
    against: Annotated[str | None, typer.Option(metavar="base|RUN|MODEL", help="Another model on the same rows")] = None,
    data: Annotated[str | None, typer.Option(metavar="FILE", help="Rows instead of the run's own evaluation rows")] = None,
    metric: Annotated[list[str] | None, typer.Option(help="Of answers: exact_match, f1, rouge, chrf, regex, json")] = None,
    choices: Annotated[list[str] | None, typer.Option(metavar="FILE", help="Multiple choice, by likelihood")] = None,
    lm_eval: Annotated[list[str] | None, typer.Option(metavar="TASK", help="lm-evaluation-harness: name or YAML")] = None,
    include_path: Annotated[str | None, typer.Option(metavar="FOLDER", help="Further tasks for --lm-eval")] = None,
    output: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write everything to this file")] = None,
    num_processes: Annotated[int | None, typer.Option(min=1, metavar="N", help="How many processes share the rows")] = None,
) -> None:
    """Measure a run or a model, beside another one if asked, with confidence intervals."""
    from hfstrat.evaluation import cli

    words = {"metrics": metric, "choices": choices, "lm_eval": lm_eval, "include_path": include_path}
    raise typer.Exit(cli.evaluate(target, overrides or [], against, data, words, output, num_processes))


@app.command()
def merge(
    target: Target,
    output: Annotated[Path, typer.Argument(help="A new folder for the merged model")],
) -> None:
    """Merge an adapter into its base in 16 bits, and say how far the merged model is from base with adapter."""
    from hfstrat import use

    use.merge(target, output)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """The `hfstrat` command: a RunError is one sentence and its exit code, never a traceback."""
    try:
        app()
    except RunError as error:
        print(error, file=sys.stderr)
        sys.exit(error.code)
    except KeyboardInterrupt:
        sys.exit(130)

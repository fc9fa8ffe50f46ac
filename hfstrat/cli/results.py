"""Commands for trained models: generate, classify, evaluate, convert, push, list. Nothing here imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

Target = Annotated[str, Argument(metavar="RUN|MODEL", help="Folder of a run, an adapter or a model, or a Hub id")]
Tokens = Annotated[int, Option("--max-new-tokens", min=1, help="Maximum length of an answer")]
Temperature = Annotated[float, Option(min=0, help="0: greedy; above 0: answers are sampled")]
TopP = Annotated[float, Option(min=0, max=1, help="Sample from the most probable tokens with this total probability")]
Seed = Annotated[int, Option(help="Seed of sampling")]
System = Annotated[str | None, Option(metavar="TEXT", help="System message")]

Form = Annotated[str, Option("--quantization", metavar="FORM", help="recorded (as in training), none, int8, nf4 or fp4")]


def generate(
    target: Target,
    prompt: Annotated[list[str] | None, Option("--prompt", "-p", help="A prompt; can be given several times")] = None,
    file: Annotated[Path | None, Option(help="Prompts: lines of a .txt, or 'prompt' or 'messages' of a .jsonl")] = None,
    output: Annotated[Path | None, Option("--output", "-o", help="Write the answers to this .jsonl file, in batches")] = None,
    max_new_tokens: Tokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    batch_size: Annotated[int, Option(min=1, help="Prompts per batch, with --output")] = 8,
    plain: Annotated[bool, Option("--plain", help="Use prompts as they are, without a chat template")] = False,
    system: System = None,
    image: Annotated[
        list[str] | None, Option(help="An image that each --prompt is about (vision-language); can be given several times")
    ] = None,
    quantization: Form = "recorded",
) -> None:
    """Answer prompts with a trained model: streamed to the terminal, or in batches to a file."""
    from hfstrat.cli import inference
    from hfstrat.tasks.generation import How

    how = How(max_new_tokens, temperature, top_p, seed, batch_size, plain, system)
    inference.generate(target, prompt or [], file, output, how, quantization, image)


def chat(
    target: Target,
    max_new_tokens: Tokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    system: System = None,
    image: Annotated[list[str] | None, Option(help="An image that the first message is about (vision-language)")] = None,
    quantization: Form = "recorded",
) -> None:
    """Chat with a model; /reset starts over, /quit exits."""
    from hfstrat.cli import inference
    from hfstrat.tasks.generation import How

    inference.chat(target, How(max_new_tokens, temperature, top_p, seed, system=system), quantization, image)


def predict(
    target: Target,
    text: Annotated[list[str] | None, Option("--text", "-t", help="A text; can be given several times")] = None,
    file: Annotated[Path | None, Option(help="Texts: lines of a .txt, or rows with a text or a pair of texts")] = None,
    image: Annotated[list[str] | None, Option(help="An image file or a folder of them; can be given several times")] = None,
    audio: Annotated[list[str] | None, Option(help="A recording or a folder of them; can be given several times")] = None,
    output: Annotated[Path | None, Option("--output", "-o", help="Write inputs, labels and scores to this .jsonl file")] = None,
    draw: Annotated[Path | None, Option(help="Of a detector: write the images with their boxes into this folder")] = None,
    threshold: Annotated[
        float | None, Option(min=0.0, max=1.0, help="Of a detector: least score of a box [default: 0.5]")
    ] = None,
    quantization: Form = "recorded",
) -> None:
    """Classify texts, images or recordings, or find objects in images, with a trained model."""
    from hfstrat.cli import inference

    media, boxes = {"image": image or [], "audio": audio or []}, inference.Boxes(draw, threshold)
    inference.predict(target, text or [], file, output, quantization, media, boxes)


def evaluate(
    target: Target,
    overrides: Annotated[list[str] | None, Argument(metavar="[KEY=VALUE]...", help="Settings of data and evaluation")] = None,
    against: Annotated[
        str | None, Option(metavar="base|RUN|MODEL", help="Compare with another model on the same examples")
    ] = None,
    data: Annotated[str | None, Option(metavar="FILE", help="Examples instead of the run's own evaluation data")] = None,
    metric: Annotated[
        list[str] | None, Option(help="Metric of generated answers: exact_match, f1, rouge, chrf, regex, json")
    ] = None,
    choices: Annotated[list[str] | None, Option(metavar="FILE", help="Multiple-choice questions, scored by likelihood")] = None,
    lm_eval: Annotated[
        list[str] | None, Option(metavar="TASK", help="Task of lm-evaluation-harness: name or YAML file")
    ] = None,
    include_path: Annotated[str | None, Option(metavar="FOLDER", help="Folder of further tasks for --lm-eval")] = None,
    output: Annotated[
        Path | None, Option("--json", metavar="FILE", help="Write all results to this file, and a page beside it")
    ] = None,
    num_processes: Annotated[int | None, Option(min=1, metavar="N", help="Number of processes that share the examples")] = None,
    quantization: Form = "recorded",
) -> None:
    """Evaluate a run or a model, optionally against another one, with confidence intervals."""
    import json

    from hfstrat.evaluation import evaluate as evaluation

    values: dict[str, Any] = {"metrics": _names(metric), "choices": _names(choices), "lm_eval": _names(lm_eval)}
    values["include_path"] = include_path
    given = [f"evaluation.{key}={json.dumps(value)}" for key, value in values.items() if value]
    changed, file = [*given, *(overrides or [])], str(output) if output else None
    request = evaluation.Request(target, against, data, changed, file, quantization)
    from hfstrat.run import evaluation_page

    if (num_processes or 1) == 1:
        evaluation.evaluate(request)
        evaluation_page.write_safely(request, print)
        return
    from hfstrat.run import launch

    request.check()
    started = launch.plan_launch([request.to_json()], None, num_processes, program="hfstrat.evaluation.evaluate")
    if (code := launch.start(started)) == 0:
        evaluation_page.write_safely(request, print)
    raise typer.Exit(code)


def _names(values: list[str] | None) -> list[str]:
    """The values of an option that may be repeated, and may hold several names with commas."""
    return [name.strip() for each in values or [] for name in each.split(",") if name.strip()]


def merge(
    target: Target,
    output: Annotated[Path, Argument(help="New folder for the merged model")],
    dtype: Annotated[
        str, Option(metavar="DTYPE", help="bfloat16, float16, float32, or checkpoint: as the base is stored")
    ] = "checkpoint",
) -> None:
    """Merge an adapter into its base, and print the divergence from base with adapter."""
    from hfstrat.publish import merge as publish_merge

    publish_merge.merge(target, output, dtype)


def export(
    target: Target,
    output: Annotated[Path, Argument(help="New folder, or for gguf a file that ends in .gguf")],
    form: Annotated[str, Option("--format", metavar="FORM", help="safetensors, gguf or onnx")] = "safetensors",
) -> None:
    """Export a result for other programs, load it again and compare."""
    from hfstrat.publish import export as publish_export

    publish_export.export(target, output, form)


def use_lines(target: Target) -> None:
    """Print code to load and serve this model: Python, transformers serve, vLLM, Ollama."""
    from hfstrat.publish import snippets

    print("\n".join(snippets.show(target)))


def runs(
    arguments: Annotated[list[str] | None, Argument(metavar="[FOLDER] | diff A B", help="Default: runs")] = None,
    sort: Annotated[str, Option(metavar="KEY", help="Sort by name, loss, time or cost")] = "name",
) -> None:
    """List the runs below a folder, or show the differences of two runs."""
    from hfstrat.cli import runs as cli_runs
    from hfstrat.errors import UserError

    if arguments and arguments[0] == "diff":
        if len(arguments) != 3:
            raise UserError(f"runs diff: {len(arguments) - 1} given; expected two runs, as in `hfstrat runs diff A B`")
        print("\n".join(cli_runs.diff(Path(arguments[1]), Path(arguments[2]))))
    elif len(arguments or []) > 1:
        raise UserError(f"runs: {' '.join(arguments or [])}: expected one folder, or diff and two runs")
    else:
        print("\n".join(cli_runs.table(Path((arguments or ["runs"])[0]), sort)))


def push(
    run: Annotated[str, Argument(metavar="RUN", help="Folder of a finished run")],
    repo: Annotated[
        str | None, Option(metavar="NAME", help="Repository, such as me/my-model; default: that of the recipe")
    ] = None,
    private: Annotated[bool | None, Option("--private/--public", help="Default: as in the recipe")] = None,
    revision: Annotated[str | None, Option(metavar="BRANCH", help="Branch, created if missing")] = None,
) -> None:
    """Upload a finished run to the Hub, download it again and compare. A failed push can be resumed."""
    from hfstrat.publish import push as publish_push

    print("\n".join(publish_push.push_run(run, repo, private, revision)))


def add_to(app: typer.Typer) -> None:
    """Register the commands, in the order in which help shows them."""
    for command in (generate, chat, predict, evaluate, merge, export, push, runs):
        app.command()(command)
    app.command("use")(use_lines)

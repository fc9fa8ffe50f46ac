"""Commands for trained models: generate, classify, evaluate, convert, push, list. Nothing here imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Target = Annotated[str, typer.Argument(metavar="RUN|MODEL", help="Folder of a run, an adapter or a model, or a Hub id")]
Tokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Maximum length of an answer")]
Temperature = Annotated[float, typer.Option(min=0, help="0: greedy; above 0: answers are sampled")]
TopP = Annotated[float, typer.Option(min=0, max=1, help="Sample from the most probable tokens with this total probability")]
Seed = Annotated[int, typer.Option(help="Seed of sampling")]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="System message")]

Form = Annotated[str, typer.Option("--quantization", metavar="FORM", help="recorded (as in training), none, int8, nf4 or fp4")]


def generate(
    target: Target,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt; can be given several times")] = None,
    file: Annotated[Path | None, typer.Option(help="Prompts: lines of a .txt, or 'prompt' or 'messages' of a .jsonl")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the answers to this .jsonl file, in batches")
    ] = None,
    max_new_tokens: Tokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per batch, with --output")] = 8,
    plain: Annotated[bool, typer.Option("--plain", help="Use prompts as they are, without a chat template")] = False,
    system: System = None,
    quantization: Form = "recorded",
) -> None:
    """Answer prompts with a trained model: streamed to the terminal, or in batches to a file."""
    from hfstrat.cli import generate as cli_generate
    from hfstrat.tasks.generation import How

    how = How(max_new_tokens, temperature, top_p, seed, batch_size, plain, system)
    cli_generate.generate(target, prompt or [], file, output, max_new_tokens, how, quantization)


def chat(
    target: Target,
    max_new_tokens: Tokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    system: System = None,
    quantization: Form = "recorded",
) -> None:
    """Chat with a model; /reset starts over, /quit exits."""
    from hfstrat.cli.chat import chat
    from hfstrat.tasks.generation import How

    chat(target, How(max_new_tokens, temperature, top_p, seed, system=system), quantization)


def predict(
    target: Target,
    text: Annotated[list[str] | None, typer.Option("--text", "-t", help="A text; can be given several times")] = None,
    file: Annotated[Path | None, typer.Option(help="Texts: lines of a .txt, or rows with a text or a pair of texts")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write texts, labels and scores to this .jsonl file")
    ] = None,
    quantization: Form = "recorded",
) -> None:
    """Classify texts with a trained model."""
    from hfstrat.cli import predict as prediction

    prediction.predict(target, text or [], file, output, quantization)


def evaluate(
    target: Target,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings of data and evaluation")
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="base|RUN|MODEL", help="Compare with another model on the same examples")
    ] = None,
    data: Annotated[str | None, typer.Option(metavar="FILE", help="Examples instead of the run's own evaluation data")] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="Metric of generated answers: exact_match, f1, rouge, chrf, regex, json")
    ] = None,
    choices: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Multiple-choice questions, scored by likelihood")
    ] = None,
    lm_eval: Annotated[
        list[str] | None, typer.Option(metavar="TASK", help="Task of lm-evaluation-harness: name or YAML file")
    ] = None,
    include_path: Annotated[str | None, typer.Option(metavar="FOLDER", help="Folder of further tasks for --lm-eval")] = None,
    output: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all results to this file")] = None,
    num_processes: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Number of processes that share the examples")
    ] = None,
    quantization: Form = "recorded",
) -> None:
    """Evaluate a run or a model, optionally against another one, with confidence intervals."""
    from hfstrat.cli import evaluate as cli_evaluate

    words = {"metrics": metric, "choices": choices, "lm_eval": lm_eval, "include_path": include_path}
    raise typer.Exit(cli_evaluate.evaluate(target, overrides or [], against, data, words, output, num_processes, quantization))


def merge(
    target: Target,
    output: Annotated[Path, typer.Argument(help="New folder for the merged model")],
) -> None:
    """Merge an adapter into its base in 16 bits, and print the divergence from base with adapter."""
    from hfstrat.publish import export as publish_export

    publish_export.merge(target, output)


def export(
    target: Target,
    output: Annotated[Path, typer.Argument(help="New folder, or for gguf a file that ends in .gguf")],
    form: Annotated[str, typer.Option("--format", metavar="FORM", help="safetensors, gguf or onnx")] = "safetensors",
) -> None:
    """Export a result for other programs, load it again and compare."""
    from hfstrat.publish import export as publish_export

    publish_export.export(target, output, form)


def use_lines(target: Target) -> None:
    """Print code to load and serve this model: Python, transformers serve, vLLM, Ollama."""
    from hfstrat.publish import snippets

    print("\n".join(snippets.show(target)))


def runs(
    words: Annotated[list[str] | None, typer.Argument(metavar="[FOLDER] | diff A B", help="Default: runs")] = None,
    sort: Annotated[str, typer.Option(metavar="KEY", help="Sort by name, loss, time or cost")] = "name",
) -> None:
    """List the runs below a folder, or show the differences of two runs."""
    from hfstrat.cli import runs as cli_runs
    from hfstrat.errors import UserError

    if words and words[0] == "diff":
        if len(words) != 3:
            raise UserError(f"runs diff: {len(words) - 1} given; expected two runs, as in `hfstrat runs diff A B`")
        print("\n".join(cli_runs.diff(Path(words[1]), Path(words[2]))))
    elif len(words or []) > 1:
        raise UserError(f"runs: {' '.join(words or [])}: expected one folder, or diff and two runs")
    else:
        print("\n".join(cli_runs.table(Path((words or ["runs"])[0]), sort)))


def push(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder of a finished run")],
    repo: Annotated[
        str | None, typer.Option(metavar="NAME", help="Repository, such as me/my-model; default: that of the recipe")
    ] = None,
    private: Annotated[bool | None, typer.Option("--private/--public", help="Default: as in the recipe")] = None,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", help="Branch, created if missing")] = None,
) -> None:
    """Upload a finished run to the Hub, download it again and compare. A failed push can be resumed."""
    from hfstrat.publish import push as publish_push

    print("\n".join(publish_push.push_run(run, repo, private, revision)))


def add_to(app: typer.Typer) -> None:
    """Register the commands, in the order in which help shows them."""
    for command in (generate, chat, predict, evaluate, merge, export, push, runs):
        app.command()(command)
    app.command("use")(use_lines)

"""Commands for what was trained: answers, labels, other forms, the Hub, the runs there are. Nothing here imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Target = Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run's folder, an adapter, a model folder or a Hub id")]
Tokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Length of an answer, at most")]
Temperature = Annotated[float, typer.Option(min=0, help="0 is greedy; above, answers are sampled")]
TopP = Annotated[float, typer.Option(min=0, max=1, help="Sample from the likeliest tokens of this mass")]
Seed = Annotated[int, typer.Option(help="Of sampling")]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="A system message")]

Form = Annotated[
    str, typer.Option("--quantization", metavar="FORM", help="recorded (as it was trained), none, int8, nf4 or fp4")
]


def generate(
    target: Target,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt; may be given several times")] = None,
    file: Annotated[Path | None, typer.Option(help="Prompts: lines of .txt, or 'prompt' or 'messages' of .jsonl")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the answers to this .jsonl, in batches")] = None,
    max_new_tokens: Tokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at once, with --output")] = 8,
    plain: Annotated[bool, typer.Option("--plain", help="Prompts go in as they are, without a chat template")] = False,
    system: System = None,
    quantization: Form = "recorded",
) -> None:
    """Answer prompts: streamed on the terminal, or in batches into a file."""
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
    """Talk to a model; /reset begins again, /quit ends."""
    from hfstrat.cli.chat import chat
    from hfstrat.tasks.generation import How

    chat(target, How(max_new_tokens, temperature, top_p, seed, system=system), quantization)


def predict(
    target: Target,
    text: Annotated[list[str] | None, typer.Option("--text", "-t", help="A text; may be given several times")] = None,
    file: Annotated[Path | None, typer.Option(help="Texts: lines of .txt, or rows with a text or a pair of texts")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write texts, labels and scores to this .jsonl")] = None,
    quantization: Form = "recorded",
) -> None:
    """Say the labels that a classifier gives to texts."""
    from hfstrat.cli import predict as prediction

    prediction.predict(target, text or [], file, output, quantization)


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
    quantization: Form = "recorded",
) -> None:
    """Measure a run or a model, beside another one if asked, with confidence intervals."""
    from hfstrat.cli import evaluate as cli_evaluate

    words = {"metrics": metric, "choices": choices, "lm_eval": lm_eval, "include_path": include_path}
    raise typer.Exit(cli_evaluate.evaluate(target, overrides or [], against, data, words, output, num_processes, quantization))


def merge(
    target: Target,
    output: Annotated[Path, typer.Argument(help="A new folder for the merged model")],
) -> None:
    """Merge an adapter into its base in 16 bits, and say how far the merged model is from base with adapter."""
    from hfstrat.publish import merge as publish_merge

    publish_merge.merge(target, output)


def export(
    target: Target,
    output: Annotated[Path, typer.Argument(help="A new folder, or for gguf a file that ends in .gguf")],
    form: Annotated[str, typer.Option("--format", metavar="FORM", help="safetensors, gguf or onnx")] = "safetensors",
) -> None:
    """Write a result for other programs, read it again and compare."""
    from hfstrat.publish import export as publish_export

    publish_export.export(target, output, form)


def use_lines(target: Target) -> None:
    """Show how to load and serve this result: Python, transformers serve, vLLM, Ollama."""
    from hfstrat.publish import snippets

    print("\n".join(snippets.show(target)))


def runs(
    words: Annotated[list[str] | None, typer.Argument(metavar="[FOLDER] | diff A B", help="Default: runs")] = None,
    sort: Annotated[str, typer.Option(metavar="KEY", help="name, loss, time or cost")] = "name",
) -> None:
    """List the runs under a folder, or say what differs between two."""
    from hfstrat.cli import runs as made
    from hfstrat.errors import UserError

    if words and words[0] == "diff":
        if len(words) != 3:
            raise UserError(f"runs diff: {len(words) - 1} given; expected two runs, as in `hfstrat runs diff A B`")
        print("\n".join(made.diff(Path(words[1]), Path(words[2]))))
    elif len(words or []) > 1:
        raise UserError(f"runs: {' '.join(words or [])}: one folder is expected, or diff and two runs")
    else:
        print("\n".join(made.table(Path((words or ["runs"])[0]), sort)))


def push(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The folder of a finished run")],
    repo: Annotated[
        str | None, typer.Option(metavar="NAME", help="Repository, such as me/my-model; default: the recipe's")
    ] = None,
    private: Annotated[bool | None, typer.Option("--private/--public", help="Default: what the recipe says")] = None,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", help="Branch, made if it is missing")] = None,
) -> None:
    """Upload a finished run to the Hub, pull it again and compare. A push that failed goes on where it stopped."""
    from hfstrat.publish import push as publish_push

    print("\n".join(publish_push.push_run(run, repo, private, revision)))


def add_to(app: typer.Typer) -> None:
    """Register the commands, in the order in which help shows them."""
    for command in (generate, chat, predict, evaluate, merge, export, push, runs):
        app.command()(command)
    app.command("use")(use_lines)

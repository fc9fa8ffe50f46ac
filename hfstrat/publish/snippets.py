"""Code that loads a result with plain transformers, peft or sentence-transformers, and commands that serve it."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfstrat.errors import UserError
from hfstrat.models.load import read_json
from hfstrat.objectives import task_of
from hfstrat.publish.scrub import Base, base_of
from hfstrat.recipe.peft import UNMERGED
from hfstrat.tasks import task_of_files
from hfstrat.tasks.base import Task
from hfstrat.tasks.report import Report

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank accepts


@dataclass(frozen=True)
class Artifact:
    """The result in a folder. `source` is its name in the code: a Hub id or a path."""

    folder: Path
    report: Report | None
    source: str
    local_base: str | None = None  # the path of the base, for code that is shown on this machine only

    @property
    def is_adapter(self) -> bool:
        return (self.folder / "adapter_config.json").is_file()

    @property
    def is_sentence(self) -> bool:
        return (self.folder / "modules.json").is_file()

    @property
    def task(self) -> Task:
        return task_of(self.report.run.recipe) if self.report else task_of_files(self.folder)

    @property
    def library(self) -> str:
        return "sentence-transformers" if self.is_sentence else ("peft" if self.is_adapter else "transformers")

    @property
    def base(self) -> Base | None:
        return base_of(self.report) if self.report else None

    @property
    def base_name(self) -> str:
        """The name of the base in the code."""
        if self.local_base:
            return self.local_base
        config = read_json(self.folder / "adapter_config.json")
        return (self.base.hub or f"path/to/{self.base.name}") if self.base else str(config.get("base_model_name_or_path"))

    @property
    def own_base(self) -> bool:
        """Whether users have to supply the base, since it is not on the Hub."""
        return bool(self.base and not self.base.hub)

    @property
    def rank(self) -> int:
        return int(read_json(self.folder / "adapter_config.json").get("r") or 0)

    @property
    def peft_type(self) -> str:
        """PEFT's name of the adapter's method; empty for a complete model."""
        return str(read_json(self.folder / "adapter_config.json").get("peft_type") or "")

    @property
    def adds_tokens(self) -> bool:
        """Whether an adapter brings embeddings of tokens that its base does not have."""
        return bool(read_json(self.folder / "adapter_config.json").get("trainable_token_indices"))

    @property
    def chats(self) -> bool:
        """Whether prompts go through the tokenizer's chat template."""
        data = self.report.run.data if self.report else None
        if data and (data.train.format == "text" or data.train.template == "plain"):
            return False
        own = read_json(self.folder / "tokenizer_config.json").get("chat_template")
        return (self.folder / "chat_template.jinja").is_file() or bool(own)

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of the chat template."""
        return dict(self.report.run.recipe.data.chat_template_kwargs) if self.report else {}

    @property
    def trust(self) -> bool:
        return bool(self.report and self.report.run.recipe.model.trust_remote_code)


def snippet(artifact: Artifact) -> str:
    """Python that loads the artifact with plain transformers, peft or sentence-transformers and runs it on an example."""
    return "\n".join(
        [
            *_load(artifact),
            "",
            *artifact.task.text.example(
                artifact.chats, artifact.is_sentence, artifact.options, read_json(artifact.folder / "config.json")
            ),
        ]
    )


def _load(a: Artifact) -> list[str]:
    trust = ", trust_remote_code=True" if a.trust else ""
    auto, source = a.task.model.auto_class, repr(a.source).replace("'", '"')
    name, processor = a.task.text.processor
    tokenizer = f"{name} = {processor}.from_pretrained({source})"
    if a.is_sentence:
        return ["from sentence_transformers import SentenceTransformer", "", f"model = SentenceTransformer({source})"]
    special = (a.folder / "config.json").is_file()  # labels and padding, which the base of an adapter does not have
    if a.is_adapter and (a.own_base or special or a.local_base):
        return _load_on_base(a, auto, source, special, [tokenizer], trust)
    imports = [f"from transformers import {', '.join(sorted((auto, processor)))}"]
    if a.is_adapter:
        auto = auto.replace("AutoModel", "AutoPeftModel")
        imports = [f"from peft import {auto}", f"from transformers import {processor}"]
    return [*imports, "", f'model = {auto}.from_pretrained({source}, dtype="auto"{trust})', tokenizer]


def _load_on_base(a: Artifact, auto: str, source: str, special: bool, lines: list[str], trust: str) -> list[str]:
    """Code that loads the base and then the adapter; `lines` load the tokenizer."""
    processor = a.task.text.processor[1]
    names = ["AutoConfig", auto, processor] if special else [auto, processor]
    base, more = f'"{a.base_name}"', ', dtype="auto"'
    if a.base_name.endswith(".gguf"):
        file = Path(a.base_name)
        base, names = f'"{file.parent}"', [*names, "GgufConfig"]
        more += f', gguf_file="{file.name}", quantization_config=GgufConfig(dequantize=True)'
    if a.base and a.base.revision:
        more += f', revision="{a.base.revision}"'
    more += f", config=AutoConfig.from_pretrained({source})" if special else ""
    if a.base and a.own_base and not a.local_base and a.base.sha256:
        lines = [*lines, f"# your copy of the base: the sha256 of its weights starts with {a.base.sha256[:12]}"]
    lines = [*lines, f"base = {auto}.from_pretrained({base}{more}{trust})"]
    if a.adds_tokens:
        lines.append("base.resize_token_embeddings(len(tokenizer))")
    imports = ["from peft import PeftModel", f"from transformers import {', '.join(sorted(names))}"]
    return [*imports, "", *lines, f"model = PeftModel.from_pretrained(base, {source})"]


def serving(artifact: Artifact) -> list[tuple[str, list[str]]]:
    """Ways to serve this artifact: titles and shell commands."""
    if artifact.task.text.pipeline != "text-generation" or artifact.peft_type in UNMERGED:
        return []  # servers take complete models, and vLLM also adapters of LoRA
    trust, chats = " --trust-remote-code" if artifact.trust else "", artifact.chats
    options = artifact.options if chats else {}
    source = model = vllm = artifact.source
    merging, notes, loads = list[str](), ("", ""), source
    if artifact.is_adapter:
        merging, model, vllm = [f"hfstrat merge {source} merged"], "./merged", "mine"
        notes = ("after merging; ", " (the base with the adapter; or merge first)")
        rank = next((size for size in VLLM_RANKS if size >= artifact.rank), artifact.rank)
        loads = f"{artifact.base_name} --enable-lora --max-lora-rank {rank} --lora-modules mine={source}"
    if artifact.adds_tokens or artifact.peft_type not in ("", "LORA"):  # vLLM takes from an adapter only LoRA's matrices
        loads, vllm, notes = "./merged", "./merged", (notes[0], " (after merging)")
    ollama = [
        f"hfstrat export {source} model.gguf --format gguf",
        "printf 'FROM ./model.gguf\\n' > Modelfile",
        "ollama create my-model -f Modelfile && ollama run my-model",
    ]
    return [
        (
            f"transformers ({notes[0]}pip install 'transformers[serving]')",
            [*merging, f"transformers serve {model}{trust}", _request(model, chats, options)],
        ),
        (
            f"vLLM{notes[1]}",
            [*(merging if loads == model else []), f"vllm serve {loads}{trust}", _request(vllm, chats, options)],
        ),
        ("Ollama", ollama),
    ]


def _request(name: str, chats: bool, options: dict[str, Any]) -> str:
    """A command that sends a request to a local server."""
    body: dict[str, Any] = {"model": name, "max_tokens": 64}
    path = "chat/completions" if chats else "completions"
    body |= {"messages": [{"role": "user", "content": "Hello"}]} if chats else {"prompt": "Once upon a time"}
    body |= {"chat_template_kwargs": options} if options else {}
    words = ["curl", f"http://localhost:8000/v1/{path}", "-H", "Content-Type: application/json", "-d", json.dumps(body)]
    return shlex.join(words)


def _configs(source: str) -> Path:
    """The folder of the config files of a Hub repository."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=["*.json", "*.jinja"], ignore_patterns=["tokenizer.json"]))
    except Exception as error:  # the transport has many ways to fail
        raise UserError(
            f"{source}: no such folder, and it cannot be downloaded from the Hub: {str(error).splitlines()[0]}"
        ) from error


def show(target: str) -> list[str]:
    """The lines that `hfstrat use` prints for a run or a model."""
    from hfstrat.tasks.artifact import resolve

    source, report = resolve(target)
    folder = Path(source) if Path(source).is_dir() else _configs(source)
    base = read_json(folder / "adapter_config.json").get("base_model_name_or_path") if folder.is_dir() else None
    artifact = Artifact(folder, report, source, str(base) if base and Path(str(base)).exists() else None)
    lines = ["# Python", "", snippet(artifact), ""]
    for title, commands in serving(artifact):
        lines += [f"# {title}", "", *commands, ""]
    return lines[:-1]

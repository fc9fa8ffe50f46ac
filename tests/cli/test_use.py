"""Trained models can be used: answers, merged models, loading by plain transformers and peft."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import run

from hfstrat.cli import inference
from hfstrat.errors import UserError
from hfstrat.publish import merge, snippets
from hfstrat.tasks import artifact
from hfstrat.tasks.generation import How


@pytest.fixture(scope="module")
def trained(models: Callable[..., Path], rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished LoRA run on a bfloat16 base."""
    from hfstrat.recipe.load import load_recipe

    folder = tmp_path_factory.mktemp("trained")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"model: {models(dtype='bfloat16')}\nstrategy: {{name: lora, r: 4}}\ndata: {{train: {rows}, max_length: 128}}\n"
        "training: {max_steps: 6, global_batch_size: 8, learning_rate: 3e-2}\nevaluation: {samples: 2, max_new_tokens: 6}\n"
        f"output_dir: {folder / 'run'}\n"
    )
    run(load_recipe(str(recipe)))
    return folder / "run"


def test_plain_peft_loads_the_adapter_with_equal_logits(trained: Path) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    model = AutoPeftModelForCausalLM.from_pretrained(trained / "final", dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained / "final")
    asked = json.loads((trained / "report.json").read_text())["result"]["answers"][0]
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": asked["prompt"]}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.autocast("cpu", torch.bfloat16):
        out = model.generate(**ids, max_new_tokens=6, do_sample=False)
    answer = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert answer == asked["after"]


def test_generate_to_the_terminal_and_to_a_file(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inference.generate(str(trained), ["the cat"], None, None, How(5))
    one = capsys.readouterr().out.strip("\n")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "the cat"}\n{"messages": [{"role": "user", "content": "the cat"}]}\n')
    output = tmp_path / "answers.jsonl"
    inference.generate(str(trained / "final"), [], prompts, output, How(5))
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [a["completion"].strip() for a in answers] == [one.strip()] * 2
    with pytest.raises(UserError, match="exists already"):
        inference.generate(str(trained), [], prompts, output, How(5))


def test_merge_writes_an_ordinary_16_bit_model(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM

    merge.merge(str(trained), tmp_path / "merged")
    told = capsys.readouterr().out
    divergence = float(told.split("= ")[1].split()[0])
    assert 0 <= divergence < 1e-2
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.dtype == torch.bfloat16
    assert "lora" not in " ".join(dict(merged.named_parameters()))
    adapted, tokenizer, _ = artifact.load(str(trained))
    ids = torch.tensor([tokenizer("the cat sat on the mat")["input_ids"]])
    with torch.no_grad():
        want, got, base = (m(input_ids=ids).logits.float() for m in (adapted, merged, adapted.get_base_model()))
    assert (want - got).abs().max() < 0.05
    del base
    with pytest.raises(UserError, match="is in use"):
        merge.merge(str(trained), tmp_path / "merged")
    with pytest.raises(UserError, match="a complete model already"):
        merge.merge(str(tmp_path / "merged"), tmp_path / "again")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: str(folder / "nothing" / "here"), "no such folder"),
        (lambda folder: str(folder), "holds no model and no adapter"),
    ],
)
def test_targets_that_are_none(tmp_path: Path, make: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        artifact.resolve(make(tmp_path))


def test_a_missing_prompt_is_refused_first(trained: Path) -> None:
    with pytest.raises(UserError, match="--prompt"):
        inference.generate(str(trained), [], None, None, How(5))


@pytest.mark.slow
def test_the_printed_lines_serve(trained: Path, tmp_path: Path) -> None:
    """`hfstrat use` of an adapter: its lines for transformers are executed unchanged, except for the port."""
    if shutil.which("curl") is None or any(importlib.util.find_spec(name) is None for name in ("fastapi", "uvicorn", "openai")):
        pytest.skip("needs curl, and pip install 'transformers[serving]'")
    lines = snippets.show(str(trained))
    title = next(place for place, line in enumerate(lines) if line.startswith("# transformers"))
    merge, serve, ask = lines[title + 2 : title + 5]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    scripts = Path(sys.executable).parent
    env = {**os.environ, "PATH": f"{scripts}:{os.environ['PATH']}"}
    subprocess.run(merge, shell=True, check=True, cwd=tmp_path, env=env)
    served = subprocess.Popen(f"exec {serve} --port {port}", shell=True, cwd=tmp_path, env=env)
    try:
        wait = "--retry 90 --retry-delay 1 --retry-connrefused"
        asked = ask.replace("8000", str(port)).replace("curl", f"curl -s {wait}", 1)
        printed = subprocess.run(asked, shell=True, check=True, cwd=tmp_path, env=env, capture_output=True, text=True).stdout
        assert served.poll() is None
    finally:
        served.terminate()
        served.wait(30)
    assert json.loads(printed)["choices"][0]["message"]["role"] == "assistant", printed

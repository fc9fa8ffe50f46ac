"""Prepared data are kept, and never used for anything but what they were made from."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import make_tokenizer, write_jsonl

import hfstrat.data.prepare as preparing
from hfstrat.data import cache
from hfstrat.data.prepare import prepare
from hfstrat.errors import UserError
from hfstrat.recipe.data import Data

ROWS = [{"prompt": f"one {n}", "completion": "two three"} for n in range(12)]


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """An empty cache, and which sources were tokenised since."""
    monkeypatch.setenv("HFSTRAT_CACHE", str(tmp_path / "cache"))
    seen: list[str] = []
    real = preparing.write_tokens

    def write_tokens(rows: Any, reading: Any, *others: Any) -> Any:
        seen.append(Path(reading.source).name)
        return real(rows, reading, *others)

    monkeypatch.setattr(preparing, "write_tokens", write_tokens)
    return seen


def run(file: Path, tokenizer: Any = None, **options: Any) -> Any:
    return prepare(Data(train=str(file), eval_size=2, **options), tokenizer or make_tokenizer(), seed=0)


def test_the_same_data_are_tokenised_once(built: list[str], tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    first, second = run(file), run(file)
    assert built == ["rows.jsonl"]
    assert first.report() == second.report()
    assert first.train.to_list() == second.train.to_list()
    assert first.samples == second.samples
    run(write_jsonl(tmp_path / "copy.jsonl", ROWS))  # the same bytes under another name
    assert built == ["rows.jsonl"]
    assert run(tmp_path / "copy.jsonl").statistics["train"].source.endswith("copy.jsonl")


OPTIONS: dict[str, dict[str, Any]] = {
    "max_length": {"max_length": 64},
    "overflow": {"overflow": "split"},
    "train_on": {"train_on": "all"},
    "template": {"template": "plain"},
    "format": {"format": "prompt-completion"},
    "columns": {"columns": {"prompt": "completion", "completion": "prompt"}},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_another_option_is_another_entry(built: list[str], tmp_path: Path, name: str) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    run(file)
    run(file, **OPTIONS[name])
    assert len(built) == 2
    run(file, **OPTIONS[name])
    assert len(built) == 2


def test_another_byte_is_another_entry(built: list[str], tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    run(file)
    file.write_text(file.read_text().replace("one 7", "two 7"))  # of the same size, in the same moment
    assert "two 7" in str(run(file).renderer.tokenizer.batch_decode(run(file).train["input_ids"][:]))
    assert len(built) == 2


def _other_chat(tokenizer: Any) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace("\n", "")


def _other_token(tokenizer: Any) -> None:
    tokenizer.add_tokens(["one"])


def _other_end(tokenizer: Any) -> None:
    tokenizer.eos_token = "<|endoftext|>"


@pytest.mark.parametrize("change", [_other_chat, _other_token, _other_end])
def test_another_tokenizer_is_another_entry(built: list[str], tmp_path: Path, change: Callable[[Any], None]) -> None:
    file, tokenizer = write_jsonl(tmp_path / "rows.jsonl", ROWS), make_tokenizer()
    run(file, tokenizer)
    tokenizer(["one", "one two"], padding=True, truncation=True, max_length=2)  # a use of it is no change
    run(file, tokenizer)
    assert len(built) == 1
    change(tokenizer)
    run(file, tokenizer)
    assert len(built) == 2


def test_another_version_is_another_entry(built: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    run(file)
    monkeypatch.setattr(cache, "__version__", "99")
    run(file)
    assert len(built) == 2


def test_another_template_file_is_another_entry(built: list[str], tmp_path: Path) -> None:
    file, template = write_jsonl(tmp_path / "rows.jsonl", ROWS), tmp_path / "chat.jinja"
    for text in ("{% for m in messages %}{{ m.content }}{% endfor %}", "{% for m in messages %}{{ m.content }}!{% endfor %}"):
        template.write_text(text)
        run(file, template=str(template))
    assert len(built) == 2


@pytest.mark.parametrize("suffix", ["arrow", "json"])
@pytest.mark.parametrize("harm", [lambda content: content[:-9], lambda content: b"", lambda content: content[:99] + b"x" * 99])
def test_a_broken_entry_is_built_again(built: list[str], tmp_path: Path, suffix: str, harm: Callable[[bytes], bytes]) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    wanted = run(file).train.to_list()
    entry = next((tmp_path / "cache").glob(f"*.{suffix}"))
    entry.write_bytes(harm(entry.read_bytes()))
    assert run(file).train.to_list() == wanted
    assert len(built) == 2
    run(file)
    assert len(built) == 2


def test_what_fails_leaves_nothing(built: list[str], tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [*ROWS, {"prompt": "a"}])
    with pytest.raises(UserError, match="row 13"):
        run(file)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HFSTRAT_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(UserError, match="set HFSTRAT_CACHE"):
        run(write_jsonl(tmp_path / "rows.jsonl", ROWS))


def test_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HFSTRAT_CACHE")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    assert cache.folder() == tmp_path / "hf" / "hfstrat"
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder() == tmp_path / ".cache" / "hfstrat"


BUILDER = """
import json, sys
sys.path.insert(0, {tests!r})
from conftest import make_tokenizer
from hfstrat.recipe.data import Data
from hfstrat.data.prepare import prepare
tokenizer = make_tokenizer()
print("ready", flush=True)
input()
print(json.dumps(prepare(Data(train={file!r}, eval_size=5), tokenizer, seed=0).train.to_list()))
"""


def test_two_processes_build_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HFSTRAT_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": f"one {n}", "completion": "two three"} for n in range(3000)]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    program = BUILDER.format(tests=str(Path(__file__).parents[1]), file=str(file))
    command = [sys.executable, "-c", program]
    started = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in started:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    answers = [json.loads(process.communicate()[0].splitlines()[-1]) for process in started]
    assert answers[0] == answers[1]
    assert len(answers[0]) == 2995
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".arrow", ".json"]
    assert prepare(Data(train=str(file), eval_size=5), make_tokenizer(), seed=0).train.to_list() == answers[0]

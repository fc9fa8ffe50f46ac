"""Formats, masks by position, and statistics of every row."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import make_tokenizer, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from hfstrat.data import readers
from hfstrat.data.formats import Example
from hfstrat.data.prepare import prepare
from hfstrat.data.render import IGNORED, Renderer
from hfstrat.data.values import BadRow
from hfstrat.errors import UserError
from hfstrat.recipe.data import Data

CHAT = make_tokenizer()
PLAIN = make_tokenizer(chat=False)
TALK = [
    {"role": "system", "content": "the hat"},
    {"role": "user", "content": "who sat"},
    {"role": "assistant", "content": "the cat sat"},
    {"role": "user", "content": "where"},
    {"role": "assistant", "content": "on the mat<|im_end|> and"},  # the end token within a turn is a token like any other
]


def encode(example: Example, tokenizer: Any = CHAT, train_on: str = "auto") -> tuple[list[int], list[int]]:
    renderer = Renderer(tokenizer, "auto", train_on)
    return renderer.encode(renderer.render(example))[0]


def trained_text(ids: list[int], labels: list[int], tokenizer: Any = CHAT) -> str:
    return str(tokenizer.decode([i for i, label in zip(ids, labels, strict=True) if label != IGNORED]))


def test_every_assistant_turn_and_its_end_is_trained_and_nothing_else() -> None:
    ids, labels = encode(Example(messages=TALK))
    assert trained_text(ids, labels) == "the cat sat<|im_end|>\non the mat<|im_end|> and<|im_end|>\n"
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))


def test_the_ids_decode_to_what_the_template_writes() -> None:
    ids, _ = encode(Example(messages=TALK))
    assert CHAT.decode(ids) == CHAT.apply_chat_template(TALK, tokenize=False)


@given(st.lists(st.text(max_size=30), min_size=2, max_size=6))
@settings(max_examples=60, deadline=None)
def test_masks_survive_any_text(texts: list[str]) -> None:
    roles = ["user", "assistant"] * 3
    talk = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    ids, labels = encode(Example(messages=talk))
    wanted = "".join(f"{m['content']}<|im_end|>\n" for m in talk if m["role"] == "assistant" and m["content"].strip())
    assert trained_text(ids, labels) == CHAT.decode(CHAT(wanted, add_special_tokens=False)["input_ids"])


def test_the_prompt_at_generation_has_the_ids_of_training() -> None:
    for tokenizer in (CHAT, PLAIN):
        renderer = Renderer(tokenizer, "auto")
        messages = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three"}]
        ids, labels = encode(Example(messages=messages), tokenizer)
        prompt = renderer.prompt_ids("one two")
        assert ids[: len(prompt)] == prompt
        assert labels[len(prompt)] != IGNORED
        assert all(label == IGNORED for label in labels[: len(prompt)])


def test_plain_rows_end_with_the_end_token_and_begin_as_the_tokenizer_begins() -> None:
    ids, labels = encode(Example(text="the cat"), PLAIN)
    assert ids[-1] == labels[-1] == PLAIN.eos_token_id
    assert labels[0] == IGNORED  # nothing predicts the first token
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ids, labels = encode(Example(messages=messages), PLAIN)
    assert PLAIN.decode(ids) == "a\n\nb<|im_end|>"
    assert trained_text(ids, labels, PLAIN) == "b<|im_end|>"


def test_bos_occurs_once() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(chat=False)
    tokenizer.bos_token = "<|im_start|>"
    processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    tokenizer.backend_tokenizer.post_processor = processor
    ids, _ = encode(Example(text="the cat"), tokenizer)
    assert ids.count(1) == 1
    assert ids[0] == 1
    tokenizer.chat_template = CHAT.chat_template
    ids, _ = encode(Example(messages=TALK[1:3]), tokenizer)
    assert ids.count(1) == 2  # the template's own, none in front


def test_train_on_all() -> None:
    ids, labels = encode(Example(messages=TALK), train_on="all")
    assert labels == [IGNORED, *ids[1:]]


def test_a_template_that_rewrites_earlier_turns_is_named() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    with pytest.raises(BadRow, match="renders the turns before message 3 differently"):
        encode(Example(messages=TALK), tokenizer)


FORMATS: dict[str, tuple[dict[str, Any], str]] = {
    "prompt-completion": ({"prompt": "one", "completion": "two"}, "two"),
    "conversational": ({"prompt": TALK[:2], "completion": TALK[2:3]}, "the cat sat"),
    "alpaca": ({"instruction": "one", "input": "red", "output": "two"}, "two"),
    "messages": ({"messages": TALK[:3]}, "the cat sat"),
    "text": ({"text": "one two"}, ""),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_detected_from_columns(name: str, tmp_path: Path) -> None:
    row, answer = FORMATS[name]
    file = write_jsonl(tmp_path / "rows.jsonl", [row, {**row}] * 2 + [_other(row)])
    made = prepare(Data(train=str(file), eval_size=1), CHAT, seed=0)
    assert made.statistics["train"].format == name.replace("conversational", "prompt-completion")
    first = next(r for r in [*made.train, *made.eval] if r["row"] == 0)
    told = trained_text(first["input_ids"], first["labels"])
    assert answer in told
    if name != "text":
        assert told == f"{answer}<|im_end|>\n"


def _other(row: dict[str, Any]) -> dict[str, Any]:
    """The same row with another text in its first column."""
    key = next(iter(row))
    value = "three" if isinstance(row[key], str) else [{"role": "user", "content": "three"}, TALK[2]][: len(row[key])]
    return {**row, key: value}


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "parquet", "txt", "jsonl.gz"])
def test_kinds_of_files(suffix: str, tmp_path: Path) -> None:
    from datasets import Dataset

    rows = [{"prompt": f"one {n}", "completion": "two, three"} for n in range(6)]
    table, file = Dataset.from_list(rows), tmp_path / f"rows.{suffix}"
    if suffix == "txt":
        file.write_text("".join(f"line {n}\n" for n in range(6)))
    elif suffix == "parquet":
        table.to_parquet(file)
    elif suffix in ("csv", "tsv"):
        table.to_csv(file, sep="," if suffix == "csv" else "\t")
    elif suffix == "json":
        file.write_text(json.dumps(rows))
    else:
        table.to_json(file)
    made = prepare(Data(train=str(file), eval_size=2), CHAT, seed=0)
    assert made.statistics["train"].rows_kept == 6
    assert (len(made.train), len(made.eval)) == (4, 2)


def long_rows(tmp_path: Path, count: int = 40) -> Path:
    rows = [{"prompt": f"one {n}", "completion": "cat " * (60 if n == 0 else 3)} for n in range(count)]
    return write_jsonl(tmp_path / "rows.jsonl", rows)


def test_the_statistics_add_up(tmp_path: Path) -> None:
    file = long_rows(tmp_path, 600)
    made = prepare(Data(train=str(file), max_length=64, eval_size=1), CHAT, seed=0)
    stats = made.statistics["train"]
    everything = prepare(Data(train=str(file), eval_size=1), CHAT, seed=0).statistics["train"]
    assert stats.rows_cut == 1
    assert stats.tokens + stats.tokens_lost == everything.tokens
    assert stats.supervised + stats.supervised_lost == everything.supervised
    assert "1 truncated" in stats.line()


def test_losing_supervised_tokens_is_refused_with_a_sufficient_length(tmp_path: Path) -> None:
    file = long_rows(tmp_path)
    with pytest.raises(UserError, match=r"max_length: (\d+) would keep") as info:
        prepare(Data(train=str(file), max_length=40), CHAT, seed=0)
    enough = int(str(info.value).split("max_length: ")[1].split()[0])
    prepare(Data(train=str(file), max_length=enough), CHAT, seed=0)
    dropped = prepare(Data(train=str(file), max_length=40, overflow="drop"), CHAT, seed=0).statistics["train"]
    assert dropped.rows_dropped == 1
    with pytest.raises(UserError, match=r"row 1: .* more than data.max_length = 40"):
        prepare(Data(train=str(file), max_length=40, overflow="error"), CHAT, seed=0)


def test_no_supervised_token_is_an_error(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "the cat " * 20, "completion": "mat"}] * 4)
    with pytest.raises(UserError, match="no token contributes to the loss"):
        prepare(Data(train=str(file), max_length=12), CHAT, seed=0)


def test_held_out_rows_share_nothing_with_training(tmp_path: Path) -> None:
    rows = [{"prompt": f"one {n % 20}", "completion": "two"} for n in range(60)]  # every row three times
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    made = prepare(Data(train=str(file), eval_size=10), CHAT, seed=0)
    sides = [{tuple(ids) for ids in part["input_ids"]} for part in (made.train, made.eval)]
    assert not sides[0] & sides[1]
    assert len(made.train) + len(made.eval) == 60
    assert prepare(Data(train=str(file), eval_size=10), CHAT, seed=0).eval["row"] == made.eval["row"]


def test_bad_rows_are_named(tmp_path: Path) -> None:
    for row, words in (
        ({"prompt": "a", "completion": None}, "row 3: 'completion' is null, expected text"),
        ({"messages": [{"role": "user", "content": "a"}]}, "row 3: 'messages' has no assistant turn"),
    ):
        good = {"prompt": "a", "completion": "b"} if "prompt" in row else {"messages": TALK[1:3]}
        file = write_jsonl(tmp_path / "rows.jsonl", [good, good, row])
        with pytest.raises(UserError, match=words):
            prepare(Data(train=str(file)), CHAT, seed=0)


def test_broken_json_far_down_is_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n' * 1500 + '{"prompt": "a", "comp\n')
    with pytest.raises(UserError, match=r"rows.jsonl:1501: this row is not valid JSON"):
        prepare(Data(train=str(file)), CHAT, seed=0)


def test_tokens_and_masks_equal_trl(rows: Path) -> None:
    """TRL's own preparation of conversational prompt and completion gives the same ids and the same mask."""
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    read = [json.loads(line) for line in rows.read_text().splitlines()]
    talks = [
        {
            "prompt": [{"role": "user", "content": r["prompt"]}],
            "completion": [{"role": "assistant", "content": r["completion"]}],
        }
        for r in read
    ]
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=320, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    config = SFTConfig(output_dir="/tmp/hfstrat-trl", report_to="none", use_cpu=True, bf16=False, max_length=None)
    theirs = SFTTrainer(model, config, train_dataset=Dataset.from_list(talks), processing_class=CHAT).train_dataset
    made = prepare(Data(train=str(rows), eval_size=1), CHAT, seed=0)
    for row in [*made.train, *made.eval]:
        their = theirs[row["row"]]
        assert row["input_ids"] == their["input_ids"]
        assert row["labels"] == their["labels"]


SHARED_FILES = {
    "llms_from_scratch/instruction.jsonl": {},
    "llamafactory_demos/alpaca_en_demo.jsonl": {},
    "llamafactory_demos/c4_demo.jsonl": {},
    "taskmaster4_chat/test.jsonl.gz": {},
    "gsm8k/test.jsonl": {"question": "prompt", "answer": "completion"},
    "tinyshakespeare/input.txt": {},
}


@pytest.mark.parametrize("name", SHARED_FILES)
def test_real_files(shared: Path, name: str) -> None:
    file = shared / "data" / name
    data = Data(train=str(file), columns=SHARED_FILES[name], max_length=32_768, eval_size=2)
    stats = prepare(data, CHAT, seed=0).statistics["train"]
    assert stats.rows_kept == stats.rows_read


@pytest.mark.slow
def test_the_demo_text_contains_each_topic_and_docstring_once(tmp_path: Path, run_script: Callable[..., str]) -> None:
    run_script("demo_text.py", str(tmp_path))
    texts = [
        [json.loads(line)["text"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "eval")
    ]
    assert len(texts[0]) > 3000
    assert 0.04 < len(texts[1]) / len(texts[0]) < 0.06
    assert not set(texts[0]) & set(texts[1])
    assert any('The "if" statement' in text for text in (*texts[0], *texts[1]))


@pytest.mark.slow
def test_the_demo_data_come_from_the_standard_library(tmp_path: Path, run_script: Callable[..., str]) -> None:
    folder = Path(__file__).parents[2] / "data" / "docstrings"  # what `make test-slow` has just made
    if not (folder / "train.jsonl").exists():
        run_script("demo_data.py", str(folder := tmp_path))
    parts = {name: [json.loads(line) for line in (folder / f"{name}.jsonl").open()] for name in ("train", "eval")}
    assert len(parts["train"]) > 4000
    assert 150 <= len(parts["eval"]) <= 200
    assert not {r["prompt"] for r in parts["train"]} & {r["prompt"] for r in parts["eval"]}
    body = {name: {r["prompt"].split("(", 1)[1] for r in rows} for name, rows in parts.items()}
    assert not body["train"] & body["eval"]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_a_csv_file_has_the_separator_of_its_first_line(separator: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    lines = [["text", "label"], ['"one; two, three|four"', "a"]]
    file.write_text("\ufeff" + "".join(separator.join(line) + "\n" for line in lines), encoding="utf-8")
    assert list(readers.read(file)) == [{"text": "one; two, three|four", "label": "a"}]

"""Nothing that is uploaded names this machine: planted secrets and paths are not in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.hub_runs import finished_run, recipe_of, report_of

from hfstrat.errors import UserError
from hfstrat.publish import staging
from hfstrat.publish.scrub import REMOVED, Scrubber, published_report, without_rows
from hfstrat.tasks.report import parse, read

PLANTED = "hf_" + "Pl4nted" * 4  # not a real token


@pytest.fixture
def scrubber() -> Scrubber:
    return Scrubber(recipe_of())


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("/home/somebody/data/train.jsonl", "train.jsonl"),
        ("~/models/base", "base"),
        ("file:///srv/x/y.json", "y.json"),
        (r"C:\Users\somebody\train.csv", "train.csv"),
        ("loaded /opt/models/Tiny-Base, then /tmp/a/b.txt", "loaded Tiny-Base, then b.txt"),
        ("data/mine/train.jsonl", "train.jsonl"),
        ("/data/*/part.jsonl", "part.jsonl"),
        (f"token={PLANTED}", f"token={REMOVED}"),
        ("https://me:secretword@host/x", f"https://{REMOVED}@host/x"),
        # what is not a path is unchanged
        ("https://huggingface.co/owner/name/tree/main", "https://huggingface.co/owner/name/tree/main"),
        ("owner/name", "owner/name"),
        ("accuracy/F1 of 3/4", "accuracy/F1 of 3/4"),
        ("<think></think>", "<think></think>"),
        ("Linux-6.1-x86_64", "Linux-6.1-x86_64"),
    ],
)
def test_paths_keep_their_last_part_and_secrets_nothing(scrubber: Scrubber, text: str, clean: str) -> None:
    assert scrubber.text(text) == clean


def test_a_home_folder_contains_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    scrubber = Scrubber(recipe_of())
    assert scrubber.text("/home/somebody and /home/somebody/x/y") == "~ and y"
    assert scrubber.leaks("in /home/somebody/x") == ["the folder /home/somebody"]


def test_known_paths_may_contain_spaces(tmp_path: Path) -> None:
    folder = tmp_path / "my own data"
    folder.mkdir()
    scrubber = Scrubber(recipe_of(data={"train": str(folder)}))
    assert scrubber.text(f"read from {folder}!") == "read from my own data!"


def test_values_of_secret_keys_are_removed(scrubber: Scrubber, monkeypatch: pytest.MonkeyPatch) -> None:
    value = {"api_key": "abc", "hub_token": "abc", "eos_token": "<s>", "tokenizer": "mine", "token_accuracy": 0.5}
    assert scrubber.value(value) == value | {"api_key": REMOVED, "hub_token": REMOVED}
    monkeypatch.setenv("MY_SERVICE_PASSWORD", "a word that is long")
    assert Scrubber(recipe_of()).text("so: a word that is long") == f"so: {REMOVED}"


def test_files_of_one_name_stay_two(scrubber: Scrubber) -> None:
    assert list(scrubber.value({"/a/b/x.jsonl": 1, "/a/c/x.jsonl": 2}).values()) == [1, 2]


def test_rows_are_left_out() -> None:
    shown = {"answers": [{"prompt": "p"}], "samples": ["a"], "train_duplicate_examples": ["a"], "loss": 1.0, "note": "x" * 999}
    assert without_rows({"a": [shown]}) == {"a": [{"loss": 1.0, "note": REMOVED}]}
    assert without_rows({"answers": {"rows": 3}}) == {"answers": {"rows": 3}}, "measurements of answers are not examples"


def test_answers_to_prompts_of_the_recipe_stay() -> None:
    own = recipe_of(evaluation={"prompts": ["a row of the evaluation data"]})
    assert len(published_report(parse(report_of(own)), Scrubber(own))["result"]["answers"]) == 1
    other = recipe_of()
    assert "answers" not in published_report(parse(report_of(other)), Scrubber(other))["result"]


def everything(folder: Path) -> str:
    return "\n".join(path.read_text("utf-8", "replace") for path in folder.rglob("*") if path.is_file())


def test_planted_secrets_and_paths_are_not_uploaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", PLANTED)
    where = tmp_path / "somewhere secret"
    where.mkdir()
    (where / "rows.jsonl").write_text("{}")
    planted: dict[str, Any] = {
        "data": {"train": str(where / "rows.jsonl"), "template": "/home/somebody/t.jinja"},
        "training": {"learning_rate": 1e-3, "extra": {"run_name": f"/home/somebody/deep/{PLANTED}"}},
        "evaluation": {"prompts": [f"what is {PLANTED}?"]},
        "output_dir": str(tmp_path / "somewhere secret" / "run"),
    }
    run = finished_run(tmp_path / "run", **planted)
    final = run / "final"
    config = {"_name_or_path": str(where), "note": f"from {where}/x", "key": PLANTED}
    (final / "config.json").write_text(json.dumps(config))
    up = tmp_path / "up"
    up.mkdir()
    staging.stage(run, read(run), up, "me/x")
    text = everything(up)
    for secret in (PLANTED, "somewhere secret", "somebody", str(tmp_path), "not to go up", "a row of the"):
        assert secret not in text, secret
    assert "Tiny-Base" in text


def test_what_cannot_be_cleaned_is_refused(tmp_path: Path) -> None:
    """The header of the weights is not cleaned: with a token in it nothing is uploaded."""
    from safetensors.numpy import save_file

    run = finished_run(tmp_path / "run")
    save_file({"a": np.zeros(3)}, run / "final" / "adapter_model.safetensors", metadata={"by": PLANTED})
    up = tmp_path / "up"
    up.mkdir()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors would reveal something that looks like a token"):
        staging.stage(run, read(run), up, "me/x")

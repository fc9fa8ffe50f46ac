"""Pushing to a Hub on the loopback: refused before training if it is impossible; afterwards it never fails a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.hub_runs import finished_run, recipe_of
from helpers.hub_server import TOKEN, LoopbackHub, in_process

from hfstrat import errors
from hfstrat.errors import RunError, UserError
from hfstrat.publish import push
from hfstrat.recipe.schema import Recipe
from hfstrat.tasks.report import read


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub() as served, in_process(served, tmp_path / "home"):
        yield served


@pytest.fixture(autouse=True)
def waits(server: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds between attempts, without waiting. After `server`, so that patches of a test are undone before it ends."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    return slept


def recipe_with(**settings: Any) -> Recipe:
    return Recipe.model_validate(recipe_of(hub={"push_to_hub": True, "repo_id": "me/x", **settings}))


def pushed(run: Path, **settings: Any) -> list[str]:
    return push.push(recipe_with(**settings), run, read(run))


# before training


def test_no_request_without_pushing(server: LoopbackHub, tmp_path: Path) -> None:
    recipe = Recipe.model_validate(recipe_of(hub={"repo_id": "me/x"}))
    assert push.prepare(recipe) == [] == push.push(recipe, tmp_path, {})
    assert server.requests == []


@pytest.mark.parametrize("private", [True, False])
def test_a_missing_repository_is_created(server: LoopbackHub, private: bool) -> None:
    assert push.check_access(recipe_with(private=private)) is not None
    assert server.repos == {}, "checking creates nothing"
    line = push.prepare(recipe_with(private=private))[0]
    assert server.repos["me/x"].private is private
    assert ("private" if private else "public") in line
    assert "created with the write token of me" in line
    assert "does not report in advance" in line


def test_access_to_an_existing_repository_is_checked(server: LoopbackHub) -> None:
    server.add("me/x")
    assert "exists, write access checked" in push.prepare(recipe_with())[0]
    assert server.count("auth-check/write") == 1
    assert server.count("POST") == 0


def test_a_name_without_owner_is_the_users(server: LoopbackHub) -> None:
    push.prepare(recipe_with(repo_id="y"))
    push.prepare(recipe_with(repo_id="ours/y"))
    assert set(server.repos) == {"me/y", "ours/y"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"repo_id": "others/x"}, "me cannot create it: expected one of me/..., ours/..."),
        ({"repo_id": "others/there"}, "this token may not write there"),
        ({"repo_id": "me/public"}, "me/public is public, but hub.private is true"),
        ({"repo_id": "no good/name"}, "expected owner/name"),
    ],
)
def test_what_cannot_be_pushed_to_is_refused(server: LoopbackHub, settings: dict[str, Any], words: str) -> None:
    server.add("others/there", private=False)
    server.add("me/public", private=False)
    with pytest.raises(UserError, match=words):
        push.prepare(recipe_with(**settings))
    assert server.count("POST") == 0


def test_a_token_that_only_reads(server: LoopbackHub) -> None:
    server.role = "read"
    with pytest.raises(UserError, match="is read-only"):
        push.prepare(recipe_with())


@pytest.mark.parametrize(("token", "words"), [("hf_" + "wrong" * 5, "is not valid"), ("", "no Hub token was found")])
def test_an_invalid_token(server: LoopbackHub, monkeypatch: pytest.MonkeyPatch, token: str, words: str) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match=words):
        push.prepare(recipe_with())


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"status": 403}, "may not write there"),
        ({"status": 503}, "the Hub answers 503"),
        ({"status": 429, "headers": {"Retry-After": "7"}}, "the Hub answers 429"),
        ({"cut": True}, "cannot be reached"),
    ],
)
def test_a_hub_that_refuses_always_is_a_sentence(server: LoopbackHub, fault: dict[str, Any], words: str) -> None:
    server.fail("repos/create", **fault)
    with pytest.raises(UserError, match=words):
        push.prepare(recipe_with())


@pytest.mark.parametrize("fault", [{"status": 503}, {"status": 429, "headers": {"Retry-After": "7"}}])
def test_a_request_that_fails_is_repeated(server: LoopbackHub, waits: list[float], fault: dict[str, Any]) -> None:
    server.fail("auth-check|whoami|create", times=2, **fault)
    push.prepare(recipe_with())
    assert "me/x" in server.repos
    assert ("headers" in fault) == (7.0 in waits), "Retry-After is respected"


def test_offline_is_a_choice(server: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"HF_HUB_OFFLINE is set; unset it, or set hub.push_to_hub=false, and `hfstrat push RUN"
    ):
        push.prepare(recipe_with())


def test_no_connection_is_a_sentence(server: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="the Hub cannot be reached"):
        push.prepare(recipe_with())


# after training


def test_exactly_the_listed_files_are_uploaded(server: LoopbackHub, tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    lines = pushed(run)
    files = server.repos["me/x"].main
    assert set(files) - {".gitattributes"} == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "more-1.safetensors", "chat_template.jinja"),
        *("generation_config.json", "recipe.yaml", "report.json", "tokenizer.json", "tokenizer_config.json"),
    }
    assert server.repos["me/x"].private
    assert files["adapter_model.safetensors"].content == (run / "final/adapter_model.safetensors").read_bytes()
    assert "pushed" in lines[0]
    assert "10 files were downloaded again into an empty cache" in lines[1]
    noted = json.loads((run / "report.json").read_text())["result"]["hub"]
    assert noted["compared"] is True
    assert noted["commit"] == server.repos["me/x"].branches["main"]


def test_an_adapter_names_its_local_base_without_its_path(server: LoopbackHub, tmp_path: Path) -> None:
    pushed(finished_run(tmp_path / "run"))
    config = json.loads(server.repos["me/x"].main["adapter_config.json"].content)
    assert config["base_model_name_or_path"] == f"local model 'Tiny-Base' (weights' sha256 {'fe' * 32})"
    tokens = json.loads(server.repos["me/x"].main["tokenizer_config.json"].content)
    assert tokens == {"eos_token": "<|im_end|>"}


def test_an_adapter_names_its_base_on_the_hub(server: LoopbackHub, tmp_path: Path) -> None:
    commit = "0123456789" * 4
    cached = f"/home/somebody/hub/models--owner--base/snapshots/{commit}"
    for number, model in enumerate(({"name_or_path": "owner/base", "revision": commit}, {"name_or_path": cached})):
        run = finished_run(tmp_path / f"run{number}", model=model)
        report = json.loads((run / "report.json").read_text())
        report["environment"]["model_sha256"] = commit
        (run / "report.json").write_text(json.dumps(report))
        pushed(run)
        config = json.loads(server.repos["me/x"].main["adapter_config.json"].content)
        assert (config["base_model_name_or_path"], config["revision"]) == ("owner/base", commit)
        assert b"base_model: owner/base" in server.repos["me/x"].main["README.md"].content
        assert b"somebody" not in b"".join(file.content for file in server.repos["me/x"].main.values())


def test_a_branch_is_created_and_pushed_to(server: LoopbackHub, tmp_path: Path) -> None:
    pushed(finished_run(tmp_path / "run"), revision="v2")
    repo = server.repos["me/x"]
    assert "README.md" in repo.commits[repo.branches["v2"]]
    assert "README.md" not in repo.main


def test_weights_of_an_earlier_push_are_deleted(server: LoopbackHub, tmp_path: Path) -> None:
    pushed(finished_run(tmp_path / "one", weights=3))
    pushed(finished_run(tmp_path / "two", weights=1))
    assert [name for name in server.repos["me/x"].main if name.endswith(".safetensors")] == ["adapter_model.safetensors"]


@pytest.mark.parametrize("where", ["PUT /lfs", "objects/batch", "preupload", "POST .*/commit", "verify", "tree", "resolve"])
@pytest.mark.parametrize("fault", [{"status": 503}, {"status": 429, "headers": {"Retry-After": "1"}}, {"cut": True}])
def test_a_transfer_that_fails_is_repeated(server: LoopbackHub, tmp_path: Path, where: str, fault: dict[str, Any]) -> None:
    server.fail(where, times=1, **fault)
    assert "pushed" in pushed(finished_run(tmp_path / "run"))[0]
    assert "README.md" in server.repos["me/x"].main


@pytest.mark.parametrize(
    ("where", "fault"),
    [
        ("PUT /lfs", {"status": 500}),
        ("PUT /lfs", {"cut": True}),
        ("POST .*/commit", {"status": 403}),
        ("resolve", {"status": 500}),
    ],
)
def test_a_failed_upload_does_not_fail_the_run(
    server: LoopbackHub, tmp_path: Path, where: str, fault: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push, "PATIENT", (0.0,))  # the library's own six attempts are repeated once
    run = finished_run(tmp_path / "run")
    server.fail(where, **fault)
    line = pushed(run)[0]
    assert line.startswith("not pushed")
    assert f"`hfstrat push {run}`" in line
    assert (run / "final" / "adapter_model.safetensors").is_file()
    with pytest.raises(RunError) as ended:
        push.push_run(str(run), "me/x", None, None)
    assert ended.value.code == errors.NOT_PUSHED
    assert "resumes the upload" in str(ended.value)


def test_a_push_resumes_where_it_stopped(server: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are on the Hub already are not uploaded again."""
    monkeypatch.setattr(push, "PATIENT", ())
    run = finished_run(tmp_path / "run", weights=4)
    server.fail("POST .*/commit", status=502)
    assert pushed(run)[0].startswith("not pushed")
    sent = server.count("PUT /lfs")
    assert sent == len(server.lfs) == 4
    server.heal()
    assert "pushed" in push.push_run(str(run), "me/x", None, None)[0]
    assert server.count("PUT /lfs") == sent
    commit = server.repos["me/x"].branches["main"]
    push.push_run(str(run / "final"), "me/x", None, None)
    assert server.repos["me/x"].branches["main"] == commit, "unchanged files make no new commit"


def test_a_hub_that_stores_other_bytes_is_detected(server: LoopbackHub, tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", weights=1)
    real = server.fault

    def corrupt(request: str) -> Any:
        for file in server.repos["me/x"].main.values() if "resolve" in request else ():
            file.content = file.content.replace(b"LORA", b"LORO")
        return real(request)

    server.fault = corrupt  # type: ignore[method-assign]
    with pytest.raises(RunError, match=r"adapter_config\.json differs from the pushed file"):
        push.push_run(str(run), "me/x", None, None)


def test_slow_responses_are_awaited(server: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with in_process(server, tmp_path / "home"):
        server.fail("PUT /lfs|resolve", slow=0.2)
        assert "pushed" in pushed(finished_run(tmp_path / "run", weights=1))[0]


def test_push_needs_a_finished_run_and_a_repository(server: LoopbackHub, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a finished run"):
        push.push_run(str(tmp_path), None, None, None)
    run = finished_run(tmp_path / "run")
    with pytest.raises(UserError, match="give one with --repo"):
        push.push_run(str(run), None, None, None)
    push.push_run(str(run), "me/z", False, None)
    assert server.repos["me/z"].private is False


def test_the_command_line(server: LoopbackHub, tmp_path: Path) -> None:
    """In a separate process with the token in its environment; an error is one sentence."""
    run = finished_run(tmp_path / "run", hub={"repo_id": "me/x"})
    command = [sys.executable, "-m", "hfstrat", "push", str(run)]
    known = {**os.environ, **server.environment(tmp_path / "other")}
    done = subprocess.run(command, env=known, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "compared" in done.stdout
    assert TOKEN not in done.stdout + done.stderr
    assert server.count("agent-harnesses") == 0, "no request without a purpose"
    offline = subprocess.run(command, env=known | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False)
    assert offline.returncode == errors.USER
    assert "HF_HUB_OFFLINE" in offline.stderr
    assert "Traceback" not in offline.stderr

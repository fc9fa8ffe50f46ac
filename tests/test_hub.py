"""Pushing: refused before training where it cannot work, and never the end of a run afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from hfstrat import hub
from hfstrat.errors import UserError


class Api:
    """Keeps what was asked of it; `broken` calls raise."""

    calls: list[tuple[str, dict[str, Any]]] = []
    broken: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> str:
            if name in self.broken:
                raise ConnectionError("the Hub is out of reach")
            Api.calls.append((name, kwargs))
            return "the address"

        return call


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> type[Api]:
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    Api.calls, Api.broken = [], set()
    return Api


def test_nothing_is_asked_unless_pushing(api: type[Api], recipe: Any, tmp_path: Path) -> None:
    hub.check_access(recipe().recipe)
    assert hub.push(recipe().recipe, tmp_path) == []
    assert api.calls == []


def test_repository_is_made_and_written_to(api: type[Api], recipe: Any, tmp_path: Path) -> None:
    wanted = recipe("hub={push: true, repo: me/x, private: false}").recipe
    hub.check_access(wanted)
    assert hub.push(wanted, tmp_path) == ["pushed           the address"]
    assert [name for name, _ in api.calls] == ["whoami", "repo_exists", "auth_check", "create_repo", "upload_folder"]
    assert api.calls[3][1]["private"] is False
    assert api.calls[4][1] == {"repo_id": "me/x", "folder_path": tmp_path, "commit_message": "hfstrat: trained and verified"}


def test_no_access_is_said_before_training(api: type[Api], recipe: Any) -> None:
    api.broken = {"auth_check"}
    with pytest.raises(UserError, match="cannot be written to"):
        hub.check_access(recipe("hub={push: true, repo: me/x}").recipe)


def test_a_failed_upload_does_not_fail_the_run(api: type[Api], recipe: Any, tmp_path: Path) -> None:
    api.broken = {"upload_folder"}
    assert "the result is complete in" in hub.push(recipe("hub={push: true, repo: me/x}").recipe, tmp_path)[0]

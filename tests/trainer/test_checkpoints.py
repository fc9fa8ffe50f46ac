"""Incomplete checkpoints are ignored, and the recipe of a resumed run is compared with that of the checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from hfstrat.errors import UserError
from hfstrat.recipe import library, stored
from hfstrat.recipe.load import load_recipe
from hfstrat.trainer import checkpoints


def make(folder: Path, step: int, recipe: dict[str, Any] | None = None) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(b"weights" * step)
    (checkpoint / "trainer_state.json").write_text('{"global_step": 2}')
    checkpoints.mark_complete(checkpoint, {"recipe": recipe or {"seed": 1}})
    return checkpoint


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("model.safetensors", cut, "model.safetensors has 27 of 28 bytes"),
        ("model.safetensors", flip, "model.safetensors was changed"),
        ("trainer_state.json", flip, "trainer_state.json was changed"),
        ("trainer_state.json", Path.unlink, "trainer_state.json is missing"),
        (checkpoints.MARKER, Path.unlink, "saving was interrupted"),
        (checkpoints.MARKER, cut, "cannot be read"),
        (checkpoints.MARKER, lambda file: file.write_text(file.read_text().replace('"seed": 1', '"seed": 2')), "was changed"),
    ],
)
def test_a_broken_checkpoint_is_skipped_with_the_reason(tmp_path: Path, name: str, damage: Any, words: str) -> None:
    whole, broken = make(tmp_path, 2), make(tmp_path, 4)
    damage(broken / name)
    found, remarks = checkpoints.find_resume(tmp_path, "auto", {"seed": 1})
    assert found == whole
    assert len(remarks) == 1
    assert "checkpoint-4 is incomplete and skipped" in remarks[0]
    assert words in remarks[0]
    with pytest.raises(UserError, match=words):
        checkpoints.find_resume(tmp_path, str(broken), {"seed": 1})
    shutil.rmtree(whole)
    assert checkpoints.find_resume(tmp_path, "auto", {"seed": 1})[0] is None


def test_what_is_large_is_not_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "MAX_HASHED", 20)
    marker = json.loads((make(tmp_path, 4) / checkpoints.MARKER).read_text())
    assert set(marker["sha256"]) == {"trainer_state.json"}
    assert set(marker["sizes"]) == {"trainer_state.json", "model.safetensors"}


def test_rotation_keeps_the_last_complete_one(tmp_path: Path) -> None:
    first, second, third = (make(tmp_path, step) for step in (2, 4, 6))
    cut(third / "model.safetensors")
    checkpoints.rotate(tmp_path, 1, None)
    assert not first.exists()
    assert checkpoints.fault(second, read=False) is None
    assert third.exists()  # newer than the last complete one: it may still be being written


def test_a_path_in_another_folder_resumes_where_it_was_interrupted(tmp_path: Path) -> None:
    named = make(tmp_path / "a", 4)
    recipe = {"training": {"resume_from_checkpoint": str(named)}, "output_dir": "b"}
    assert checkpoints.find_resume(tmp_path / "b", str(named), recipe | {"seed": 1})[0] == named
    later = make(tmp_path / "b", 6, recipe | {"seed": 1})
    found, remarks = checkpoints.find_resume(tmp_path / "b", str(named), recipe | {"seed": 1})
    assert found == later
    assert "already continued from" in remarks[0]
    make(tmp_path / "c", 6)  # of another run
    with pytest.raises(UserError, match="has later checkpoints of another run, up to checkpoint-6"):
        checkpoints.find_resume(tmp_path / "c", str(named), recipe | {"seed": 1})


def test_a_checkpoint_of_the_version_before_is_resumed(tmp_path: Path) -> None:
    """The keys of its recipe had other names."""
    old = {"strategy": {"name": "lora", "alpha": 8, "init_lora_weights": "default"}, "training": {"resume": "auto"}}
    lora, training = {"name": "lora", "lora_alpha": 8, "init_lora_weights": True}, {"resume_from_checkpoint": "auto"}
    folder = make(tmp_path, 4, old)
    assert checkpoints.find_resume(tmp_path, "auto", {"strategy": lora, "training": training}) == (folder, [])
    with pytest.raises(UserError, match=r"strategy\.lora_alpha was 8, is 9"):
        checkpoints.find_resume(tmp_path, "auto", {"strategy": {**lora, "lora_alpha": 9}, "training": training})


BEFORE = {
    "seed": 1,
    "model": {"name_or_path": "a"},
    "training": {
        "num_train_epochs": 1.0,
        "max_steps": None,
        "max_time": None,
        "save_steps": None,
        "learning_rate": 0.1,
        "extra": {},
    },
    "evaluation": {"max_rows": 5},
    "hub": {"push_to_hub": False},
}


def changed(section: str, **keys: Any) -> dict[str, Any]:
    return {**BEFORE, section: {**BEFORE[section], **keys}}  # type: ignore[dict-item]


def test_allowed_changes_resume_and_are_reported() -> None:
    allowed, refused = stored.compare(BEFORE, changed("training", save_steps=10, num_train_epochs=2.0))
    assert allowed == ["training.num_train_epochs was 1.0, is 2.0", "training.save_steps was None, is 10"]
    assert not refused
    assert stored.compare(BEFORE, changed("hub", push_to_hub=True)) == ([], [])
    assert stored.compare(BEFORE, changed("training", extra={"dataloader_num_workers": 2}))[1] == []
    assert stored.compare(BEFORE, changed("evaluation", max_rows=7))[0]


def test_what_may_not_is_refused_by_name() -> None:
    other = changed("training", learning_rate=0.2, extra={"adam_beta2": 0.9}) | {"seed": 2}
    assert stored.compare(BEFORE, other)[1] == [
        "seed was 1, is 2",
        "training.extra.adam_beta2 was None, is 0.9",
        "training.learning_rate was 0.1, is 0.2",
    ]


def test_a_key_that_an_older_version_did_not_have_is_no_change() -> None:
    assert stored.compare(BEFORE, changed("model", quantization=None)) == ([], [])
    assert stored.compare(BEFORE, changed("model", quantization="nf4"))[1]


@pytest.mark.parametrize(
    ("keys", "longer"),
    [
        ({"num_train_epochs": 2.0}, True),
        ({"num_train_epochs": 0.5}, False),
        ({}, False),
        ({"max_steps": 100}, False),
        ({"num_train_epochs": 2.0, "max_steps": 100}, False),
    ],
)
def test_a_longer_run(keys: dict[str, Any], longer: bool) -> None:
    assert stored.is_longer(BEFORE, changed("training", **keys)) is longer


def test_more_time_is_longer() -> None:
    ten, twenty = (changed("training", num_train_epochs=None, max_time=time) for time in ("10min", "20min"))
    assert stored.is_longer(ten, twenty)
    assert not stored.is_longer(twenty, ten)


@pytest.mark.parametrize("name", library.names("recipes"))
def test_a_key_that_an_earlier_version_did_not_have_changes_nothing_at_its_default(name: str) -> None:
    """Whatever key is new: its default is what the version without it did. Sections that are new are absent as a whole."""
    now = load_recipe(str(library.find("recipes", name))).recipe.model_dump()
    kept = stored.defaults(now)
    assert {"data.bad_rows", "model.trust_remote_code"} <= kept
    before = without(now, kept)
    assert stored.compare(before, now)[1] == []
    other = {**now, "model": {**now["model"], "trust_remote_code": True}}
    assert stored.compare(before, other)[1] == ["model.trust_remote_code was None, is True"]


def without(tree: dict[str, Any], keys: set[str], prefix: str = "") -> dict[str, Any]:
    """A tree without some dotted keys, and without sections that are empty then."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        inner = without(value, keys, f"{prefix}{key}.") if isinstance(value, dict) and f"{prefix}{key}" not in keys else value
        if f"{prefix}{key}" not in keys and inner != {}:
            found[key] = inner
    return found

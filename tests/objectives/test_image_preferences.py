"""Preferences between answers to prompts with images: rows and losses, against TRL's trainers, and complete runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.runs import folder_of, run, stop_at, weights
from helpers.vision_language import image_pairs, loaded

from hfstrat.data.image_places import MARK
from hfstrat.data.image_preferences import reader
from hfstrat.data.image_text_batches import ImageTextCollator, images_of
from hfstrat.data.media_files import MediaRef
from hfstrat.data.preference_rows import two
from hfstrat.data.preferences import EQUAL, OTHER_PROMPT
from hfstrat.data.render import IGNORED
from hfstrat.data.values import BadRow
from hfstrat.errors import UserError
from hfstrat.models.fused_loss import bind_head_loss
from hfstrat.objectives.preference.collate import REFERENCE, PreferenceCollator
from hfstrat.objectives.preference.loss import PreferenceLoss
from hfstrat.objectives.preference.task import ImagePreferenceRows
from hfstrat.recipe.data import Data
from hfstrat.recipe.load import load_recipe
from hfstrat.recipe.objectives import Dpo, Kto, Orpo

FAMILIES = ["llava", "qwen2_5_vl"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_pairs(tmp_path_factory.mktemp("pairs"), 20)


def prepared(section: Any, file: Path, processor: Any, **data: Any) -> Any:
    given = Data.model_validate({"train": str(file), "eval_size": 4, "max_length": 512, **data})
    return ImagePreferenceRows(section).prepare(given, processor, 0)


def model_of(folder: Path, noise: float = 0.0) -> Any:
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += noise * torch.randn(parameter.shape, generator=generator)
    return model


def answer(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


def words_of(ids: list[int], processor: Any) -> str:
    return str(processor.decode([i for i in ids if i not in processor.image_ids]))


def turns_of(part: dict[str, Any], processor: Any) -> tuple[str, str]:
    """The question and the answer of a token row."""
    words = words_of(part["input_ids"], processor)
    question = words[words.index("the colors") :].partition("<|im_end|>")[0]
    return question, words.rpartition("assistant\n")[2].partition("<|im_end|>")[0]


def in_trl_form(row: dict[str, Any], processor: Any) -> dict[str, Any]:
    (question, chosen), (_, rejected) = (turns_of(part, processor) for part in two(row))
    given = {"prompt": [{"role": "user", "content": question}], "chosen": answer(chosen), "rejected": answer(rejected)}
    return {**given, "images": images_of(row)}


def arguments(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "max_length": None,
        "gradient_checkpointing": False,
    }


def ours_of(model: Any, section: Any, rows: list[dict[str, Any]], processor: Any) -> torch.Tensor:
    """The loss of a batch of token rows, by the forward that is bound to the model."""
    plain = ImageTextCollator(processor, 1, False, selects_rows=True)
    collate = PreferenceCollator(plain, section.name == "orpo", section.name == "kto")
    batch = {name: value for name, value in collate(rows).items() if name != "labels"}
    loss: torch.Tensor = model(**batch).loss
    return loss


def logps_by(model: Any, rows: list[dict[str, Any]], processor: Any) -> list[list[float]]:
    """The log-probabilities of the two answers of each row, from all logits of the model."""
    found = []
    for row in rows:
        sums = []
        for part in two(row):
            batch = ImageTextCollator(processor, 1, False)([part])
            labels = batch.pop("labels")[:, 1:]
            with torch.no_grad():
                logits = model(**batch).logits[:, :-1].log_softmax(-1)
            each = logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
            sums.append(float((each * (labels != IGNORED)).sum()))
        found.append(sums)
    return found


ONE, OTHER = MediaRef("/a.png"), MediaRef("/b.png")
USER = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what"}]}]
PLAIN = [{"role": "user", "content": "what"}]
SHARED = {"chosen": answer("red"), "rejected": answer("blue")}
READ: dict[str, tuple[dict[str, Any], tuple[MediaRef, ...], str]] = {
    "TRL": ({"prompt": USER, "images": [ONE], **SHARED}, (ONE,), ""),
    "no place": ({"prompt": PLAIN, "images": [ONE, OTHER], **SHARED}, (ONE, OTHER), ""),
    "a text": ({"prompt": "what <image>", "image": ONE, "chosen": "red", "rejected": "blue"}, (ONE,), ""),
    "LLaMA-Factory": (
        {
            "conversations": [{"from": "human", "value": "<image>what"}],
            "images": [ONE],
            "chosen": {"from": "gpt", "value": "red"},
            "rejected": {"from": "gpt", "value": "blue"},
        },
        (ONE,),
        "",
    ),
    "conversations": (
        {"chosen": [*USER, *answer("red")], "rejected": [*USER, *answer("blue")], "images": [ONE]},
        (ONE,),
        "",
    ),
    "conversations without places": (
        {"chosen": [*PLAIN, *answer("red")], "rejected": [*PLAIN, *answer("blue")], "images": [ONE]},
        (ONE,),
        "",
    ),
    "a prompt and conversations": (
        {"prompt": USER, "chosen": [*USER, *answer("red")], "rejected": [*USER, *answer("blue")], "images": [ONE]},
        (ONE,),
        "",
    ),
    "messages beside a text that is read": ({"prompt": "q", "messages": PLAIN, "images": [ONE], **SHARED}, (ONE,), ""),
    "messages beside a prompt, both with places": ({"prompt": USER, "messages": USER, "images": [ONE], **SHARED}, (ONE,), ""),
    "a text beside conversations with places": (
        {"prompt": "what", "chosen": [*USER, *answer("red")], "rejected": [*USER, *answer("blue")], "images": [ONE]},
        (ONE,),
        "",
    ),
    "messages and a text beside conversations": (
        {
            "prompt": "what",
            "messages": [*PLAIN, *answer("red")],
            "chosen": [*PLAIN, *answer("red")],
            "rejected": [*PLAIN, *answer("blue")],
            "images": [ONE],
        },
        (ONE,),
        "",
    ),
    "own images": (
        {"prompt": [{"role": "user", "content": [{"type": "image", "path": ONE}, {"type": "text", "text": "x"}]}], **SHARED},
        (ONE,),
        "",
    ),
    "equal answers": ({"prompt": USER, "images": [ONE], "chosen": "red", "rejected": "red"}, (), EQUAL),
    "no images": ({"prompt": PLAIN, **SHARED}, (), ""),
}


def reading(row: dict[str, Any], unpaired: bool = False) -> Any:
    return reader(unpaired)([row], "rows", "auto", {})


@pytest.mark.parametrize("name", READ)
def test_images_are_those_of_the_prompt(name: str) -> None:
    row, images, problem = READ[name]
    found = reading(row).example(row)
    assert (found.images, found.problem) == (images, problem)
    if not problem:
        assert "".join(turn["content"] for turn in found.messages).count(MARK) == len(images)
        assert [turn["content"] for each in found.answers for turn in each] == ["red", "blue"]
        assert ("images" in found.prompt) if images else not isinstance(found.prompt, dict)


def own(ref: MediaRef) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", "path": ref}]}]


def test_conversations_about_different_images_are_no_pair() -> None:
    row = {"chosen": [*own(ONE), *answer("red")], "rejected": [*own(OTHER), *answer("blue")]}
    assert reading(row).example(row).problem == OTHER_PROMPT


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": USER, "images": [ONE, OTHER], **SHARED}, "1 place for images.*2 images in its column"),
        ({"prompt": [*USER, *USER], "images": [ONE], **SHARED}, "2 places for images.*1 image in its column"),
        ({"prompt": USER, **SHARED}, "1 place for images.*0 images"),
        ({"prompt": PLAIN, "images": [ONE], "chosen": "red <image>", "rejected": "blue"}, "an image is in an answer"),
        ({"prompt": "see", "images": ["https://e.x/a.png"], **SHARED}, "on the network"),
        ({"prompt": "see <image>", **SHARED}, "the row has no images"),
        ({"chosen": "red", "rejected": "blue", "images": [ONE]}, "no prompt to place them in"),
    ],
)
def test_rows_that_do_not_fit_are_refused(row: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRow, match=words):
        reading(row).example(row)


def test_answers_with_labels_have_the_images_of_their_conversation() -> None:
    row = {"messages": [*USER, *answer("red")], "label": True, "images": [ONE]}
    found = reading(row, unpaired=True).example(row)
    assert (found.images, found.desirable, found.answer) == ((ONE,), True, "red")


def test_token_rows(made: Any, pairs: Path, tmp_path: Path) -> None:
    """Both sequences have the images of the prompt, of which no token has loss; an image is not cut, and a broken one named."""
    processor = loaded(made("llava"), "llava")
    data = prepared(Dpo(name="dpo"), pairs, processor)
    assert data.image_facts()["most_images"] == 2
    plain = ImageTextCollator(processor, 1, False, selects_rows=True)
    for row in data.train:
        parts = two(row)
        assert row["image_tokens"] == sum(i in processor.image_ids for i in row["input_ids"])
        for part in parts:
            spans = zip(part["spans"][::2], part["spans"][1::2], strict=True)
            inside = [i for start, end in spans for i in part["input_ids"][start:end]]
            assert len(part["images"]) * 16 == len(inside) == sum(i in processor.image_ids for i in part["input_ids"])
            assert set(inside) <= set(processor.image_ids)
        trained = PreferenceCollator(plain, trains_prompts=True)([row])
        assert not set(trained["targets"].tolist()) & set(processor.image_ids)
        assert len(trained["targets"]) > len(PreferenceCollator(plain)([row])["targets"])
    with pytest.raises(UserError, match=r"row 2: .* an image is never cut.*data.overflow: drop"):
        prepared(Dpo(name="dpo"), pairs, processor, max_length=20)
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    for row in rows:
        row["images"] = [str(pairs.parent / name) for name in row["images"]]
    (tmp_path / "broken.png").write_bytes(b"no image")
    file = tmp_path / "pairs.jsonl"
    more = [{**row, "prompt": [{"role": "user", "content": f"again {n}"}], "images": []} for n, row in enumerate(rows)]
    rows.append({"prompt": USER, **SHARED, "images": ["broken.png"]})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows + more))
    lines = " ".join(prepared(Dpo(name="dpo"), file, processor).lines())
    assert "broken.png" in lines
    assert "1 image that cannot be read" in lines


@pytest.mark.parametrize("section", [Dpo(name="dpo"), pytest.param(Orpo(name="orpo"), marks=pytest.mark.slow)])
def test_equal_splits_of_a_batch_have_equal_gradients(section: Any, made: Any, pairs: Path) -> None:
    processor, model = loaded(made("llava"), "llava"), model_of(made("llava"), 0.05)
    rows = [prepared(section, pairs, processor).train[index] for index in range(6)]
    assert bind_head_loss(model, PreferenceLoss(section)) is None
    model.train()
    for row in rows if section.has_reference else []:
        row[REFERENCE] = [-20.0, -21.0]
    plain = ImageTextCollator(processor, 1, False, selects_rows=True)
    collate = PreferenceCollator(plain, section.name == "orpo")
    share = len(rows) / sum(len(collate([row])["pair_sequence"]) - len(_second(collate([row]))) for row in rows)

    def gradient(parts: list[list[dict[str, Any]]]) -> dict[str, torch.Tensor]:
        model.zero_grad()
        for part in parts:
            batch = {name: value for name, value in collate(part).items() if name != "labels"}
            batch |= {"pair_share": torch.tensor(share)} if section.name == "orpo" else {}
            model(**batch, num_items_in_batch=len(rows)).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    whole, single = gradient([rows]), gradient([[row] for row in rows])
    assert whole.keys() == single.keys()
    for name, one in whole.items():
        assert float((one - single[name]).abs().max()) < 1e-5, name


def _second(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The positions with loss of the second sequences."""
    return (batch["pair_sequence"] % 2).nonzero()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_dpo_trainer(family: str, made: Any, pairs: Path, tmp_path: Path) -> None:
    """With a reference other than the model, whose log-probabilities are a column."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    folder, section = made(family), Dpo(name="dpo", beta=0.3)
    processor = loaded(folder, family)
    data = prepared(section, pairs, processor)
    rows = [row for row in data.train if row["images"]][:4]
    assert max(len(row["images"]) for row in rows) == 2
    model, reference = model_of(folder, 0.05), model_of(folder)
    for row, logps in zip(rows, logps_by(reference, rows, processor), strict=True):
        row[REFERENCE] = logps
    assert bind_head_loss(model, PreferenceLoss(section)) is None
    model.train()
    ours = ours_of(model, section, rows, processor)
    ours.backward()

    given = [in_trl_form(row, processor) for row in rows]
    theirs = model_of(folder, 0.05)
    args = DPOConfig(**arguments(tmp_path), beta=0.3)
    trainer = DPOTrainer(
        model=theirs,
        ref_model=reference,
        args=args,
        train_dataset=Dataset.from_list(given),
        processing_class=processor.processor,
    )
    theirs.train()
    loss = trainer.compute_loss(theirs, dict(trainer.data_collator([dict(row) for row in given])))
    loss.backward()
    assert abs(float(ours) - 0.6931) > 1e-3
    assert abs(float(ours) - float(loss)) < 1e-5
    expected = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        one, other = parameter.grad, expected[name].grad
        if one is None or other is None:
            assert one is other, name
            continue
        assert float((one - other).abs().max()) < 1e-5, name


@pytest.mark.slow
def test_answers_with_labels_have_the_loss_of_kto_trainer(made: Any, tmp_path: Path) -> None:
    """With the loss that has no divergence: TRL estimates it on answers to other prompts of the same batch."""
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    folder, weighted = made("llava"), {"loss_type": "apo_zero_unpaired", "beta": 0.3, "desirable_weight": 1.3}
    section = Kto(name="kto", **weighted)
    processor = loaded(folder, "llava")
    data = prepared(section, image_pairs(tmp_path, 20, labeled=True), processor)
    rows = [row for row in data.train if row["images"]][:4]
    assert {row["desirable"] for row in rows} == {0, 1}
    model, reference = model_of(folder, 0.05), model_of(folder)
    for row, logps in zip(rows, logps_by(reference, rows, processor), strict=True):
        row[REFERENCE] = logps
    assert bind_head_loss(model, PreferenceLoss(section)) is None
    ours = ours_of(model, section, rows, processor)
    given = []
    for row in rows:
        question, text = turns_of(two(row)[0], processor)
        turns = {"prompt": [{"role": "user", "content": question}], "completion": answer(text)}
        given.append({**turns, "label": row["desirable"] == 1, "images": images_of(row)})
    trainer = KTOTrainer(
        model=model_of(folder, 0.05),
        ref_model=reference,
        args=KTOConfig(**arguments(tmp_path), **weighted),
        train_dataset=Dataset.from_list(given),
        processing_class=processor.processor,
    )
    loss = trainer.compute_loss(trainer.model, dict(trainer.data_collator([dict(row) for row in given])))
    assert abs(float(ours) - float(loss)) < 1e-5


def recipe(folder: Path, model: Path, rows: Path, *overrides: str, objective: str = "dpo") -> Any:
    folder.mkdir()
    given = {
        "task": "image-text-to-text",
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "strategy": {"name": "lora", "r": 2, "freeze": ["vision", "projector"]},
        "objective": objective,
        "data": {"train": str(rows), "eval_size": 4},
        "training": {"max_steps": 4, "global_batch_size": 4, "learning_rate": 3e-3, "eval_steps": 2, "logging_steps": 1},
        "evaluation": {"samples": 2, "max_new_tokens": 2, "control": "off"},
        "output_dir": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(given))
    return load_recipe(str(folder / "recipe.yaml"), list(overrides))


@pytest.mark.slow
def test_cached_features_change_nothing_and_a_resumed_run_is_the_same(
    tmp_path: Path, made: Any, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = []
    for mode in ("false", "true"):
        loaded = recipe(tmp_path / mode, made("llava"), pairs, f"image.precompute={mode}")
        found = run(loaded)["result"]
        assert ("vision_features" in found) == (mode == "true")
        assert found["metrics_after"]["rewards/accuracies"] > 0.5
        losses.append([entry["loss"] for entry in found["losses"]] + [found["metrics_after"]["loss"]])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    parts = recipe(tmp_path / "parts", made("llava"), pairs, "image.precompute=true")
    with monkeypatch.context() as patched:
        stop_at(patched, 3)
        with pytest.raises(KeyboardInterrupt):
            run(parts)
    run(parts)
    one, other = weights(folder_of(loaded)), weights(folder_of(parts))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    page = (folder_of(loaded) / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") >= 3
    assert "never cut" not in page


@pytest.mark.slow
def test_pairs_train_as_answers_with_labels(tmp_path: Path, made: Any, pairs: Path) -> None:
    loaded = recipe(tmp_path / "run", made("llava"), pairs, "training.max_steps=2", objective="kto")
    found = run(loaded)["result"]
    assert found["verified"]["max_difference"] < 1e-4

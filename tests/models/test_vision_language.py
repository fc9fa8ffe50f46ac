"""Laws of vision-language models, on tiny random models of eight families."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.vision_language import FAMILIES, conversations, loaded

from hfstrat.data.image_chats import prepare
from hfstrat.data.image_text_batches import ImageTextCollator, images_of
from hfstrat.data.render import IGNORED
from hfstrat.errors import UserError
from hfstrat.models import vision_parts
from hfstrat.models.fused_loss import bind_head_loss
from hfstrat.recipe.data import Data
from hfstrat.recipe.load import load_recipe
from hfstrat.tasks import TASKS

FAST = ("llava", "qwen2_5_vl")


def families() -> list[Any]:
    return [family if family in FAST else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return conversations(tmp_path_factory.mktemp("chats"))


def model_of(folder: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder)


def rows_of(data: Any, count: int = 8) -> list[dict[str, Any]]:
    return [data.train[index] for index in range(min(count, len(data.train)))]


@pytest.mark.parametrize("family", families())
def test_ids_are_those_of_the_processor_and_images_have_no_loss(family: str, made: Any, chats: Path) -> None:
    processor = loaded(made(family), family)
    data = prepare(Data.model_validate({"train": str(chats), "eval_size": 4, "train_on": "all"}), processor, 0)
    for row in rows_of(data, 20):
        content = [{"type": "image"}] * len(row["images"])
        words = processor.decode([i for i in row["input_ids"] if i not in processor.image_ids])
        assert "<|im_start|>user" in words
        supervised = {i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORED}
        assert not supervised & set(processor.image_ids)
        text = words[words.index("the colors") :].partition("<|im_end|>")[0]
        answer = words.rpartition("assistant\n")[2].partition("<|im_end|>")[0]
        turns = [
            {"role": "user", "content": [*content, {"type": "text", "text": text}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        whole = processor.words.apply_chat_template(turns, tokenize=False)
        pictures = {"images": [images_of(row)]} if row["images"] else {}
        expected = processor.processor(text=[whole], add_special_tokens=False, **pictures)
        assert row["input_ids"] == list(expected["input_ids"][0])
        if processor.type_key:
            assert processor.types(row["input_ids"]) == list(expected[processor.type_key][0])


@pytest.mark.parametrize("family", families())
def test_loss_and_gradients_are_those_of_trl(family: str, made: Any, chats: Path, tmp_path: Path) -> None:
    """`SFTTrainer` on the same rows as prompts with completions; our loss is the one bound to the model's forward."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    if family == "smolvlm":
        pytest.skip("its processor renders conversations with the settings of its processor of videos, which needs torchvision")
    folder = made(family)
    processor = loaded(folder, family)
    data = prepare(Data.model_validate({"train": str(chats), "eval_size": 4}), processor, 0)
    rows = [row for row in rows_of(data, 20) if row["images"]][:4]
    assert len(rows) == 4
    assert max(len(row["images"]) for row in rows) == 2
    model = model_of(folder)
    assert bind_head_loss(model) is None
    model.train()
    batch = ImageTextCollator(processor, 1, False, selects_rows=True)(rows)
    batch.pop("labels")
    ours = model(**batch).loss
    ours.backward()

    def text(ids: list[int]) -> str:
        return str(processor.decode([i for i in ids if i not in processor.image_ids]))

    given = []
    for row in rows:
        words = text(row["input_ids"])
        question = words[words.index("the colors") :].partition("<|im_end|>")[0]
        answer = words.rpartition("assistant\n")[2].partition("<|im_end|>")[0]
        turns = {"prompt": [{"role": "user", "content": question}], "completion": [{"role": "assistant", "content": answer}]}
        given.append({**turns, "images": images_of(row)})
    theirs = model_of(folder)
    args = SFTConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        bf16=False,
        max_length=None,
        gradient_checkpointing=False,
    )
    trainer = SFTTrainer(model=theirs, args=args, train_dataset=Dataset.from_list(given), processing_class=processor.processor)
    theirs.train()
    inputs = trainer.data_collator([dict(row) for row in given])
    loss = trainer.compute_loss(theirs, dict(inputs))
    loss.backward()
    assert abs(float(ours) - float(loss)) < 1e-5
    expected = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        one, other = parameter.grad, expected[name].grad
        if one is None or other is None:
            assert one is other, name
            continue
        assert float((one - other).abs().max()) < 1e-5, name


@pytest.mark.parametrize("family", families())
def test_splits_of_a_batch_have_equal_gradients(family: str, made: Any, chats: Path) -> None:
    processor = loaded(made(family), family)
    data = prepare(Data.model_validate({"train": str(chats), "eval_size": 4}), processor, 0)
    rows, model = rows_of(data, 6), model_of(made(family))
    assert bind_head_loss(model) is None
    model.train()
    collate = ImageTextCollator(processor, 1, False, selects_rows=True)
    items = sum(label != IGNORED for row in rows for label in row["labels"])

    def gradient(parts: list[list[dict[str, Any]]]) -> dict[str, torch.Tensor]:
        model.zero_grad()
        for part in parts:
            batch = collate(part)
            batch.pop("labels")
            model(**batch, num_items_in_batch=items).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    whole, single = gradient([rows]), gradient([[row] for row in rows])
    assert whole.keys() == single.keys()
    for name, one in whole.items():
        assert float((one - single[name]).abs().max()) < 1e-5, name


@pytest.mark.parametrize("family", families())
@pytest.mark.parametrize("trained", ["all", "projector"])
def test_a_batch_without_images_gives_every_trained_parameter_a_gradient(
    family: str, trained: str, made: Any, chats: Path
) -> None:
    """Else a process with such a batch would wait for others that reduce the gradients of the tower, or they for it."""
    processor = loaded(made(family), family)
    data = prepare(Data.model_validate({"train": str(chats), "eval_size": 4}), processor, 0)
    rows, model = [row for row in rows_of(data, 20) if not row["images"]][:2], model_of(made(family))
    assert len(rows) == 2
    assert bind_head_loss(model) is None
    if trained == "projector":
        vision_parts.freeze(model, ["vision", "language"])
    model.train()
    collate = ImageTextCollator(processor, 1, False, selects_rows=True)
    batch = {name: value for name, value in collate(rows).items() if name != "labels"}
    plain = model(**batch).loss
    undo = vision_parts.use_all(model)
    loss = model(**batch).loss
    assert float(loss) == float(plain)
    loss.backward()
    prefixes = vision_parts.prefixes_of(model)
    for name, parameter in model.named_parameters():
        behind = vision_parts.role_of(name, prefixes) != vision_parts.LANGUAGE
        if behind and parameter.requires_grad:
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name
    undo()
    assert model(**batch).loss.requires_grad is (trained == "all")


def test_rows_without_images_are_refused_where_the_model_is_sharded(made: Any, chats: Path) -> None:
    """A process without an image would not gather the weights of the tower, for which the others wait."""
    data = prepare(Data.model_validate({"train": str(chats), "eval_size": 4}), loaded(made("llava"), "llava"), 0)
    rows = TASKS["image-text-to-text"].rows
    with pytest.raises(UserError, match=r"rows without images.*--accelerate-config ddp"):
        rows.check_sharded(data)
    some = [[place for place in range(len(part)) if part[place]["images"]] for part in (data.train, data.eval)]
    rows.check_sharded(replace(data, train=data.train.select(some[0]), eval=data.eval.select(some[1])))


@pytest.mark.parametrize("family", families())
def test_every_parameter_has_a_role(family: str, made: Any) -> None:
    model = model_of(made(family))
    prefixes, found = vision_parts.prefixes_of(model), set()
    for name, _ in model.named_parameters():
        found.add(role := vision_parts.role_of(name, prefixes))
        assert role, name
    assert found == set(vision_parts.ROLES)
    vision_parts.freeze(model, ["vision", "language"])
    trained = {vision_parts.role_of(name, prefixes) for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"projector"}


TRAINED: tuple[dict[str, Any], ...] = (
    {"name": "full"},
    {"name": "full", "freeze": []},
    {"name": "full", "freeze": ["language"]},
    {"name": "full", "freeze": ["vision", "language"]},
    {"name": "full", "freeze": ["vision", "projector"]},
    {"name": "partial", "last_n_layers": 1},
    {"name": "partial", "last_n_layers": 1, "embeddings": True},
    {"name": "lora"},
    {"name": "lora", "freeze": []},
    {"name": "lora", "modules_to_save": ["embed_tokens"]},
)


def tie(model: Path, folder: Path) -> Path:
    """A copy of a model whose LM head is its embeddings."""
    import json
    import shutil

    from transformers import AutoModelForImageTextToText

    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    AutoModelForImageTextToText.from_pretrained(folder).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("family", "tied"), [*((family, False) for family in FAMILIES), ("smolvlm", True)])
def test_every_choice_of_parts_trains_in_16_bits(family: str, tied: bool, made: Any, chats: Path, tmp_path: Path) -> None:
    """Trained weights are in float32 and frozen ones in bfloat16: families that cast to the type of one of them still run."""
    from hfstrat import strategies
    from hfstrat.models.load import set_precision

    strategy, folder = None, made(family)
    if tied:
        folder = tie(folder, tmp_path / "tied")
    for section in TRAINED:
        given = {"task": "image-text-to-text", "model": str(folder), "strategy": section, "data": {"train": str(chats)}}
        recipe = load_recipe("recipe.yaml", [], yaml.safe_dump({**given, "output_dir": str(tmp_path / "run")})).recipe
        if strategy is None:
            processor, data = strategies.build(recipe.strategy).read(recipe)
        strategy = strategies.build(recipe.strategy)
        model = strategy.build_model(strategy.load(recipe, processor, data)).train()
        set_precision(model, torch.bfloat16)
        kinds = {(p.requires_grad, p.dtype) for p in model.parameters()}
        assert (True, torch.bfloat16) not in kinds
        batch = ImageTextCollator(processor, 8, False)([row for row in rows_of(data) if row["images"]])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        assert torch.isfinite(loss), section
        moved = [p for p in model.parameters() if p.requires_grad and p.grad is not None and bool(p.grad.abs().sum() > 0)]
        assert moved, section
        if section.get("freeze") != ["language"] and "modules_to_save" not in section:
            frozen = [p for p in model.parameters() if not p.requires_grad]
            assert sum(p.numel() for p in frozen if p.dtype == torch.float32) <= 0.35 * sum(p.numel() for p in frozen) + 1, (
                section
            )

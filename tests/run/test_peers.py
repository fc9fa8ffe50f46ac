"""The same recipe in plain TRL code has the same loss curve, up to float rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.families import make_family
from helpers.runs import run

from hfstrat import strategies
from hfstrat.data.collate import BatchOrder
from hfstrat.data.prepare import prepare
from hfstrat.models import load
from hfstrat.tasks import loading

STEPS = 6
ORDER = "training.train_sampling_strategy=random"  # an order that both support


@pytest.mark.parametrize(
    ("strategy", "family"), [("{name: lora, r: 4}", None), ("full", None), ("full", "mixtral")], ids=["lora", "full", "experts"]
)
def test_the_loss_curve_equals_trl(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str, family: str | None
) -> None:
    """A mixture of experts has the load-balancing loss of its routers, although its configuration does not output them."""
    from transformers import set_seed
    from trl import SFTConfig, SFTTrainer

    monkeypatch.setattr("hfstrat.tasks.verify.verify", lambda *args: {"bit_equal": True, "loaded_with": "a test"})
    changes = [f"strategy={strategy}", f"training.max_steps={STEPS}", "model.dtype=float32", "training.eval_steps=6", ORDER]
    if family:
        changes += [f"model.name_or_path={make_family(tmp_path / family, family)}", "training.per_device_train_batch_size=8"]
    loaded = recipe(*changes)
    report = run(loaded)
    assert report is not None
    ours = [entry["loss"] for entry in report["result"]["losses"]]

    settings = loaded.recipe
    tokenizer = load.load_tokenizer(settings.model)
    data = prepare(settings.data, tokenizer, settings.seed)
    order = BatchOrder(data.train["length"], 8, STEPS, settings.seed)
    set_seed(settings.seed)
    base = loading.load_base(settings.model, tokenizer)
    config = SFTConfig(
        output_dir=str(tmp_path / "trl"),
        per_device_train_batch_size=8,
        max_steps=STEPS,
        learning_rate=settings.training.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        optim="adamw_torch_fused",
        train_sampling_strategy="sequential",
        logging_steps=1,
        max_length=None,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=strategies.build(settings.strategy).build_model(base),
        args=config,
        train_dataset=data.train.select(list(order)).select_columns(["input_ids", "labels"]),
        processing_class=tokenizer,
    )
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert theirs[0] > theirs[-1]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=2e-4, atol=0)

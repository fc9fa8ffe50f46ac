"""What is computed once equals what is computed on the fly; a changed input is never given old states."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from rich.console import Console
from torch import nn

from hfstrat.data.collate import BatchOrder, Collator
from hfstrat.data.packing import Bin, PackedRows, PackingCollator
from hfstrat.errors import UserError
from hfstrat.models.fused_loss import bind_head_loss
from hfstrat.strategies.frozen.boundary import COLUMN
from hfstrat.strategies.frozen.precompute import States, WithStates, gain, precompute, write
from hfstrat.trainer.plan import Plan
from hfstrat.trainer.train_data import TrainData

VOCABULARY, WIDTH, BLOCKS = 96, 32, 4
SMALL = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "num_attention_heads": 4}
SMALL |= {"intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0}
CALM = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def llama(**more: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=False, **more))


def gpt2(dropout: float = 0.0) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    rates = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=BLOCKS, n_head=4, n_positions=64, pad_token_id=0, **rates)
    )


def bert(dropout: float = 0.0) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return BertForSequenceClassification(BertConfig(**SMALL, **rates, num_labels=3, classifier_dropout=0.0))


def distilbert() -> Any:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    return DistilBertForSequenceClassification(
        DistilBertConfig(
            vocab_size=VOCABULARY, dim=WIDTH, n_layers=BLOCKS, n_heads=4, hidden_dim=48, max_position_embeddings=64,
            dropout=0.0,
            attention_dropout=0.0, seq_classif_dropout=0.0, num_labels=3,
        )
    )  # fmt: skip


def modernbert() -> Any:
    from transformers import ModernBertConfig, ModernBertForSequenceClassification

    return ModernBertForSequenceClassification(
        ModernBertConfig(
            **SMALL, num_labels=3, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2, local_attention=8
        )
    )


def llama_classifier() -> Any:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    return LlamaForSequenceClassification(LlamaConfig(**SMALL, num_key_value_heads=2, num_labels=3))


def gemma() -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return Gemma2ForCausalLM(
        Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8, sliding_window=8, query_pre_attn_scalar=8, bos_token_id=1)
    )


FAMILIES = {
    "llama": llama, "gpt2": gpt2, "gemma2": gemma, "bert": bert, "distilbert": distilbert, "modernbert": modernbert,
    "llama classifier": llama_classifier,
}  # fmt: skip


def make(family: str, last: int = 2, **more: Any) -> Any:
    """A random model whose last blocks and later parameters are trainable; its weights are far from their initial values."""
    torch.manual_seed(0)
    model = FAMILIES[family](**more).eval()
    learn_last(model, last)
    return model


def learn_last(model: nn.Module, last: int, norm: bool = True) -> None:
    from hfstrat.strategies.frozen.boundary import final_norm, named_blocks

    blocks = named_blocks(model)
    model.requires_grad_(False)
    for block in blocks[BLOCKS - last :]:
        block.module.requires_grad_(True)
    beside = final_norm(model, blocks)
    for name, parameter in model.named_parameters():
        if name.startswith(("classifier", "score", "head", "pre_classifier")):
            parameter.requires_grad_(True)
    if beside and norm:
        beside.module.requires_grad_(True)


def collate(rows: list[dict[str, Any]], multiple: int = 16) -> dict[str, torch.Tensor]:
    width = -(-max(len(row["input_ids"]) for row in rows) // multiple) * multiple
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for place, row in enumerate(rows):
        ids[place, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
        mask[place, : len(row["input_ids"])] = 1
    return {"input_ids": ids, "attention_mask": mask}


def make_rows(count: int = 22, longest: int = 40, seed: int = 0) -> Dataset:
    rng = np.random.default_rng(seed)
    rows = [rng.integers(3, VOCABULARY, rng.integers(3, longest)).tolist() for _ in range(count)]
    return Dataset.from_list([{"input_ids": ids, "length": len(ids), "labels": ids, "row": n} for n, ids in enumerate(rows)])


def make_feed(train_rows: Any = None, dtype: torch.dtype = torch.float32, **more: Any) -> TrainData:
    held = make_rows(6, seed=1)
    held = held.select(np.argsort(-np.array(held["length"])))
    plan = Plan(**{"steps": 20, "global_batch_size": 8, "processes": 1, "micro_batch": 4, "eval_batch": 4, "eval_every": 5,
                   "save_every": 5, "rows": 22} | more)  # fmt: skip
    rows = make_rows() if train_rows is None else train_rows
    return TrainData(rows, held, collate, plan, dtype, torch.device("cpu"), Console(quiet=True))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HFSTRAT_CACHE", str(tmp_path / "cache"))


def outputs(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits, of real tokens only."""
    logits = model(**batch).logits
    return logits[batch["attention_mask"].bool()] if logits.shape[:2] == batch["attention_mask"].shape else logits


@pytest.mark.parametrize("last", [1, 2, 0])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_with_stored_states_is_the_whole_model(family: str, last: int) -> None:
    """Outputs and gradients, for rows in other batches than they were computed in; and no block is left out by mistake."""
    model = make(family, last)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    feed = precompute(make_feed(), model, True)
    assert isinstance(feed.train, WithStates)
    assert feed.facts["precomputed"]["blocks"] == [BLOCKS - last, BLOCKS]
    for rows in (feed.train, feed.eval):
        for places in ([3, 0, 5], [1, 2, 4]):
            batch = feed.collate([rows[place] for place in places])
            found = []
            for stored in (True, False):
                model.zero_grad()
                given = {name: value for name, value in batch.items() if stored or name != COLUMN}
                logits = outputs(model, given)
                gradients = []
                if logits.requires_grad:
                    logits.square().sum().backward()
                    gradients = [p.grad for p in model.parameters() if p.grad is not None]
                found.append([logits, *gradients])
            assert len(found[0]) == len(found[1])
            for ours, theirs in zip(*found, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))
    for undo in feed.undo:
        undo()
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_equal_shapes_it_is_the_same_bit_for_bit(dtype: torch.dtype) -> None:
    """All rows have the same width, so the kernels are the same for every batch."""
    from hfstrat.models.load import set_precision

    model = make("llama")
    set_precision(model, dtype)
    feed = precompute(make_feed(make_rows(22, longest=15), dtype), model, True)
    order = np.random.default_rng(5).permutation(22)[:20]
    for places in order.reshape(-1, 4):
        batch = feed.collate([feed.train[int(place)] for place in places])
        assert batch[COLUMN].dtype == dtype
        with feed.autocast(), torch.no_grad():
            whole = outputs(model, {name: value for name, value in batch.items() if name != COLUMN})
            assert torch.equal(outputs(model, batch), whole)


def test_states_come_back_from_the_disk_bit_for_bit(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rows = [[torch.randn(length, 8, generator=generator).to(dtype) for length in group] for group in ([3, 1, 9], [4])]
        write(tmp_path / "states", rows, dtype)
        states = States(tmp_path / "states", 8)
        assert len(states) == 4
        for index, row in enumerate([row for group in rows for row in group]):
            assert torch.equal(torch.from_numpy(states[index].copy()).view(dtype), row)


def test_rows_with_a_weight_are_computed_once() -> None:
    rows = make_rows().select([4, 4, 4, 2, 7, 7, 0])
    feed = precompute(make_feed(rows), make("llama"), True)
    assert feed.facts["precomputed"]["rows"]["train"] == 4
    plain = precompute(make_feed(make_rows()), make("llama"), True)
    for place, number in enumerate([4, 4, 4, 2, 7, 7, 0]):
        np.testing.assert_allclose(feed.train[place][COLUMN], plain.train[number][COLUMN], atol=1e-5)


def test_an_equal_run_finds_it_and_a_changed_one_does_not() -> None:
    """Weights of the prefix, rows, the boundary, the shape of batches, precision and attention all make another entry."""

    def built(model: Any = None, feed: TrainData | None = None) -> list[str]:
        model = model or make("llama")
        return list(precompute(feed or make_feed(), model, True).facts["precomputed"]["built"])

    assert built() == ["train", "eval"]
    assert built() == []
    changed = make("llama")
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight[3, 3] += 1e-6
    assert built(changed) == ["train", "eval"]
    assert built(make("llama", last=1)) == ["train", "eval"]
    assert built(make("llama", rms_norm_eps=1e-5)) == ["train", "eval"]
    assert built(make("llama", attn_implementation="eager")) == ["train", "eval"]
    assert built(feed=make_feed(make_rows(seed=3))) == ["train"]
    assert built(feed=make_feed(micro_batch=2)) == ["train"]
    assert built(feed=make_feed(dtype=torch.bfloat16)) == ["train", "eval"]
    learning = make("llama")
    with torch.no_grad():
        learning.lm_head.weight.requires_grad_(True)
        learning.model.layers[3].mlp.up_proj.weight += 1
    precompute(make_feed(), learning, True)
    with torch.no_grad():
        learning.lm_head.weight += 1  # nothing that learns is in the prefix
    for _ in range(2):
        again = precompute(make_feed(), learning, True)
    assert again.facts["precomputed"]["built"] == []


def tied() -> Any:
    model = llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    learn_last(model, 2)
    model.lm_head.weight.requires_grad_(True)
    return model


def with_adapters() -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(llama(), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))


def without_blocks() -> Any:
    model = llama()
    model.config.num_hidden_layers = 7
    return model


def passing_more() -> Any:
    """Its third block adds what the first one has seen."""
    model = make("llama")
    first, third = model.model.layers[0], model.model.layers[2]
    seen: list[torch.Tensor] = []
    first.register_forward_hook(lambda module, args, given: seen.append(given))
    third.register_forward_pre_hook(lambda module, args: (args[0] + 3 * seen[-1], *args[1:]))
    return model


def jittery() -> Any:
    model = make("llama")
    act = model.model.layers[0].mlp
    act.register_forward_hook(lambda module, args, given: given + torch.rand_like(given) if module.training else None)
    return model


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (tied, "the input embeddings are trained, since they are tied to the LM head"),
        (with_adapters, "adapters are trained in the first block"),
        (without_blocks, "transformer blocks of LlamaForCausalLM cannot be identified"),
        (lambda: make("llama", last=4), "parameters are trained in the first block"),
        (lambda: make("bert", dropout=0.1), r"dropout is active .*bert.embeddings.dropout: 0.1.*frozen_dropout: false"),
        (lambda: make("gpt2", dropout=0.2), r"dropout is active in the frozen part \(transformer.drop: 0.2\)"),
        (jittery, "different outputs in training and in evaluation"),
        (passing_more, "the outputs of .* change .*its blocks pass more than hidden states"),
    ],
    ids=["tied", "adapters", "no blocks", "first block", "bert dropout", "gpt2 dropout", "random", "more than states"],
)
def test_what_cannot_be_computed_once_is_refused_with_its_reason(model: Any, reason: str) -> None:
    with pytest.raises(UserError, match=f"strategy.precompute: true, but .*{reason}"):
        precompute(make_feed(), model(), True)
    built = model()
    feed = precompute(make_feed(), built, "auto")
    assert not isinstance(feed.train, WithStates)
    assert not feed.undo
    assert not any("forward" in vars(module) for module in built.modules())


def test_without_dropout_in_the_frozen_part_it_can_be_done() -> None:
    """And dropout stays active in the trainable part."""
    model = make("bert", dropout=0.3)
    feed = precompute(make_feed(), model, True, still=True)
    model.train()
    frozen, learning = model.bert.encoder.layer[1], model.bert.encoder.layer[2]
    assert not frozen.output.dropout.training
    assert not model.bert.embeddings.dropout.training
    assert learning.output.dropout.training
    for undo in feed.undo:
        undo()
    model.train()
    assert frozen.output.dropout.training
    assert not any("train" in vars(module) or "forward" in vars(module) for module in model.modules())


def test_it_must_pay() -> None:
    assert gain(10, 6, 3) == pytest.approx(48 / 28)  # the last 2 of 12 layers, 3 epochs
    assert gain(10, 6, 1) == pytest.approx(1)
    feed = precompute(make_feed(steps=3), make("llama"), "auto")
    assert "would not save time" in feed.facts["not_precomputed"]
    assert isinstance(precompute(make_feed(steps=3), make("llama"), True).train, WithStates)
    assert isinstance(precompute(make_feed(steps=60), make("llama"), "auto").train, WithStates)
    assert "max_time" in precompute(make_feed(steps=10**7), make("llama"), "auto").facts["not_precomputed"]


def test_no_room_is_said_before_anything_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(0, 0, 1000))
    with pytest.raises(UserError, match=r"precompute: true, but .*hidden states of 28 examples: about .* are free"):
        precompute(make_feed(), make("llama"), True)
    assert "are needed" in precompute(make_feed(steps=60), make("llama"), "auto").facts["not_precomputed"]


def packed_feed(seed: int, flatten: bool) -> tuple[TrainData, BatchOrder]:
    """Three steps of eight rows in three bins each, two of them in one pass."""
    rows = make_rows()
    order = BatchOrder(rows["length"], 8, 3, seed)
    feed = make_feed(PackedRows(rows, order, 3, 8), bins=3, bins_at_once=2)
    return replace(feed, collate=PackingCollator(Collator(0, 8, masks_logits=False, selects_rows=True), flatten)), order


def losses_of(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """The loss of a step and its gradients."""
    model.zero_grad()
    total = torch.zeros(())
    for batch in batches:
        loss = model(**{name: value for name, value in batch.items() if name != "labels"}, num_items_in_batch=1).loss
        loss.backward()
        total += loss.detach()
    return [total, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize(("family", "last", "seed"), [("llama", 2, 0), ("gpt2", 2, 1), ("gemma2", 1, 2), ("llama", 0, 3)])
def test_packed_rows_are_given_the_states_of_rows_that_stand_alone(family: str, last: int, seed: int, flatten: bool) -> None:
    """Packed with stored states, packed on the fly, alone with stored states and alone on the fly: one loss, one gradient."""
    model = make(family, last)
    if not last:
        model.lm_head.requires_grad_(True)
    assert bind_head_loss(model) is None
    given, order = packed_feed(seed, flatten)
    feed = precompute(given, model, True)
    assert feed.facts["precomputed"]["blocks"] == [BLOCKS - last, BLOCKS]
    assert isinstance(feed.train, PackedRows)
    for step in range(3):
        items = [feed.train[3 * step + place] for place in range(3)]
        rows = [feed.train.rows[int(row)] for row in order.batch(step)]
        packed, alone = ([feed.collate(items[:2]), feed.collate(items[2:])], [feed.collate(rows[:4]), feed.collate(rows[4:])])
        found = []
        for batches in (packed, alone):
            assert all(COLUMN in batch for batch in batches)
            found.append(losses_of(model, batches))
            found.append(losses_of(model, [{name: v for name, v in batch.items() if name != COLUMN} for batch in batches]))
        assert len(found[0]) > 1
        for other in found[1:]:
            for ours, theirs in zip(other, found[0], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))
    assert precompute(make_feed(), model, True).facts["precomputed"]["rows"] == feed.facts["precomputed"]["rows"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_packed_batch_of_its_own_states_is_that_batch_bit_for_bit(family: str) -> None:
    """And the values at padded positions change nothing, packed or not."""
    model = make(family)
    assert bind_head_loss(model) is None
    prepared = precompute(packed_feed(0, flatten=False)[0], model, True)
    generator = torch.Generator().manual_seed(0)
    for items in ([prepared.train[0], prepared.train[1]], [prepared.train.rows[place] for place in range(4)]):
        batch = prepared.collate(items)
        whole = {name: value for name, value in batch.items() if name not in (COLUMN, "labels")}
        with torch.no_grad():
            states = prepared.collate.boundary.take(whole)
        expected = losses_of(model, [whole])
        assert all(map(torch.equal, losses_of(model, [{**whole, COLUMN: states}]), expected))
        for place, item in enumerate(items):
            end = sum(row["length"] for row in (item.rows if isinstance(item, Bin) else [item]))
            states[place, end:] = torch.randn(states[place, end:].shape, generator=generator) * 100
        assert all(map(torch.equal, losses_of(model, [{**whole, COLUMN: states}]), expected))


@pytest.mark.slow
def test_compiled_blocks_are_not_computed_once_yet() -> None:
    model = make("llama")
    model.model.layers[0].compile()
    assert "its blocks are compiled" in precompute(make_feed(), model, "auto").facts["not_precomputed"]

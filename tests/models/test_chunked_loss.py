"""The loss from hidden states: against a float64 reference, against stock models, and without large tensors."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.losses import Largest, assert_same, count, family, load, some_rows
from torch.nn import functional

from hfstrat.data.collate import Collator
from hfstrat.models.chunked_loss import Head, chunk_rows, head_loss, head_scores, padded_rows
from hfstrat.models.fused_loss import bind_head_loss, unbind_head_loss
from hfstrat.tasks.causal_lm.losses import causal_lm_loss, causal_lm_sums, sums_by_row

ROWS, WIDTH, VOCABULARY = 10, 6, 23
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"with_bias": True},
    "softcap": {"softcap": 1.5},
    "scale": {"scale": 0.3},
    "all": {"with_bias": True, "softcap": 2.0, "scale": 3.0},
}


def inputs(with_bias: bool = False, rows: int = ROWS, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    source = torch.Generator().manual_seed(1)
    made: dict[str, Any] = {
        "hidden": torch.randn(rows, WIDTH, generator=source, dtype=torch.float64),
        "weight": torch.randn(VOCABULARY, WIDTH, generator=source, dtype=torch.float64),
        "bias": torch.randn(VOCABULARY, generator=source, dtype=torch.float64) if with_bias else None,
    }
    made = {name: None if x is None else x.to(dtype).requires_grad_() for name, x in made.items()}
    return made | {"targets": torch.randint(0, VOCABULARY, (rows,), generator=source)}


def reference(given: dict[str, Any], softcap: float | None = None, scale: float = 1.0) -> torch.Tensor:
    """Summed loss by autograd through all logits."""
    logits = functional.linear(given["hidden"], given["weight"], given["bias"]) * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return functional.cross_entropy(logits, given["targets"], reduction="sum")


def chunked(
    loss: Callable[..., Any], given: dict[str, Any], chunk: int | None = None, softcap: float | None = None, scale: float = 1.0
) -> Any:
    """`head_loss` or `head_scores` of these inputs."""
    head = Head(given["weight"], given["bias"], softcap, scale)
    return loss(given["hidden"], head, given["targets"], chunk)


def split(variant: str) -> tuple[dict[str, Any], dict[str, Any]]:
    options = dict(VARIANTS[variant])
    return inputs(options.pop("with_bias", False)), options


@pytest.mark.parametrize("chunk", [1, 7, ROWS, None])
@pytest.mark.parametrize("variant", VARIANTS)
def test_value_and_gradients_equal_the_reference(variant: str, chunk: int | None) -> None:
    given, options = split(variant)
    learning = [given[name] for name in ("hidden", "weight", "bias") if given[name] is not None]
    expected = reference(given, **options)
    wanted = torch.autograd.grad(expected / 7, learning)
    found = chunked(head_loss, given, chunk=chunk, **options)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for ours, theirs in zip(torch.autograd.grad(found / 7, learning), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunk", [3, 7, ROWS])
@pytest.mark.parametrize("variant", VARIANTS)
def test_blocks_within_a_chunk_change_nothing(variant: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfstrat.models.chunked_loss.BLOCK_BYTES", 4 * VOCABULARY * 2)  # two rows
    test_value_and_gradients_equal_the_reference(variant, chunk)
    test_scores_of_each_row_equal_the_reference(variant)


@pytest.mark.parametrize("block", [4 * VOCABULARY * 2, 2**20])
def test_bfloat16_rounds_the_factors_and_no_sum(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast: hidden states and weight are rounded, the gradient of logits is not before it meets the hidden states."""
    monkeypatch.setattr("hfstrat.models.chunked_loss.BLOCK_BYTES", block)
    given = inputs(dtype=torch.float32)
    learning = [given["hidden"], given["weight"]]
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(chunked(head_loss, given, chunk=4), learning)
    rounded = [x.detach().bfloat16() for x in learning]
    logits = functional.linear(*rounded).double().requires_grad_()
    functional.cross_entropy(logits, given["targets"], reduction="sum").backward()
    assert logits.grad is not None
    torch.testing.assert_close(found[1].double(), logits.grad.T @ rounded[0].double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[0].double(), logits.grad @ rounded[1].double(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(variant: str) -> None:
    given, options = split(variant)
    targets = given["targets"]

    def loss(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return head_loss(hidden, Head(weight, bias, **options), targets, chunk=4)

    assert torch.autograd.gradcheck(loss, (given["hidden"], given["weight"], given["bias"]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_of_each_row_equal_the_reference(variant: str) -> None:
    given, options = split(variant)
    nll, correct = chunked(head_scores, given, chunk=3, **options)
    logits = functional.linear(given["hidden"], given["weight"], given["bias"])
    assert torch.equal(correct, logits.argmax(-1) == given["targets"])
    torch.testing.assert_close(nll.sum(), reference(given, **options), rtol=1e-12, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(chunked(head_loss, given, **options), nll.sum())


def test_a_frozen_head_gets_no_gradient_and_frozen_hidden_states_none() -> None:
    given = inputs(with_bias=True)
    for frozen, learning in (("weight", "hidden"), ("hidden", "weight")):
        now = {name: x.detach().requires_grad_(name == learning) if name != "targets" else x for name, x in given.items()}
        chunked(head_loss, now).backward()
        assert now[frozen].grad is None
        assert now["bias"].grad is None
        expected = torch.autograd.grad(reference(given), given[learning])[0]
        torch.testing.assert_close(now[learning].grad, expected)


def test_a_tied_head_adds_both_gradients() -> None:
    given = inputs()
    ids = torch.arange(ROWS)
    found, expected = (
        torch.autograd.grad(loss({**given, "hidden": given["weight"][ids].sin()}), given["weight"])[0]
        for loss in (lambda now: chunked(head_loss, now, chunk=4), reference)
    )
    torch.testing.assert_close(found, expected)


def test_no_rows_give_a_finite_zero_with_zero_gradients() -> None:
    given = inputs(with_bias=True, rows=0)
    loss = chunked(head_loss, given)
    loss.backward()
    assert float(loss) == 0.0
    assert given["hidden"].grad.shape == (0, WIDTH)
    assert not given["weight"].grad.any()
    assert not given["bias"].grad.any()
    nll, correct = chunked(head_scores, given)
    assert (nll.shape, correct.shape, correct.dtype) == ((0,), (0,), torch.bool)


@pytest.mark.parametrize("learns", [False, True])
def test_no_operation_holds_the_logits_of_all_rows(learns: bool) -> None:
    rows, vocabulary, width, chunk = 64, 500, 8, 8
    hidden, weight = torch.randn(rows, width, requires_grad=True), torch.randn(vocabulary, width, requires_grad=learns)
    targets = torch.randint(0, vocabulary, (rows,))
    with Largest() as ours:
        head_loss(hidden, Head(weight), targets, chunk).backward()
        head_scores(hidden, Head(weight), targets, chunk)
    assert ours.elements == chunk * vocabulary
    with Largest() as plain:
        functional.cross_entropy(functional.linear(hidden, weight), targets).backward()
    assert plain.elements == rows * vocabulary


def test_a_chunk_fills_the_cache_and_is_larger_where_the_head_learns() -> None:
    assert chunk_rows(torch.empty(2**12, 576), False) == 2**10
    assert chunk_rows(torch.empty(2**17, 576), False) == 128
    assert chunk_rows(torch.empty(2**17, 576), True) == 144


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast_is_close_to_float32_and_sums_in_float32(variant: str) -> None:
    options = dict(VARIANTS[variant])
    given = inputs(options.pop("with_bias", False), rows=40, dtype=torch.float32)
    learning = [given[name] for name in ("hidden", "weight")]
    expected = reference(given, **options)
    wanted = torch.autograd.grad(expected, learning)
    with torch.autocast("cpu", torch.bfloat16):
        found = chunked(head_loss, given, chunk=16, **options)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)
    for ours, theirs in zip(torch.autograd.grad(found, learning), wanted, strict=True):
        assert ours.dtype == torch.float32
        assert float((ours - theirs).norm() / theirs.norm()) < 2e-2


FAMILIES: dict[str, Callable[[Callable[..., Path]], Any]] = {
    "llama": lambda models: load(models()),
    "llama-tied": lambda models: load(models(tied=True)),
    "gpt2": lambda models: load(models(family="gpt2")),
    "gemma2": lambda models: family("Gemma2", final_logit_softcapping=3.0),
    "cohere": lambda models: family("Cohere", logit_scale=0.25),
    "granite": lambda models: family("Granite", logits_scaling=4.0),
    "hyperclovax": lambda models: family("HyperCLOVAX", logits_scaling=4.0),
}


def gradients(model: Any, rows: list[dict[str, Any]], micro: int, bound: bool) -> tuple[float, dict[str, torch.Tensor]]:
    collate = Collator(0, 8, masks_logits=False, selects_rows=bound)
    model.zero_grad()
    loss = 0.0
    for start in range(0, len(rows), micro):
        batch = collate(rows[start : start + micro])
        labels = batch.pop("labels")
        part = causal_lm_loss(model(**batch), labels, count(rows))
        part.backward()
        loss += float(part.detach())
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_bound_model_has_the_stock_loss_and_gradients(models: Callable[..., Path], name: str) -> None:
    model, rows = FAMILIES[name](models), some_rows()
    expected = gradients(model, rows, 8, bound=False)
    assert bind_head_loss(model) is None
    assert_same(gradients(model, rows, 8, bound=True), expected)
    assert_same(gradients(model, rows, 1, bound=True), expected)  # 8x1 = 1x8
    assert_same(gradients(model, rows, 3, bound=True), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_evaluation_sums_are_the_stock_ones(models: Callable[..., Path], name: str) -> None:
    model = FAMILIES[name](models).eval()
    batch = Collator(0, 8, masks_logits=False, selects_rows=True)(some_rows())
    labels = batch.pop("labels")
    stock = {key: value for key, value in batch.items() if key not in ("loss_rows", "targets")}
    assert bind_head_loss(model) is None
    with torch.no_grad():
        expected = causal_lm_sums(model(**stock).logits, labels)
        outputs = model(**batch)
    row = batch["loss_rows"] // labels.shape[1]
    torch.testing.assert_close(sums_by_row(outputs.nll, outputs.correct, row, len(labels)), expected, rtol=1e-9, atol=1e-12)
    with_gradient = model(**batch)
    torch.testing.assert_close(with_gradient.loss, outputs.loss)
    assert with_gradient.loss.requires_grad
    assert torch.equal(with_gradient.correct, outputs.correct)
    assert model.train()(**batch).nll is None


def adapted(model: Any, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, **options))
    return model.to(torch.float64)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "lm_head"]},  # what an adapter on the head adds is no part of its weight
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [5, 7]},
    ],
    ids=["all-linear", "adapter-on-head", "head-saved", "new-tokens"],
)
@pytest.mark.parametrize("tied", [False, True])
def test_under_peft(models: Callable[..., Path], options: dict[str, Any], tied: bool) -> None:
    rows = some_rows()
    expected = gradients(adapted(load(models(tied=tied)), **options), rows, 8, bound=False)
    model = load(models(tied=tied))
    assert bind_head_loss(model) is None
    model = adapted(model, **options)
    found = gradients(model, rows, 8, bound=True)
    assert_same(found, expected)
    model.eval()
    batch = Collator(0, 8, masks_logits=False, selects_rows=True)(rows)
    labels = batch.pop("labels")
    with torch.no_grad():
        assert float(causal_lm_loss(model(**batch), labels, count(rows))) == pytest.approx(expected[0], rel=1e-9)


def test_any_other_call_is_the_stock_one_and_unbinding_leaves_nothing(models: Callable[..., Path], tmp_path: Path) -> None:
    import inspect

    model, stock = load(models()), load(models())
    assert bind_head_loss(model) is None
    assert inspect.signature(model.forward) == inspect.signature(stock.forward)
    ids = torch.randint(3, 300, (2, 9))
    assert torch.equal(model(input_ids=ids).logits, stock(input_ids=ids).logits)
    ours, theirs = (one(ids, labels=ids, num_items_in_batch=torch.tensor(5)).loss for one in (model, stock))
    assert torch.equal(ours, theirs)
    said = [one.generate(input_ids=ids[:1], max_new_tokens=4, do_sample=False) for one in (model, stock)]
    assert torch.equal(*said)
    unbind_head_loss(model)
    unbind_head_loss(model)
    assert "forward" not in vars(model)
    assert vars(model).keys() == vars(stock).keys()
    copy.deepcopy(model)
    pickle.loads(pickle.dumps(model))
    model.save_pretrained(tmp_path)


def test_binding_leaves_mode_and_random_state_alone(models: Callable[..., Path]) -> None:
    model = load(models()).train()
    before = torch.get_rng_state()
    assert bind_head_loss(model) is None
    assert model.training
    assert torch.equal(before, torch.get_rng_state())


def test_a_model_that_does_more_than_its_head_is_refused_with_a_reason(models: Callable[..., Path]) -> None:
    from transformers import BertConfig, BertLMHeadModel, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    class Shifted(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            outputs = super().forward(*args, **kwargs)
            outputs.logits = outputs.logits * torch.linspace(0.5, 1.5, outputs.logits.shape[-1])
            return outputs

    tiny = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    shifted, bert = Shifted(LlamaConfig(**tiny, initializer_range=0.5)), BertLMHeadModel(BertConfig(**tiny, is_decoder=True))
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    zero = load(models())
    torch.nn.init.zeros_(zero.lm_head.weight)
    for model, said in (
        (shifted, "not computed by its head"),
        (bert, "not computed by its head"),
        (t5, "encoder"),
        (zero, "equal"),
    ):
        assert said in (bind_head_loss(model) or "")
        assert "forward" not in vars(model)
    model = load(models())
    assert bind_head_loss(model) is None
    assert "already replaced" in (bind_head_loss(model) or "")


def test_16_bit_weights_pass_the_proof(models: Callable[..., Path]) -> None:
    for model in (load(models()), family("Gemma2", final_logit_softcapping=3.0), family("Granite", logits_scaling=4.0)):
        assert bind_head_loss(model.to(torch.bfloat16)) is None


@pytest.mark.parametrize("strategy", ["{name: lora, r: 4}", "full"], ids=["lora", "full"])
def test_a_run_trains_by_it_saves_without_it_and_equals_the_fallback(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], strategy: str
) -> None:
    from helpers.runs import run

    from hfstrat.models import fused_loss
    from hfstrat.run import train

    save, seen, reports = train.save, [], []

    def watched(job: Any) -> Path:
        seen.append((job.trainer.data_collator.selects_rows, fused_loss.is_bound(job.base.model)))
        return save(job)

    monkeypatch.setattr("hfstrat.tasks.verify.verify", lambda *args: {"bit_equal": True, "loaded_with": "a test"})
    monkeypatch.setattr(train, "save", watched)
    for name in ("bound", "stock"):
        settings = [f"strategy={strategy}", "model.dtype=float32", f"output_dir={tmp_path / name}"]
        report = run(recipe(*settings))
        assert report is not None
        reports.append(report["result"])
        monkeypatch.setattr(fused_loss, "bind_head_loss", lambda model: "a reason")
    assert seen == [(True, False), (False, False)]
    assert "which takes more memory: a reason" in capsys.readouterr().out
    ours, theirs = ([entry["loss"] for entry in report["losses"]] for report in reports)
    assert ours == pytest.approx(theirs, rel=1e-5)
    for when in ("metrics_before", "metrics_after"):
        assert reports[0][when] == pytest.approx(reports[1][when], rel=1e-5)


def test_products_have_few_sizes_on_a_cpu() -> None:
    """Whatever the number of rows: a kernel is compiled and kept for each."""
    cpu = torch.device("cpu")
    for chunk in (128, 8192):
        sizes = [padded_rows(rows, chunk, cpu) for rows in range(1, chunk + 1)]
        assert all(rows <= size <= max(rows + 15, rows * 9 / 8) for rows, size in enumerate(sizes, 1))
        assert len(set(sizes)) <= 8 * (chunk.bit_length() - 4)
        assert sizes[-1] == chunk
    assert padded_rows(37, 128, torch.device("meta")) == 37

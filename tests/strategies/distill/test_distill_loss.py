"""Distillation losses: values and gradients against float64 references, without a tensor of n x V elements."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.distillation import DIVERGENCES, divergence_of
from helpers.losses import Largest
from torch.nn import functional

from hfstrat.models.chunked_loss import Head, head_loss
from hfstrat.strategies.distill.loss import Mix, Teacher, distill_loss, distill_loss_of_logits, distill_scores

ROWS, WIDTH, THEIRS, VOCABULARY = 10, 6, 5, 23
SHARED = {"same": (23, 23), "student padded": (23, 20), "teacher padded": (20, 23)}  # vocabularies of student and teacher


def sizes(student: int, teacher: int, rows: int = ROWS, bias: bool = False) -> dict[str, Any]:
    source = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=source, dtype=torch.float64)

    return {
        "hidden": normal(rows, WIDTH).requires_grad_(),
        "head": Head(normal(student, WIDTH).requires_grad_(), normal(student).requires_grad_() if bias else None),
        "targets": torch.randint(0, min(student, teacher), (rows,), generator=source),
        "teacher": Teacher(min(student, teacher), normal(rows, THEIRS), Head(normal(teacher, THEIRS), normal(teacher))),
    }


def logits_of(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    logits = functional.linear(hidden, head.weight, head.bias) * head.scale
    return logits if head.softcap is None else torch.tanh(logits / head.softcap) * head.softcap


def reference(given: dict[str, Any], mix: Mix) -> torch.Tensor:
    """By autograd through all logits of both; each distribution is over what both vocabularies have."""
    teacher = given["teacher"]
    ours = logits_of(given["hidden"], given["head"])
    theirs = logits_of(teacher.hidden, teacher.head)
    p, q = ((one[:, : teacher.width] / mix.temperature).softmax(-1) for one in (theirs, ours))
    apart = divergence_of(mix.divergence, p, q, mix.skew).sum()
    plain = functional.cross_entropy(ours, given["targets"], reduction="sum")
    return mix.alpha * mix.temperature**2 * apart + (1 - mix.alpha) * plain


def learning(given: dict[str, Any]) -> list[torch.Tensor]:
    return [one for one in (given["hidden"], given["head"].weight, given["head"].bias) if one is not None]


def assert_same(given: dict[str, Any], found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    wanted = torch.autograd.grad(expected / 7, learning(given), allow_unused=True)
    for ours, theirs in zip(torch.autograd.grad(found / 7, learning(given)), wanted, strict=True):
        torch.testing.assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("chunk", [1, 7, ROWS])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("vocabularies", SHARED)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_value_and_gradient_equal_the_reference(name: str, vocabularies: str, temperature: float, chunk: int) -> None:
    given = sizes(*SHARED[vocabularies], bias=chunk == 7)
    for alpha in (1.0, 0.3):
        mix = Mix(name, alpha, temperature, skew=0.2)
        assert_same(given, distill_loss(**given, mix=mix, chunk=chunk), reference(given, mix))


@pytest.mark.parametrize("chunk", [3, 7, ROWS])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_blocks_within_a_chunk_change_nothing(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfstrat.models.chunked_loss.BLOCK_BYTES", 4 * VOCABULARY * 2)  # two rows
    monkeypatch.setattr("hfstrat.strategies.distill.loss.MIN_CHUNK_ROWS", 5)  # the teacher's: blocks do not lie across two
    for vocabularies in SHARED:
        test_value_and_gradient_equal_the_reference(name, vocabularies, 2.0, chunk)
    test_a_head_of_another_kind_has_the_same_loss(name)
    test_scores_are_the_divergence_of_each_row()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_heads_that_scale_and_cap_their_logits(name: str) -> None:
    given = sizes(23, 20, bias=True)
    given["head"] = given["head"]._replace(softcap=2.0, scale=0.7)
    teacher = given["teacher"]
    given["teacher"] = teacher._replace(head=teacher.head._replace(softcap=1.5, scale=3.0))
    mix = Mix(name, 0.6, 2.0)
    assert_same(given, distill_loss(**given, mix=mix, chunk=4), reference(given, mix))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_finite_differences_at_another_temperature(name: str) -> None:
    given = sizes(23, 20)
    targets, teacher, mix = given["targets"], given["teacher"], Mix(name, 0.8, 3.0)
    assert torch.autograd.gradcheck(
        lambda hidden, weight: distill_loss(hidden, Head(weight), targets, teacher, mix, 4),
        (given["hidden"], given["head"].weight),
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_teacher_that_says_the_same_has_nothing_to_teach(name: str, temperature: float) -> None:
    given = sizes(23, 23)
    given["teacher"] = Teacher(23, given["hidden"].detach(), Head(given["head"].weight.detach()))
    loss = distill_loss(**given, mix=Mix(name, 1.0, temperature), chunk=3)
    assert abs(float(loss.detach())) < 1e-10
    for gradient in torch.autograd.grad(loss, learning(given)):
        assert float(gradient.abs().max()) < 1e-10


def test_a_teacher_sure_of_the_target_gives_cross_entropy() -> None:
    given = sizes(23, 23)
    sure = functional.one_hot(given["targets"], 23).double() * 1e4
    given["teacher"] = Teacher(23, sure, Head(torch.eye(23, dtype=torch.float64)))
    for alpha in (1.0, 0.4):
        expected = head_loss(given["hidden"], Head(given["head"].weight), given["targets"])
        assert_same(given, distill_loss(**given, mix=Mix("forward_kl", alpha), chunk=3), expected)


def test_without_the_teacher_it_is_the_plain_loss() -> None:
    given = sizes(23, 20, bias=True)
    expected = head_loss(given["hidden"], given["head"], given["targets"])
    assert_same(given, distill_loss(**given, mix=Mix("jsd", 0.0), chunk=3), expected)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_no_rows_give_a_finite_zero_with_zero_gradients(name: str) -> None:
    given = sizes(23, 20, rows=0, bias=True)
    loss = distill_loss(**given, mix=Mix(name))
    assert float(loss.detach()) == 0.0
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, learning(given)))
    assert distill_scores(given["hidden"], given["head"], given["teacher"]).shape == (0,)


def test_tokens_that_only_one_of_them_has_take_no_part() -> None:
    """The teacher's probability of its padding is distributed over the other tokens; the student's padding is not trained."""
    given = sizes(20, 23)
    teacher = given["teacher"]
    loud = teacher.head.bias.clone()
    loud[20:] += 50.0  # nearly all mass on tokens that the student does not have
    mixes = [Mix(name, 1.0, 2.0) for name in DIVERGENCES]
    for mix in mixes:
        quiet = distill_loss(**given, mix=mix)
        shouted = {**given, "teacher": teacher._replace(head=teacher.head._replace(bias=loud))}
        torch.testing.assert_close(distill_loss(**shouted, mix=mix), quiet, rtol=1e-12, atol=0)
    padded = sizes(23, 20)
    for mix in mixes:
        gradient = torch.autograd.grad(distill_loss(**padded, mix=mix), padded["head"].weight)[0]
        assert not gradient[20:].any()
        assert gradient[:20].any(-1).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_head_of_another_kind_has_the_same_loss(name: str) -> None:
    given, mix = sizes(23, 20, bias=True), Mix(name, 0.5, 2.0)
    logits = logits_of(given["hidden"], given["head"])
    assert_same(given, distill_loss_of_logits(logits, given["targets"], given["teacher"], mix), reference(given, mix))


def test_scores_are_the_divergence_of_each_row() -> None:
    given = sizes(23, 20)
    found = distill_scores(given["hidden"], given["head"], given["teacher"], 2.0, chunk=3)
    expected = reference(given, Mix("forward_kl", 1.0, 2.0)) / 4
    torch.testing.assert_close(found.sum(), expected)
    assert (found > 0).all()
    assert not found.requires_grad


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_no_operation_holds_the_logits_of_all_rows(name: str, temperature: float) -> None:
    rows, vocabulary, width, chunk = 64, 500, 8, 8
    hidden, weight = torch.randn(rows, width, requires_grad=True), torch.randn(vocabulary, width, requires_grad=True)
    teacher = Teacher(480, torch.randn(rows, width), Head(torch.randn(480, width)))
    targets = torch.randint(0, 480, (rows,))
    with Largest() as ours:
        distill_loss(hidden, Head(weight), targets, teacher, Mix(name, 0.5, temperature), chunk).backward()
        distill_scores(hidden, Head(weight), teacher, temperature, chunk)
    assert ours.elements == max(chunk * vocabulary, vocabulary * width)


# Some of the teacher's tokens


def draws(given: dict[str, Any], count: int, temperature: float, seed: int) -> Teacher:
    teacher = given["teacher"]
    p = (logits_of(teacher.hidden, teacher.head)[:, : teacher.width] / temperature).softmax(-1)
    ids = torch.multinomial(p, count, replacement=True, generator=torch.Generator().manual_seed(seed))
    entropy = -(p * p.log()).sum(-1)
    return Teacher(teacher.width, ids=ids, weights=torch.full(ids.shape, 1 / count), entropy=entropy)


def test_draws_are_unbiased_in_value_and_gradient() -> None:
    given, mix = sizes(23, 20), Mix("forward_kl", 1.0, 2.0)
    expected = reference(given, mix)
    wanted = torch.autograd.grad(expected, learning(given))
    found = [distill_loss(**{**given, "teacher": draws(given, 16, 2.0, seed)}, mix=mix) for seed in range(400)]
    gradients = [torch.autograd.grad(one, learning(given)) for one in found]
    values = torch.stack(found).detach()
    assert abs(float(values.mean() - expected)) < 4 * float(values.std()) / 20
    for index, gradient in enumerate(wanted):
        each = torch.stack([one[index] for one in gradients])
        apart = (each.mean(0) - gradient).abs() / (each.std(0) / 20 + 1e-12)
        assert float((apart < 4).double().mean()) > 0.99


@pytest.mark.parametrize("count", [1, 5, 20])
def test_likeliest_tokens_with_their_tail_equal_a_reference(count: int) -> None:
    """One further event is all other tokens; with every token listed it is the full divergence."""
    given, mix = sizes(23, 20), Mix("forward_kl", 0.7, 2.0)
    teacher = given["teacher"]
    log_p = (logits_of(teacher.hidden, teacher.head)[:, :20] / 2).log_softmax(-1)
    logprobs, ids = log_p.topk(count)
    few = {**given, "teacher": Teacher(20, ids=ids, logprobs=logprobs)}
    ours = logits_of(given["hidden"], given["head"])
    q = (ours[:, :20] / 2).softmax(-1)
    inside, p = q.gather(1, ids), logprobs.exp()
    events = [torch.cat([one, 1 - one.sum(-1, keepdim=True)], -1) for one in (p, inside)] if count < 20 else [p, inside]
    apart = divergence_of("forward_kl", *events, skew=0.0).sum()
    expected = 0.7 * 4 * apart + 0.3 * functional.cross_entropy(ours, given["targets"], reduction="sum")
    assert_same(given, distill_loss(**few, mix=mix, chunk=3), expected)
    assert float(apart) <= float(reference(given, Mix("forward_kl", 1.0, 2.0)) / 4) + 1e-9


def test_some_tokens_are_not_enough_for_another_divergence() -> None:
    given = sizes(23, 20)
    with pytest.raises(ValueError, match="full distribution"):
        distill_loss(**{**given, "teacher": draws(given, 4, 1.0, 0)}, mix=Mix("jsd"))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_autocast_is_close_to_float32_and_sums_in_float32(name: str) -> None:
    given, mix = sizes(23, 20, rows=40), Mix(name, 0.5, 2.0)
    teacher = given["teacher"]
    single = {
        "hidden": given["hidden"].detach().float().requires_grad_(),
        "head": Head(given["head"].weight.detach().float().requires_grad_()),
        "targets": given["targets"],
        "teacher": teacher._replace(
            hidden=teacher.hidden.bfloat16(),
            head=Head(teacher.head.weight.bfloat16(), teacher.head.bias.bfloat16()),
        ),
    }
    expected = reference(given, mix)
    wanted = torch.autograd.grad(expected, learning(given))
    with torch.autocast("cpu", torch.bfloat16):
        found = distill_loss(**single, mix=mix, chunk=16)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=0)
    for ours, theirs in zip(torch.autograd.grad(found, learning(single)), wanted, strict=True):
        assert ours.dtype == torch.float32
        assert float((ours - theirs).norm() / theirs.norm()) < 3e-2

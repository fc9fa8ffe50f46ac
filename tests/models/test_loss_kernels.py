"""Other libraries' kernels for the head's loss: used where they are faster and compute the same, otherwise reported."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hfstrat.models import fused_loss, loss_kernels
from hfstrat.models.chunked_loss import Head, head_loss
from hfstrat.models.loss_kernels import Measured, decide, fastest, trl

CPU = torch.device("cpu")
GPU = torch.cuda.is_available() and importlib.util.find_spec("liger_kernel") is not None
LIGER = pytest.param(loss_kernels.liger, marks=pytest.mark.skipif(not GPU, reason="needs CUDA and liger-kernel"))


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kernel", [trl, LIGER])
def test_a_kernel_computes_what_ours_computes(kernel: Any, bias: bool, softcap: float | None, scale: float) -> None:
    torch.manual_seed(0)
    device = "cpu" if kernel is trl else "cuda"
    rows, weight, extra = (torch.randn(*size, device=device) for size in ((40, 64), (300, 64), (300,)))
    learns = [one.requires_grad_(True) for one in (rows, weight / 8, *([extra] if bias else []))]
    head = Head(learns[1], learns[2] if bias else None, softcap, scale)
    targets = torch.randint(300, (40,), device=device)
    ours, theirs = head_loss(rows, head, targets), kernel(rows, head, targets)
    torch.testing.assert_close(theirs, ours)
    for a, b in zip(torch.autograd.grad(theirs, learns), torch.autograd.grad(ours, learns), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def model_of(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert fused_loss.bind_head_loss(model) is None
    return model


def slow(rows: Any, head: Any, targets: Any) -> Any:
    time.sleep(0.05)
    return head_loss(rows, head, targets)


def wrong(rows: Any, head: Any, targets: Any) -> Any:
    return trl(rows, head, targets) * 1.1


def broken(rows: Any, head: Any, targets: Any) -> Any:
    raise RuntimeError("no such device")


def test_the_fastest_with_the_same_results_is_used(tiny: Path) -> None:
    model, shape = model_of(tiny), (4, 32)
    assert fastest(model, {"hfstrat": slow, "trl": trl}, shape, torch.float32, CPU)[0] == "trl"
    assert fastest(model, {"hfstrat": head_loss, "trl": slow}, shape, torch.float32, CPU)[0] == "hfstrat"
    name, said = fastest(model, {"hfstrat": slow, "trl": wrong, "liger": broken}, shape, torch.float32, CPU)
    assert name == "hfstrat"
    assert "loss kernel hfstrat (hfstrat 5" in said
    assert "for 128 tokens; liger fails here (no such device); trl gives other results (10.0% difference)" in said
    assert all(p.grad is None for p in model.parameters())


def test_a_kernel_that_needs_much_more_memory_or_is_hardly_faster_is_not_used() -> None:
    same = [torch.ones(()), torch.ones(3, 2)]
    measured = {"hfstrat": Measured(1.0, 100, same), "trl": Measured(0.5, 126, same), "liger": Measured(0.96, 100, same)}
    assert decide(measured, {}, 1e-3)[0] == "hfstrat"
    measured["trl"] = Measured(0.9, 125, same)
    assert decide(measured, {}, 1e-3)[0] == "trl"
    measured["trl"] = Measured(0.9, 125, [same[0], torch.full((3, 2), float("nan"))])
    assert decide(measured, {}, 1e-3)[0] == "hfstrat"


def test_a_resumed_run_uses_the_kernel_that_it_began_with(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the loss is the same, also of a batch without supervised tokens."""
    calls, made = [], model_of(tiny)

    def counted(*given: Any) -> Any:
        calls.append(1)
        return trl(*given)

    counted.__name__ = "trl"

    class Base:
        model = made
        said: list[str] = []

        def say(self, remark: str) -> None:
            self.said.append(remark)

    base: Any = Base()
    ids = torch.randint(5, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "loss_rows": torch.arange(6), "targets": ids.flatten()[1:7]}
    nothing = {"input_ids": ids, "loss_rows": torch.arange(0), "targets": ids.flatten()[:0]}
    before = made.train()(**batch).loss
    monkeypatch.setattr(loss_kernels, "installed", lambda: {"hfstrat": head_loss, "trl": counted})
    loss_kernels.choose_for(base, (4, 32), torch.float32, CPU, "trl")
    assert not calls, "nothing is measured again"
    torch.testing.assert_close(made(**batch).loss, before)
    assert calls == [1]
    assert loss_kernels.kernel_name(made) == "trl"
    assert float(made(**nothing).loss) == 0.0
    fused_loss.unbind_head_loss(made)
    fused_loss.bind_head_loss(made)
    monkeypatch.setattr(loss_kernels, "installed", lambda: {"hfstrat": head_loss})
    loss_kernels.choose_for(base, (4, 32), torch.float32, CPU, "trl")
    assert "head: the loss kernel was trl, which is not installed here; kernels are measured again" in base.said
    assert loss_kernels.kernel_name(made) == "hfstrat"
    monkeypatch.setattr(fused_loss, "is_plain", lambda head: False)  # such as adapters on the head
    base.said.clear()
    loss_kernels.choose_for(base, (4, 32), torch.float32, CPU, None)
    assert not base.said

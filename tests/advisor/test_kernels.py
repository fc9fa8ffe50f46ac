"""The advisor counts the kernels that oneDNN compiles."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hfstrat.advisor import architecture, candidates, hardware
from hfstrat.advisor.data import Survey
from hfstrat.advisor.memory import CACHED_KERNELS, compiled, widths

PASSES = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).train()
if sys.argv[2] == "lora":
    from peft import LoraConfig, get_peft_model
    model = get_peft_model(model.to(torch.bfloat16), LoraConfig(r=int(sys.argv[3]), target_modules="all-linear"))
    for p in model.parameters():
        p.data = p.data.float() if p.requires_grad else p.data
for width in map(int, sys.argv[4].split(",")):
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=torch.ones(1, width, dtype=torch.long), use_cache=False).logits.float().logsumexp(-1).sum().backward()
    print("WIDTH", width, flush=True)
"""


def found(folder: Path, name: str, rank: int) -> list[int]:
    """Kernels compiled for each further width, as oneDNN reports them."""
    words = [sys.executable, "-c", PASSES, str(folder), name, str(rank), "144,176,208,240"]
    settings = {**os.environ, "ONEDNN_VERBOSE": "profile_create", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=settings, capture_output=True, text=True, check=True)
    parts = done.stdout.split("WIDTH")[1:-1]  # kernels compiled before the first width belong to no single width
    assert len(parts) == 3
    return [part.count("create:cache_miss") for part in parts]


@pytest.mark.skipif(not hardware.has_bfloat16(), reason="this CPU has no products in 16 bits")
@pytest.mark.parametrize("name", ["full", "lora"])
def test_each_width_adds_as_many_kernels_as_predicted(models: Callable[..., Path], name: str) -> None:
    folder = models(family="llama", tied=False)
    model, data = architecture.read(str(folder)), Survey("rows", "causal-lm", 100, np.asarray([64]), max_length=64)
    candidate = candidates.propose(name, model, data)
    count = [compiled(model, candidate.description, number, 0, True) for number in (1, 2)]
    for each in found(folder, name, candidate.description.rank):
        assert count[1] - count[0] == pytest.approx(each, abs=4)  # the products of attention come in blocks


def test_widths_are_those_that_batches_can_have() -> None:
    lengths = np.asarray([3, 16, 17, 40, 40, 500, 512, 511])
    assert widths(lengths, 1, 8) == 4  # 16, 32, 48 and 512
    assert widths(lengths, 8, 8) == 1
    assert widths(lengths, 1, 1) >= widths(lengths, 4, 8)
    assert widths(np.arange(1, 100_000), 1, 16) > 1000
    assert widths(lengths, 1, 2, steps=1) <= 2
    assert widths(lengths, 3, 16) >= 1  # sizes that do not divide each other are refused elsewhere


def test_the_kernel_cache_is_limited() -> None:
    model = architecture.by_hand("30M", 4096, 2048)
    candidate = candidates.propose("full", model, Survey("rows", "causal-lm", 10, np.asarray([64]), max_length=64))
    counts = [compiled(model, candidate.description, number, number, True) for number in (0, 1, 10, 100, 1000)]
    assert counts == sorted(counts)
    assert counts[-1] == CACHED_KERNELS

"""What `--measure` derives from passes, texts and probes."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from conftest import sentences, write_jsonl

from hfstrat.advisor import measure
from hfstrat.cli.advise import Request, advise


def test_passes_and_optimizer_steps_are_separated() -> None:
    """Passes of known seconds per token with an optimizer step of known length after each fourth: both are recovered."""
    source = random.Random(0)
    tokens = [source.randint(50, 400) for _ in range(22)]
    passes = [(0.002 * count + (0.3 if place % 4 == 3 else 0.0), place % 4 == 3) for place, count in enumerate(tokens)]
    passes[0] = (9.0, False)  # the first ones compile
    found = measure.typical_step(passes, [float(count) for count in tokens], 1000.0)
    assert found["seconds"] == pytest.approx(0.002 * 1000 + 0.3)
    assert found["tokens"] == 1000.0


def test_tf_idf_separates_topics_and_not_noise() -> None:
    texts = [[*sentence.split(), "topic" if n % 2 else "other"] for n, sentence in enumerate(sentences(120, seed=3))]
    labels = torch.arange(120) % 2
    assert measure.cross_validate(measure.tf_idf(texts), labels, 2) > 0.8
    noise = torch.randint(0, 2, (120,), generator=torch.Generator().manual_seed(0))
    assert measure.cross_validate(measure.tf_idf([text[:-1] for text in texts]), noise, 2) < 0.75


def test_a_base_expects_texts_like_its_pretraining_data(shared: Path) -> None:
    """A model of stories needs about the bits that it expects on stories, and far more on their shuffled words."""
    story = (shared / "data" / "tinystories_sample" / "tiny_stories.txt").read_text(encoding="utf-8")
    words, source = story.split()[:800], random.Random(0)
    texts = [words[start : start + 100] for start in range(0, 800, 100)]
    kinds = {"data": [" ".join(text) for text in texts], "shuffled": [" ".join(source.sample(text, 100)) for text in texts]}
    found = measure.bits_per_byte(str(shared / "models" / "stories260K"), kinds, 60.0, 256)
    gaps = {kind: one["needed"] / one["expected"] - 1 for kind, one in found.items()}
    assert abs(gaps["data"]) < 0.35
    assert gaps["shuffled"] > 0.7
    raw = {"rates": {}, "failed": {}, "bits_per_byte": found | {"reference": found["shuffled"]}}
    assert measure.interpret(raw, {}).domain_gap == pytest.approx(gaps["data"])


def test_the_learning_curve_reports_whether_more_data_helps() -> None:
    assert "more data would help" in measure.learning_curve({100: 0.6, 200: 0.7, 400: 0.8})
    assert "more data would hardly help" in measure.learning_curve({100: 0.79, 200: 0.8, 400: 0.801})


@pytest.mark.slow
def test_measured_rates_are_reported(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in sentences(200, seed=4)])
    request = Request(model=str(tiny), data=str(file), device="cpu", measure="6s", strategies="lora,full")
    advise(request, None, as_json=True)
    found = json.loads(capsys.readouterr().out)["measured"]
    assert set(found["rates"]) == {"lora", "full"}, found
    assert found["raw"]["bits_per_byte"]["data"]["needed"] > 0

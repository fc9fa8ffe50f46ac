"""Complete runs on recordings: strategies on families, resumes, cached states, and what other commands make of a result."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.runs import folder_of, run, stop_at, weights
from helpers.sounds import (
    CLASSES,
    audio_recipe,
    config_of,
    extractor_of,
    folder_of_classes,
    make_audio_model,
    tone,
)

from hfstrat.errors import RunError, UserError
from hfstrat.recipe.load import load_recipe
from hfstrat.run import page_data
from hfstrat.tasks.audio_classification.processor import made

SCRATCH: dict[str, Any] = {
    "name": "scratch",
    "config": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "num_mel_bins": 32,
    },
}
STRATEGIES: dict[str, Any] = {
    "full": "full",
    "head": "head",
    "head then full": {"name": "head", "then": "full"},
    "partial": {"name": "partial", "last_n_layers": 1},
    "lora": {"name": "lora", "r": 2},
}
FAST = (("wav2vec2-group", "full"), ("whisper", "head"))
SLOW = (("ast", "partial"), ("wavlm", "lora"), ("hubert", "head then full"))  # each strategy once, each family once
ROWS = "evaluation rows"


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of_classes(tmp_path_factory.mktemp("sounds") / "data", 14)


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    models: dict[Any, Path] = {}

    def get(family: str = "whisper", classes: int = 0) -> Path:
        if (family, classes) not in models:
            models[family, classes] = make_audio_model(tmp_path_factory.mktemp(family) / "model", family, classes)
        return models[family, classes]

    return get


def trained(folder: Path, model: Path | None, sounds: Path, *overrides: str, **more: Any) -> tuple[Path, dict[str, Any]]:
    """The folder of a run, and its report."""
    loaded = load_recipe(str(audio_recipe(folder, model, sounds, **more)), list(overrides))
    return folder_of(loaded), run(loaded)


def cases() -> list[Any]:
    return [*FAST, *(pytest.param(*one, marks=[pytest.mark.slow]) for one in SLOW)]


@pytest.mark.parametrize(("family", "strategy"), cases())
def test_strategies_and_families(
    family: str, strategy: str, model_of: Callable[..., Path], sounds: Path, tmp_path: Path
) -> None:
    """The result learns, loads with plain transformers or PEFT, and is the trained model bit for bit."""
    more = {"audio": {"max_length": 1}} if family == "whisper" else {}
    folder, report = trained(tmp_path, model_of(family), sounds, strategy=STRATEGIES[strategy], **more)
    verified = report["result"]["verified"]
    assert verified["bit_equal"], verified
    losses = [report["result"]["measured"][ROWS][when]["loss"]["value"] for when in ("before", "after")]
    keeps = strategy == "head then full" or family == "whisper"  # the start, where four steps are too few to be better
    assert losses[1] < losses[0] or (keeps and losses[1] == losses[0])
    assert report["run"]["data"]["labels"]["training_rows"].keys() == set(CLASSES)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert all(part in page for part in ("Scores of each label", "Confusion matrix", page_data.ABOUT_FILES))
    assert "hfstrat tune" in page


@pytest.mark.parametrize(("family", "strategy"), [("wav2vec2-group", "full"), ("whisper", "head"), ("ast", "scratch")])
@pytest.mark.slow
def test_a_pipeline_gives_the_same_scores(
    family: str, strategy: str, model_of: Callable[..., Path], sounds: Path, tmp_path: Path
) -> None:
    """In a fresh process, bit for bit, for the samples at the model's rate; recordings of several lengths."""
    from hfstrat.cli import inference

    section, model = (SCRATCH, None) if strategy == "scratch" else (strategy, model_of(family))
    folder, _ = trained(tmp_path, model, sounds, "model.dtype=float32", strategy=section, audio={"max_length": 1})
    output = tmp_path / "labels.jsonl"
    inference.predict(str(folder), [], None, output, media={"audio": [str(sounds / "low"), str(sounds / "high" / "000.wav")]})
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == 15
    found = in_a_pipeline(folder / "final", [row["audio"] for row in rows[::3]])
    for row, best in zip(rows[::3], found, strict=True):
        assert (best["label"], best["score"]) == (row["labels"][0], row["scores"][0])


def in_a_pipeline(model: Path, files: list[str]) -> list[dict[str, Any]]:
    """The best label of each file by transformers alone, in a fresh process."""
    code = (
        "import json, sys, soundfile, torch\n"
        "from transformers import pipeline\n"
        "pipe = pipeline('audio-classification', model=sys.argv[1], device='cpu', dtype=torch.float32)\n"
        "print(json.dumps([pipe(soundfile.read(file, dtype='float32')[0], top_k=1)[0] for file in sys.argv[2:]]))\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(model), *files], capture_output=True, text=True, check=True)
    return list(json.loads(ended.stdout.splitlines()[-1]))


@pytest.mark.parametrize("family", ["whisper", "wav2vec2-group"])
@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(
    family: str, model_of: Callable[..., Path], sounds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The augmentation of a step depends on its position alone; two epochs, stopped within the second."""
    steps = ("training.max_steps=9", "training.save_steps=3", "training.load_best_model_at_end=false")
    whole, _ = trained(tmp_path / "whole", model_of(family), sounds, *steps)
    loaded = load_recipe(str(audio_recipe(tmp_path / "parts", model_of(family), sounds)), list(steps))
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        with pytest.raises((KeyboardInterrupt, RunError)):
            run(loaded)
    report = run(loaded)
    assert report["result"]["resumed_from"].endswith("checkpoint-6")
    one, other = weights(whole), weights(folder_of(loaded))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("family", "augmentation"), [("wav2vec2-group", "auto"), ("wav2vec2", "off"), ("whisper", "auto")])
@pytest.mark.slow
def test_micro_batches_have_the_same_gradient(
    family: str, augmentation: str, model_of: Callable[..., Path], sounds: Path, tmp_path: Path
) -> None:
    """One step of SGD from a step's recordings at once, or in parts: the weights are the same but for rounding."""
    options = ("training.max_steps=1", "training.optim=sgd", "model.dtype=float32", f"audio.augmentation={augmentation}")
    sizes = [f"training.per_device_train_batch_size={size}" for size in (8, 2)]
    one, other = (weights(trained(tmp_path / size, model_of(family), sounds, *options, size)[0]) for size in sizes)
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


@pytest.mark.slow
def test_cached_states_change_nothing(model_of: Callable[..., Path], sounds: Path, tmp_path: Path) -> None:
    result = {}
    for cached in (True, False):
        section = {"name": "partial", "last_n_layers": 1, "precompute": cached}
        folder, report = trained(tmp_path / str(cached), model_of("whisper"), sounds, "model.dtype=float32", strategy=section)
        result[cached] = weights(folder)
        assert (report["result"].get("precomputed") is not None) == cached
    assert all(torch.allclose(result[True][name], result[False][name], atol=1e-5) for name in result[True])
    section = {"name": "partial", "last_n_layers": 1, "precompute": True}
    with pytest.raises(UserError, match=r"recordings have different lengths"):
        trained(tmp_path / "refused", model_of("hubert"), sounds, strategy=section)


@pytest.mark.slow
def test_a_small_student_of_a_trained_teacher(model_of: Callable[..., Path], sounds: Path, tmp_path: Path) -> None:
    teacher, _ = trained(tmp_path / "teacher", model_of("ast"), sounds)
    section = {"name": "distill", "teacher": {"name_or_path": str(teacher / "final")}, "student": SCRATCH, "baseline": False}
    _, report = trained(tmp_path / "student", None, sounds, strategy=section)
    assert report["result"]["verified"]["bit_equal"]
    other = make_audio_model(tmp_path / "other", "whisper", classes=3)
    section["teacher"] = {"name_or_path": str(other)}
    with pytest.raises(UserError, match="its feature extractor has"):
        trained(tmp_path / "refused", model_of("ast"), sounds, strategy=section | {"student": "full"})


@pytest.mark.slow
def test_a_shorter_input_of_an_adapter_is_restored(model_of: Callable[..., Path], sounds: Path, tmp_path: Path) -> None:
    """Whisper's positions of another length than its base's are no part of the adapter."""
    from hfstrat.publish.merge import merge

    section = {"name": "lora", "r": 2}
    folder, report = trained(tmp_path, model_of("whisper"), sounds, strategy=section, audio={"max_length": 1})
    assert report["result"]["verified"]["bit_equal"]
    merge(str(folder), tmp_path / "merged")
    assert in_a_pipeline(tmp_path / "merged", [str(sounds / "low" / "001.wav")])[0]["label"] in CLASSES


# models, without runs


@pytest.mark.parametrize("family", ["wav2vec2", "wav2vec2-group", "hubert", "wavlm"])
def test_padding_changes_no_output(family: str) -> None:
    """The classes of transformers with a group norm count padding; with the norm that counts frames they do not."""
    from transformers import AutoModelForAudioClassification

    from hfstrat.models import recordings

    torch.manual_seed(0)
    model = AutoModelForAudioClassification.from_config(config_of(family)).eval()
    processor = made(extractor_of(family), model.config.to_dict(), None)
    short, long = tone("low", 0), tone("high", 1, 1.0)
    recordings.settle(model)
    with torch.no_grad():
        alone = model(**processor.one(short)).logits
        plain = model(**processor.inputs([short, long])).logits[:1]
        recordings.mask_norms(model)
        recordings.check_padding(model, processor)
        together = model(**processor.inputs([short, long])).logits[:1]
        assert torch.equal(model(**processor.one(short)).logits, alone), "the same class, bit for bit"
    assert torch.allclose(alone, together, atol=1e-5)
    assert torch.allclose(alone, plain, atol=1e-5) == (family == "wav2vec2")


def test_whispers_positions_are_the_first_ones() -> None:
    from transformers import AutoModelForAudioClassification

    from hfstrat.models.recordings import fit_length

    for wanted in (30, 140):
        model = AutoModelForAudioClassification.from_config(config_of("whisper"))
        before = model.encoder.embed_positions.weight.clone()
        line = fit_length(model, 2 * wanted)
        after = model.encoder.embed_positions.weight
        count = min(wanted, len(before))
        assert len(after) == wanted
        assert torch.equal(after[:count], before[:count])
        assert f"{wanted} " in line
        fresh = AutoModelForAudioClassification.from_config(model.config).encoder.embed_positions.weight
        assert torch.equal(after, fresh), "what transformers computes from the config"
        assert model(input_features=torch.zeros(1, 20, 2 * wanted)).logits.shape == (1, 2)


def test_positions_of_an_ast_are_cut_around_the_middle_or_interpolated() -> None:
    from transformers import AutoModelForAudioClassification

    from hfstrat.models.recordings import fit_length

    model = AutoModelForAudioClassification.from_config(config_of("ast"))
    body = model.audio_spectrogram_transformer.embeddings
    torch.nn.init.normal_(body.position_embeddings)
    high, wide = body.get_shape(model.config)
    grid = body.position_embeddings[:, 2:].reshape(high, wide, -1).clone()
    fit_length(model, 40)
    new = body.position_embeddings[:, 2:].reshape(high, 3, -1)
    start = (wide - 3) // 2
    assert torch.equal(new, grid[:, start : start + 3])
    assert model(input_values=torch.zeros(1, 40, 32)).logits.shape == (1, 2)
    fit_length(model, 90)
    assert model(input_values=torch.zeros(1, 90, 32)).logits.shape == (1, 2)


def test_a_model_in_16_bits_is_measured(model_of: Callable[..., Path]) -> None:
    """A result has the precision of its checkpoint; float inputs follow it."""
    from transformers import AutoModelForAudioClassification

    from hfstrat.tasks import TASKS

    model = AutoModelForAudioClassification.from_pretrained(model_of("ast")).half().eval()
    inputs = made(extractor_of("ast"), model.config.to_dict(), None).inputs([tone("low", 0), tone("high", 1)])
    with torch.no_grad():
        *_, chances = TASKS["audio-classification"].metrics.sums(model, {**inputs, "labels": torch.tensor([0, 1])})
    assert chances.shape == (2, 2)
    assert torch.allclose(chances.sum(1), torch.ones(2), atol=1e-3)


def test_a_new_projector_passes_everything_on(model_of: Callable[..., Path]) -> None:
    from transformers import AutoModelForAudioClassification

    from hfstrat.models.recordings import open_projector

    model = AutoModelForAudioClassification.from_pretrained(model_of("whisper")).eval()
    open_projector(model)
    states = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.projector(states), states)
    assert model.classifier.in_features == model.config.classifier_proj_size == 32


@pytest.mark.parametrize("family", ["whisper", "wav2vec2", "ast"])
def test_the_features_of_a_layer_are_those_of_the_cut_model(family: str, model_of: Callable[..., Path]) -> None:
    from transformers import AutoModelForAudioClassification

    from hfstrat.models import recordings
    from hfstrat.strategies.head.features import cut
    from hfstrat.strategies.head.own_pooling import own_pooling

    model = AutoModelForAudioClassification.from_pretrained(model_of(family)).eval()
    recordings.settle(model)
    processor = made(extractor_of(family), model.config.to_dict(), None)
    inputs = processor.inputs([tone("low", 0), tone("high", 3)])
    body = own_pooling(model, lambda: inputs)
    depth = 4 if family == "wav2vec2" else 3
    assert body.depth == depth
    with torch.no_grad():
        found = body.features(inputs, list(range(1, depth + 1)), body.poolings)[:, :, 0]
        for layer in range(depth, 0, -1):
            assert torch.equal(cut(body, layer).pooled(inputs), found[:, layer - 1]), (family, layer)


# settings


def test_speechbrain_is_refused_with_its_backbone(sounds: Path, tmp_path: Path) -> None:
    folder = tmp_path / "emotion"
    folder.mkdir()
    for text, said in (
        ("wav2vec2_hub: facebook/wav2vec2-base\n", "set model: facebook/wav2vec2-base"),
        (
            "sample_rate: 16000\nembedding_model: !new:ECAPA\n",
            "set model to the id of its backbone if hyperparams.yaml names one",
        ),
    ):
        (folder / "hyperparams.yaml").write_text(text)
        with pytest.raises(UserError, match="is a SpeechBrain checkpoint, which transformers cannot load") as refused:
            trained(tmp_path, folder, sounds)
        assert said in str(refused.value)
    with pytest.raises(UserError, match="speechbrain/spkrec is a SpeechBrain checkpoint"):
        trained(tmp_path, Path("speechbrain/spkrec"), sounds)


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("data.max_length", {"data": {"max_length": 64}}, "data.max_length: it is for texts"),
    ("model.pooling", {"model": {"pooling": "mean"}}, "model.pooling: it is for models of text"),
    ("packing", {"training": {"packing": True}}, "training.packing: true"),
    ("seconds", {"audio": {"max_length": 1.5}}, "audio.max_length: 1.5: the inputs of Whisper have whole seconds; set 2"),
    ("no seconds", {"audio": {"max_length": 0.0}}, "audio.max_length = 0.0: expected"),
    ("changes of none", {"audio": {"augmentation": "off", "noise": 0.5}}, "augmentation is off; set augmentation: on"),
    ("head", {"strategy": "head", "audio": {"augmentation": "on"}}, "audio.augmentation: strategy head computes the features"),
    ("other task", {"task": "text-classification", "audio": {"max_length": 2}}, "audio: it is for task: audio-classification"),
    ("image", {"image": {"image_size": 64}}, "image: it is for task: image-classification"),
    ("focal", {"strategy": "head", "training": {"class_weights": "focal"}}, "the focal loss has no exact solution; set"),
]


@pytest.mark.parametrize("case", WRONG, ids=[case[0] for case in WRONG])
def test_wrong_settings_are_answered(
    case: tuple[str, dict[str, Any], str], model_of: Callable[..., Path], sounds: Path, tmp_path: Path
) -> None:
    more = dict(case[1])
    overrides = [f"model.{key}={value}" for key, value in more.pop("model", {}).items()]
    with pytest.raises(UserError) as refused:
        trained(tmp_path, model_of(), sounds, *overrides, **more)
    assert case[2] in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_check_draws_spectrograms(
    model_of: Callable[..., Path], sounds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    from hfstrat.cli import check
    from hfstrat.data.audio_sheet import GAP, VIEWS, WIDTH

    check.show(load_recipe(str(audio_recipe(tmp_path, model_of("hubert"), sounds))), 2)
    said = capsys.readouterr().out
    sheet = Image.open(tmp_path / "run-examples.png")
    assert sheet.size[0] == (1 + VIEWS) * (WIDTH + GAP) + GAP, "the recording, and augmented views of it"
    assert np.asarray(sheet).std() > 20
    assert "s at 16,000 Hz, label" in said
    assert not (tmp_path / "run").exists()


def test_commands_for_other_inputs_are_refused(sounds: Path) -> None:
    from hfstrat.cli import inference

    classifier = str(make_audio_model(sounds.parent / "classifier", "ast", classes=3))
    with pytest.raises(UserError, match="this is a classifier of recordings; give --audio PATH"):
        inference.predict(classifier, ["a text"], None, None)
    with pytest.raises(UserError, match="this is a classifier of recordings; give --audio PATH"):
        inference.predict(classifier, [], None, None, media={"image": ["a.png"]})
    with pytest.raises(UserError, match=r"--audio: nowhere.wav: no such file or folder"):
        inference.predict(classifier, [], None, None, media={"audio": ["nowhere.wav"]})


def test_the_equal_error_rate_is_where_the_curves_cross() -> None:
    from scipy.optimize import brentq
    from sklearn.metrics import roc_curve

    from hfstrat.tasks.rankings import eer_of

    source = np.random.default_rng(0)
    true = source.integers(0, 2, 300)
    chance = np.clip(0.25 * true + source.random(300).round(2) * 0.75, 0, 1)
    marks = np.stack([true, chance > 0.5], axis=1).astype(np.int64)
    found = eer_of(marks, np.stack([1 - chance, chance], axis=1), 2)
    for counts in (np.ones(300), source.integers(0, 3, 300).astype(float)):
        curve = roc_curve(true, chance, sample_weight=counts, drop_intermediate=False)
        expected = brentq(lambda x, curve=curve: 1 - x - np.interp(x, curve[0], curve[1]), 0, 1)
        assert found(counts)["eer"] == pytest.approx(expected, abs=1e-9)
    assert eer_of(marks, np.ones((300, 3)) / 3, 3)(np.ones(300)) == {}


def test_a_checkpoint_in_float16_is_trained_where_bfloat16_is_computed(
    model_of: Callable[..., Path], sounds: Path, tmp_path: Path
) -> None:
    """The result is in the type of the forward pass: torch has no norm of float16 on inputs that autocast made bfloat16."""
    from transformers import AutoModel

    folder = tmp_path / "float16"
    AutoModel.from_pretrained(model_of("whisper"), dtype=torch.float16).save_pretrained(folder)
    for name in ("preprocessor_config.json",):
        (folder / name).write_bytes((model_of("whisper") / name).read_bytes())
    _, report = trained(tmp_path, folder, sounds, "model.dtype=auto", "training.max_steps=2", strategy="full")
    assert report["result"]["verified"]["bit_equal"]

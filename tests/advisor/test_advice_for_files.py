"""Advice for images and recordings: positions and parameters are those of the real model, and a survey decodes a few files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
import yaml
from helpers.images import config_of as image_config
from helpers.images import folder_of_classes, make_image_model
from helpers.sounds import config_of as audio_config
from helpers.sounds import folder_of_classes as folder_of_sounds
from helpers.sounds import make_audio_model
from torch.autograd.graph import saved_tensors_hooks

from hfstrat import strategies
from hfstrat.advisor import architecture, child, decide, files, learning, measure
from hfstrat.advisor.data import Survey
from hfstrat.advisor.decide import Measured, Situation
from hfstrat.advisor.file_survey import survey_files
from hfstrat.advisor.hardware import Device
from hfstrat.advisor.speed import Rate
from hfstrat.cli.advise import Request, advise
from hfstrat.data.stats import Statistics
from hfstrat.errors import UserError
from hfstrat.recipe.load import load_data, load_recipe
from hfstrat.strategies import defaults
from hfstrat.strategies.description import Description, Footprint
from hfstrat.tasks import TASKS
from hfstrat.tasks.audio_classification.given import KEPT, kept

IMAGES, SOUNDS = "image-classification", "audio-classification"
FAMILIES = [(IMAGES, name) for name in ("vit", "dinov2")] + [(SOUNDS, name) for name in ("wav2vec2", "whisper", "ast")]
CPU = Device("a CPU", 16.0 * 2**30, is_cpu=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("files")
    folder_of_classes(root / IMAGES)
    folder_of_sounds(root / SOUNDS, count=8)
    return lambda task: root / task


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    root = tmp_path_factory.mktemp("models")

    def make(task: str, family: str) -> Path:
        folder = root / family
        if not folder.exists():
            (make_image_model if task == IMAGES else make_audio_model)(folder, family)
        return folder

    return make


def surveyed(task: str, model: Path, source: Path, *overrides: str) -> tuple[architecture.Model, Survey]:
    recipe = load_data(str(source), overrides, task).recipe
    found = architecture.read(str(model), TASKS[task])
    return found, survey_files(recipe.data, TASKS[task], found, recipe)


def positions_of(model: Any, inputs: dict[str, Any]) -> int:
    """Positions that the first block is given."""
    from hfstrat.models.blocks import evaluating, find_blocks
    from hfstrat.strategies.head.features import hidden_of

    seen, blocks = list[int](), find_blocks(model)
    assert blocks is not None

    def keep(module: Any, args: Any, given: Any) -> None:
        seen.append(hidden_of(given).shape[1])

    with evaluating(model), blocks.modules[0].register_forward_hook(keep):
        model(**inputs)
    return seen[0]


@pytest.mark.parametrize(("task", "family"), FAMILIES)
def test_positions_and_parameters_are_those_of_the_model_that_is_trained(
    task: str, family: str, model_of: Callable[..., Path], data: Callable[[str], Path], tmp_path: Path
) -> None:
    own = ("audio.max_length=2",) if family == "whisper" else ()  # that of the checkpoint
    model, found = surveyed(task, model_of(task, family), data(task), *own)
    for name in ("full", "lora", "partial"):
        recipe = {"task": task, "model": str(model_of(task, family)), "data": {"train": str(data(task)), "eval_size": 6}}
        section = {"name": name, "last_n_layers": 1} if name == "partial" else name
        text = yaml.safe_dump({**recipe, **found.sections, "strategy": section, "output_dir": str(tmp_path / "run")})
        loaded = load_recipe("recipe.yaml", [], text).recipe
        strategy = strategies.build(loaded.strategy)
        processor, rows = strategy.read(loaded)
        base = strategy.load(loaded, processor, rows)
        if name == "full":
            longest = dict(rows.train[int(rows.lengths.argmax())])
            passed = positions_of(base.model, TASKS[task].rows.inputs_of(rows, longest, 0))
            assert abs(passed - found.longest) <= 2, "the last windows of convolutions may be incomplete"
            assert found.longest >= rows.lengths.max()
        shapes = architecture.parameters_of(model, TASKS[task], len(found.labels))
        assert shapes is not None
        built = strategy.build_model(base)
        expected = strategies.build(loaded.strategy).describe(*shapes).footprint
        assert expected.total == sum(p.numel() for p in {id(p): p for p in built.parameters()}.values())
        assert expected.trainable == sum(p.numel() for p in built.parameters() if p.requires_grad)


NEAR = {"vit": 1e-6, "dinov2": 0.15, "whisper": 0.25, "wav2vec2": 0.15}  # a layer scale and a second dropout are not counted


def stored(model: Any, inputs: dict[str, Any]) -> int:
    """Bytes other than parameters and buffers that the forward pass leaves for the backward pass."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in own:
            sizes[place] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model(**inputs)
    assert outputs is not None  # keeps the storages alive until the sizes are counted
    return sum(sizes.values())


@pytest.mark.parametrize(("task", "family"), [one for one in FAMILIES if one[1] in NEAR])
def test_blocks_and_what_is_before_them_store_what_was_added_up(task: str, family: str) -> None:
    sizes, rows, positions = list[int](), 3, {"whisper": 100, "wav2vec2": 24}.get(family, 17)
    for layers in (2, 3):
        config = (image_config if task == IMAGES else audio_config)(family)
        still = {"layerdrop": 0.0, "mask_time_prob": 0.0, "mask_feature_prob": 0.0, "apply_spec_augment": False}  # as in runs
        for key, value in {"num_hidden_layers": layers, **still}.items():
            if hasattr(config, key):
                setattr(config, key, value)
        model = getattr(tf, TASKS[task].model.auto_class).from_config(config).train()
        name = model.main_input_name
        shape = {"pixel_values": (rows, 3, 32, 32), "input_features": (rows, 20, 200), "input_values": (rows, 8000)}[name]
        inputs = {name: torch.randn(shape, generator=torch.manual_seed(0))}
        sizes.append(stored(model, inputs))
    found = {key: tuple(p.shape) for key, p in model.named_parameters()}
    seen = architecture.from_config("a test", config.to_dict(), found, 0, task=TASKS[task])
    shapes = architecture.parameters_of(seen, TASKS[task], 2)
    assert shapes is not None
    trained = Description(Footprint(0, 0), frozenset(shapes[0]), shapes[0])
    block = architecture.live_blocks(seen, trained)[-1]
    predicted = architecture.block_bytes(seen, trained, block, 4, positions, False)
    each = (sizes[1] - sizes[0]) / (rows * positions)
    assert predicted == pytest.approx(each, rel=NEAR[family])
    outside = sizes[1] / (rows * positions) - layers * each
    assert 8 * seen.width + 4 * seen.stem.numbers == pytest.approx(outside, rel=0.4)


@pytest.mark.parametrize(("task", "family"), [(IMAGES, "dinov2"), (SOUNDS, "whisper")])
def test_the_advice_writes_recipes_that_pass_the_checks(
    task: str,
    family: str,
    model_of: Callable[..., Path],
    data: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    key = "image.image_size=16" if task == IMAGES else "audio.max_length=2"
    request = Request(str(model_of(task, family)), str(data(task)), device="cpu", overrides=(key,))
    advise(request, tmp_path / "out", as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["data"]["task"] == task
    assert found["data"]["duplicates"] is None
    assert {each["name"] for each in found["strategies"] if each["can"]} == {"head", "partial", "lora", "full", "scratch"}
    assert all(each["time"]["seconds"] > 0 for each in found["strategies"] if each["can"])
    assert len(found["recipes"]) == 3
    written = yaml.safe_load(Path(found["recipes"][0]).read_text())
    name, value = key.split("=")
    section, key = name.split(".")
    assert written[section][key] == float(value)
    assert "max_length" not in written["data"]


def test_a_survey_reads_the_labels_of_all_files_and_decodes_a_few(
    model_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hfstrat.data import image_files
    from hfstrat.tasks.image_classification.given import GivenImages

    counts = {"decoded": 0, "headers": 0}

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            counts[name] += 1
            return function(*args)

        return call

    monkeypatch.setattr(image_files, "decode", counting("decoded", image_files.decode))
    monkeypatch.setattr(GivenImages, "header", counting("headers", GivenImages.header))
    monkeypatch.setattr(files, "HEADERS", 10)
    folder = folder_of_classes(tmp_path / "many", count=30)
    for path in list((folder / "red").iterdir())[:20]:
        path.unlink()
    _, found = surveyed(IMAGES, model_of(IMAGES, "vit"), folder)
    assert found.labels == {"blue": 30, "green": 30, "red": 10}
    assert counts == {"decoded": counts["decoded"], "headers": 10}
    assert 1 < counts["decoded"] <= files.DECODED
    assert found.lengths.tolist() == [17] * 10, "4 x 4 patches of 8 pixels, and the class token"
    monkeypatch.setattr(files, "MOST_READ", 20)
    _, partly = surveyed(IMAGES, model_of(IMAGES, "vit"), folder)
    assert partly.rows == 70
    assert sum(partly.labels.values()) == pytest.approx(70, abs=3)
    assert any("from 18 of 70" in words for words in partly.estimated)


def test_an_even_part_of_a_table_is_read(data: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sorted by class, so that its beginning has not all of them."""
    paths = sorted(data(IMAGES).rglob("*.png"))
    (tmp_path / "rows.csv").write_text("image,label\n" + "".join(f"{path},{path.parent.name}\n" for path in paths))
    monkeypatch.setattr(files, "MOST_READ", 9)
    task, section = TASKS[IMAGES], load_data(str(tmp_path / "rows.csv"), []).recipe.data
    source = task.rows.opens.open(section.train[0], section, "--data")  # type: ignore[attr-defined]
    source.detect = task.rows.reader  # type: ignore[attr-defined]
    found = files.Files(None, "images")  # type: ignore[arg-type]
    files._read_rows(source, found, Statistics("rows.csv", warnings=[]))
    assert found.rows == len(paths)
    assert found.labels.keys() == {path.parent.name for path in paths}


def test_a_header_without_a_length_is_named_and_long_recordings_take_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    import soundfile

    from hfstrat.data.audio_files import AudioRef
    from hfstrat.data.media_files import Unreadable
    from hfstrat.tasks.audio_classification.given import GivenSound

    unknown = SimpleNamespace(samplerate=16_000, frames=2**63 - 1, channels=1)
    monkeypatch.setattr(soundfile, "info", lambda file: unknown)
    with pytest.raises(Unreadable, match="does not say how long"):
        GivenSound(1.0, 16_000, {"model_type": "whisper"}, {}).header(AudioRef("a.flac"))
    assert kept(np.asarray([1.0, 2.0, 1e12])) == pytest.approx(0.995e12, rel=0.01)
    rng = np.random.default_rng(0)
    for _ in range(20):
        seconds = rng.uniform(0.05, 4, 9)
        enough = [n for n in range(1, 50) if np.minimum(seconds, n / 10).sum() >= KEPT * seconds.sum()]
        assert kept(seconds) == enough[0] / 10


def test_rows_of_evaluation_files_are_counted(data: Callable[[str], Path]) -> None:
    from hfstrat.tuning.options import count_rows

    assert count_rows(str(data(IMAGES)), TASKS[IMAGES]) == 36
    assert count_rows(str(data(SOUNDS)), TASKS[SOUNDS]) == 24


def test_whisper_is_given_as_much_as_the_recordings_have(model_of: Callable[..., Path], data: Callable[[str], Path]) -> None:
    _, found = surveyed(SOUNDS, model_of(SOUNDS, "whisper"), data(SOUNDS))
    assert found.sections == {"audio": {"max_length": 1.0}}, "of 2 seconds; the recordings have less than half of one"
    assert found.longest == 50
    assert any("audio.max_length=1 is proposed" in line for line in found.lines())
    _, given = surveyed(SOUNDS, model_of(SOUNDS, "whisper"), data(SOUNDS), "audio.max_length=2")
    assert given.longest == 100
    model, task = architecture.read(str(model_of(SOUNDS, "whisper")), TASKS[SOUNDS]), TASKS[SOUNDS]
    recipe = load_data(str(data(SOUNDS)), [], task=SOUNDS).recipe
    asked = survey_files(recipe.data, task, model, recipe, proposes=False)
    assert asked.longest == 100, "a recipe is predicted as it is"
    _, short = surveyed(SOUNDS, model_of(SOUNDS, "wav2vec2"), data(SOUNDS), "audio.max_length=0.2")
    assert any("of the sound is beyond 0.2 s" in line for line in short.lines())


def test_the_probe_is_the_quality_of_the_solved_head_and_of_no_other(
    model_of: Callable[..., Path], data: Callable[[str], Path], tmp_path: Path
) -> None:
    model, found = surveyed(IMAGES, model_of(IMAGES, "vit"), data(IMAGES))
    situation = Situation(model, found, CPU, CPU.memory, rate=Rate(1e11, "a test"))
    assert found.files is not None
    sample = found.files.write_sample(tmp_path / "sample", 10.0)
    text = measure._request(situation, {}, sample)["probe"]
    raw = child.probe(load_recipe("probe.yaml", [f"output_dir={tmp_path / 'run'}"], text), 600)
    assert raw["majority"] < raw["probe"] <= 1, "a dominant channel separates the classes even with random weights"
    assert "tf_idf" not in raw
    measured = Measured({}, raw={"probe": json.loads(json.dumps(raw))})
    ranked = decide.decide(Situation(**{**vars(situation), "measured": measured}), defaults.ORDER).ranked
    first, *others = ranked
    assert first.name == "head"
    one = first.expected
    assert one.value is not None
    assert one.low is not None
    assert one.high is not None
    assert 0 <= one.low <= one.value <= one.high <= 1
    assert all(other.expected.value is None for other in others)


def test_a_learning_curve_is_continued_within_its_interval() -> None:
    source, inside, count = np.random.default_rng(0), 0, 300
    for _ in range(count):
        power, scale = source.uniform(0.1, 0.4), source.uniform(0.5, 1.5)
        error = {n: min(0.95, scale * n**-power) for n in (75, 150, 300, 3000)}
        curve = {n: 1 - source.binomial(n, error[n]) / n for n in (75, 150, 300)}
        found = learning.continued(curve, 3000)
        inside += found.low <= 1 - error[3000] <= found.high
        assert found.value >= learning.continued(curve, 300).value
    assert inside / count > 0.75
    assert learning.continued({100: 1.0}, 100).low < 1


NOT_PREDICTED = [
    ("convnext", {}, "convnext has stages of different widths"),
    ("vit", {"task": "object-detection"}, "a detector consists of parts of different widths"),
    ("vit", {"task": "text-classification"}, "contains images, which are not for task text-classification"),
    ("vit", {"overrides": ("image.image_size=20",)}, "20 is not a multiple of the model's patches of 8 pixels; set 16"),
    ("vit", {"overrides": ("audio.max_length=2",)}, "audio: it is for task: audio-classification"),
]


@pytest.mark.parametrize(("family", "given", "message"), NOT_PREDICTED)
def test_what_cannot_be_predicted_is_refused_with_the_reason(
    family: str, given: dict[str, Any], message: str, model_of: Callable[..., Path], data: Callable[[str], Path]
) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        advise(Request(str(model_of(IMAGES, family)), str(data(IMAGES)), device="cpu", **given), None, False)

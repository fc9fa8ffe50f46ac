"""Predicting which class, or classes, a recording has, by the models of AutoModelForAudioClassification."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hfstrat.data.audio_files import AUDIO, AudioRef
from hfstrat.data.audio_rows import OUR_COLUMNS, AudioFormat, AudioSource
from hfstrat.errors import UserError
from hfstrat.tasks.base import Score, Values
from hfstrat.tasks.media import MediaMetrics, MediaModel, MediaRows, MediaTask, MediaText, check_augmentation

if TYPE_CHECKING:
    import numpy as np
    import torch

    from hfstrat.models.load import Base
    from hfstrat.recipe.schema import Recipe

NAME = "audio-classification"
SPEECHBRAIN = "hyperparams.yaml"
BACKBONE = re.compile(
    r"^\s*\w*(?:hub|source)\w*\s*:\s*['\"]?([\w.-]+/[\w.-]*(?:wav2vec2|hubert|wavlm|whisper)[\w.-]*)", re.M | re.I
)


class AudioRows(MediaRows):
    """Recordings with one class, or any number of them."""

    columns = OUR_COLUMNS
    noun = "recording"
    kind, opens = AUDIO, AudioSource
    processor_name = "a feature extractor"

    @property
    def reader(self) -> Callable[..., Any]:
        return AudioFormat.detect

    def given(self, config: dict[str, Any], shapes: dict[str, Any], processor: dict[str, Any], recipe: Recipe) -> Any:
        from hfstrat.tasks.audio_classification.given import given

        return given(config, shapes, processor, recipe)

    def load_processor(self, recipe: Recipe, family: str = "") -> Any:
        from hfstrat.tasks.audio_classification.processor import load

        return load(recipe, family)

    def load_trained(self, folder: str, recipe: Recipe | None = None) -> Any:
        from hfstrat.tasks.audio_classification.processor import load_trained

        return load_trained(folder, recipe.audio.max_length if recipe else None)

    def size_of(self, row: dict[str, Any]) -> str:
        channels = f", {row['channels']} channels" if row["channels"] > 1 else ""
        return f"{row['seconds']:.2f} s at {row['rate']:,} Hz{channels}"

    def draw(self, data: Any, file: Path) -> str:
        from hfstrat.data.audio_sheet import draw

        return draw(data, file)

    @property
    def preparing(self) -> Any:
        from hfstrat.data import audio_classes

        return audio_classes

    def collator(self, base: Base, data: Any, tokenizer: Any, multiple: int) -> Any:
        from hfstrat.data.audio_batches import AudioCollator

        return AudioCollator(tokenizer, len(data.label_names) if data.many else None)

    def worst_row(self, data: Any, length: int) -> dict[str, Any]:
        return dict(data.train[int(data.lengths.argmax())])

    def inputs_of(self, data: Any, row: dict[str, Any], most: int) -> dict[str, Any]:
        from hfstrat.data.audio_batches import open_row

        return dict(data.renderer.one(open_row(row, data.renderer)))

    def probe(self, data: Any, collate: Any) -> dict[str, Any]:
        """One recording as a pipeline gives it: without padding, which plain transformers would count in some models."""
        return self.inputs_of(data, data.eval[0], 0)


class AudioModel(MediaModel):
    """AutoModelForAudioClassification."""

    random_family = "audio-spectrogram-transformer"
    auto_class = "AutoModelForAudioClassification"
    architecture = ("ForAudioClassification", "ForSequenceClassification")
    what, expected = "audio classification", "wav2vec2, HuBERT, WavLM, Whisper or AST"

    def stack(self, name: str, shapes: dict[str, Any], config: dict[str, Any], labels: int) -> Any:
        from hfstrat.tasks.audio_classification.given import stack

        return stack(name, shapes, config, labels)

    def fits(self, config: dict[str, Any]) -> bool:
        from hfstrat.models.transformers_source import families_of

        return config.get("model_type") in families_of(self.auto_class)

    def adapt(self, base: Base, tokenizer: Any) -> None:
        """Fit the model to the length of its inputs, and make it deterministic and independent of padding."""
        from hfstrat.models import recordings

        vars(base.model.config).pop("label_thresholds", None)  # of an earlier training
        for line in recordings.settle(base.model):
            base.say(line)
        if {"projector", "classifier"} <= set(base.new_modules):
            base.say(recordings.open_projector(base.model))
        if line := fit(base.model, tokenizer):
            base.say(line)
        recordings.mask_norms(base.model)
        recordings.check_padding(base.model, tokenizer)

    def check_teacher(self, teacher: Any, section: Any, processor: Any) -> None:
        from hfstrat.models import recordings
        from hfstrat.tasks.audio_classification.processor import from_source

        name = section.name_or_path
        source = str(Path(name).expanduser()) if Path(name).expanduser().exists() else name
        theirs = from_source(source, section.options, "strategy.teacher")
        ours, given = processor.processor.to_dict(), theirs.to_dict()
        of_length = ("chunk_length", "n_samples", "nb_max_frames", "max_length", "mel_filters")
        odd = next((key for key in sorted({*ours, *given} - {*of_length}) if ours.get(key) != given.get(key)), None)
        if odd is not None:
            raise UserError(
                f"strategy.teacher: {name}: its feature extractor has {odd} {given.get(odd)}, and that of the student "
                f"{ours.get(odd)}, so that the same recording has other inputs; set model.tokenizer: {name}, or use another "
                "teacher"
            )
        recordings.settle(teacher)
        fit(teacher, processor)
        recordings.mask_norms(teacher)

    def random_inputs(self, family: str, recipe: Recipe) -> dict[str, Any]:
        seconds = recipe.audio.max_length
        if seconds is None:
            return {}
        if family == "whisper":
            return {"max_source_positions": round(50 * seconds)}
        return {"max_length": max(1, round(100 * seconds))} if family == self.random_family else {}

    def random_config(self, family: str, settings: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
        """The settings of a random model with the inputs of its feature extractor."""
        from hfstrat.models.transformers_source import config_keys
        from hfstrat.tasks.audio_classification.processor import frames_given

        frames, extractor = frames_given(tokenizer.processor), tokenizer.processor
        known = {"mask_time_prob": 0.0, "mask_feature_prob": 0.0, "layerdrop": 0.0, "apply_spec_augment": False}
        if family == "whisper":
            known |= {"max_source_positions": frames // 2, "num_mel_bins": extractor.feature_size}
        elif family == self.random_family:
            known |= {"max_length": frames, "num_mel_bins": extractor.num_mel_bins}
        keys = config_keys(family)
        return {**settings, **{key: value for key, value in known.items() if key in keys}}

    def ready(self, model: Any) -> None:
        from hfstrat.models.recordings import mask_norms

        mask_norms(model)

    def load_options(self, folder: str) -> dict[str, Any]:
        """Positions of another length than the checkpoint's are those of the config, which transformers computes."""
        return {**super().load_options(folder), "ignore_mismatched_sizes": True}


def fit(model: Any, processor: Any) -> str:
    """Fit a model to the inputs of its feature extractor, in place; returns a line about it, or ""."""
    from hfstrat.models.recordings import fit_length
    from hfstrat.tasks.audio_classification.processor import frames_given

    return fit_length(model, frames_given(processor.processor)) if processor.is_fixed else ""


@dataclass(frozen=True)
class AudioMetrics(MediaMetrics):
    """Metrics of classes of recordings; of two classes also the equal error rate."""

    names: ClassVar[tuple[str, ...]] = (*MediaMetrics.names[:-1], "eer", "rows")

    def ranked(self, marks: np.ndarray, chances: np.ndarray) -> Score:
        from hfstrat.tasks.rankings import eer_of

        plain, equal = super().ranked(marks, chances), eer_of(marks, chances, len(self.labels))
        return lambda weights: plain(weights) | equal(weights)


class AudioText(MediaText):
    """Predictions are class names with probabilities."""

    pipeline = NAME
    unit = "recording"
    kind = AUDIO
    processor = ("feature_extractor", "AutoFeatureExtractor")

    def inputs(self, processor: Any, ref: Any) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = processor.one(processor.load(AudioRef(*ref)))
        return found

    def metrics(self, metrics: Values) -> str:
        return super().metrics(metrics) + (f", EER {metrics['eer']:.1%}" if "eer" in metrics else "")

    def example(self, chats: bool, sentence: bool, options: dict[str, Any], config: dict[str, Any]) -> list[str]:
        lines = [
            "import soundfile",
            "import soxr",
            "",
            'samples, rate = soundfile.read("recording.wav", dtype="float32", always_2d=True)',
            "wanted = feature_extractor.sampling_rate",
            "samples = soxr.resample(samples.mean(axis=1), rate, wanted)",
            'inputs = feature_extractor(samples, sampling_rate=wanted, return_tensors="pt")',
            "logits = model(**inputs).logits",
        ]
        return [*lines, *super().example(chats, sentence, options, config)[2:]]


class AudioClassification(MediaTask):
    """The task `audio-classification`."""

    name = NAME
    rows = AudioRows()
    model = AudioModel()
    metrics = AudioMetrics()
    text = AudioText()

    def check(self, recipe: Recipe) -> None:
        from hfstrat.data.audio_files import check_installed

        check_installed()
        super().check(recipe)
        check_speechbrain(recipe.model.name_or_path)
        check_augmentation("audio", recipe, "recording")


def check_speechbrain(source: str) -> None:
    """Refuse a checkpoint of SpeechBrain, with the id of its backbone where it has one of transformers. Raises UserError."""
    folder = Path(source).expanduser()
    is_hub = not folder.exists() and source.lower().startswith("speechbrain/")
    if not is_hub and ((folder / "config.json").is_file() or not (folder / SPEECHBRAIN).is_file()):
        return
    text = "" if is_hub else (folder / SPEECHBRAIN).read_text(encoding="utf-8", errors="replace")
    found = BACKBONE.search(text)
    if found:
        raise UserError(
            f"model.name_or_path: {source} is a SpeechBrain checkpoint, which transformers cannot load; its backbone can be "
            f"trained: set model: {found.group(1)}"
        )
    raise UserError(
        f"model.name_or_path: {source} is a SpeechBrain checkpoint, which transformers cannot load; set model to the id of its "
        f"backbone if {SPEECHBRAIN} names one (wav2vec2_hub or similar), or to another model of transformers"
    )

"""Loading the feature extractor of a model, with the length and the augmentation that the recipe sets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hfstrat.data.audio_batches import AudioProcessor
from hfstrat.errors import UserError, first_line
from hfstrat.models.load import read_json, source_of
from hfstrat.tasks.audio_classification.lengths import FAMILY, HOP, SECONDS, WINDOW, frames_of, strides, tokens_of

if TYPE_CHECKING:
    from hfstrat.recipe.schema import Recipe


def load(recipe: Recipe, family: str = "") -> AudioProcessor:
    """The feature extractor of the recipe's model. Raises UserError."""
    source, options = source_of(recipe.model)
    key, config = "model.name_or_path", {**_config(source), **getattr(recipe.strategy, "config", {})}
    if recipe.model.tokenizer:
        source, key = str(Path(recipe.model.tokenizer).expanduser()), "model.tokenizer"
    folder, family = Path(source).expanduser(), str(config.get("model_type") or family or FAMILY)
    if not source or folder.is_file() or (folder.is_dir() and not (folder / "preprocessor_config.json").is_file()):
        extractor = of_family(family, config)
    else:
        extractor = from_source(source, options if key == "model.name_or_path" else {}, key)
    check_bands(extractor, config, key)
    wanted = recipe.audio
    if wanted.max_length is not None:
        set_length(extractor, wanted.max_length)
    on = wanted.augmentation == "on" or (wanted.augmentation == "auto" and recipe.strategy.augments)
    return made(extractor, config, wanted.max_length, wanted.changes if on else None, recipe.seed)


def load_trained(folder: str, seconds: float | None = None) -> AudioProcessor:
    """The feature extractor in the folder of a result. Raises UserError.

    Args:
        seconds: that the run's recipe sets.
    """
    return made(from_source(folder, {}, "model"), _config(folder), seconds)


def made(
    extractor: Any, config: dict[str, Any], seconds: float | None, augmentation: Any = None, seed: int = 0
) -> AudioProcessor:
    """The processor around a feature extractor, by what it returns for recordings of two lengths. Raises UserError."""
    column, rate = str(extractor.model_input_names[0]), int(extractor.sampling_rate)
    shapes = []
    for count in (rate // 2, rate):
        noise = np.random.default_rng(count).standard_normal(count).astype(np.float32)
        shapes.append(tuple(extractor(noise, sampling_rate=rate, return_tensors="pt")[column].shape[1:]))
    stride, least = strides(config), fewest(config, extractor)
    if shapes[0] != shapes[1]:
        return AudioProcessor(extractor, seconds or SECONDS, stride, 0, least, augmentation, seed)
    length = length_of(extractor, rate)
    return AudioProcessor(extractor, length, stride, tokens_of(config, shapes[0], length), least, augmentation, seed)


def from_source(source: str, options: dict[str, Any], key: str) -> Any:
    from transformers import AutoFeatureExtractor
    from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor

    try:
        found = AutoFeatureExtractor.from_pretrained(source, **options)
    except Exception as error:
        raise UserError(f"{key}: {source}: cannot load a feature extractor: {first_line(error)}") from error
    if not isinstance(found, SequenceFeatureExtractor):
        raise UserError(
            f"{key}: {source}: its {type(found).__name__} is not for recordings; set model.tokenizer to another one"
        )
    return found


def of_family(family: str, config: dict[str, Any]) -> Any:
    """The feature extractor that transformers has for a family, with the bands and the length of a config."""
    import transformers
    from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING_NAMES

    name = FEATURE_EXTRACTOR_MAPPING_NAMES.get(family)
    if not name:
        raise UserError(
            f"strategy.model_type: {family}: transformers has no feature extractor for it; set model.tokenizer to one"
        )
    bands, options = config.get("num_mel_bins"), dict[str, Any]()
    if family == "whisper":
        options = {"feature_size": bands} if bands else {}
        options |= {"chunk_length": config["max_source_positions"] // 50} if "max_source_positions" in config else {}
    elif family == FAMILY:
        options = {"num_mel_bins": bands} if bands else {}
        options |= {"max_length": config["max_length"]} if "max_length" in config else {}
    elif config.get("feat_extract_norm") == "layer":
        options = {"return_attention_mask": True}
    return getattr(transformers, name)(**options)


def set_length(extractor: Any, seconds: float) -> None:
    """Set the seconds that an extractor of inputs of one length gives, in place. Raises UserError."""
    if hasattr(extractor, "chunk_length"):
        if seconds != round(seconds):
            raise UserError(
                f"audio.max_length: {seconds:g}: the inputs of Whisper have whole seconds; set {max(1, round(seconds))}"
            )
        extractor.chunk_length = round(seconds)
        extractor.n_samples = extractor.chunk_length * extractor.sampling_rate
        extractor.nb_max_frames = extractor.n_samples // extractor.hop_length
    elif hasattr(extractor, "max_length"):
        extractor.max_length = frames_of(seconds)


def length_of(extractor: Any, rate: int) -> float:
    """The seconds of a recording in inputs of one length."""
    if hasattr(extractor, "n_samples"):
        return float(extractor.n_samples / rate)
    if hasattr(extractor, "max_length"):
        return ((extractor.max_length - 1) * HOP + WINDOW) / rate
    return SECONDS


def frames_given(extractor: Any) -> int:
    """Frames of the spectrogram in inputs of one length."""
    return int(getattr(extractor, "nb_max_frames", 0) or getattr(extractor, "max_length", 0) or 0)


def fewest(config: dict[str, Any], extractor: Any) -> int:
    """The samples that a model needs: for one frame of its convolutions, or of a spectrogram that is not padded before."""
    kernels, steps = config.get("conv_kernel"), config.get("conv_stride")
    if isinstance(kernels, list | tuple) and isinstance(steps, list | tuple):
        count = int(config.get("squeeze_factor", 1))
        for kernel, step in zip(reversed(kernels), reversed(steps), strict=True):
            count = (count - 1) * step + kernel
        return count
    return 1 if hasattr(extractor, "n_samples") else WINDOW


def check_bands(extractor: Any, config: dict[str, Any], key: str) -> None:
    """Refuse a feature extractor with other mel bands than the model. Raises UserError."""
    wanted = config.get("num_mel_bins")
    given = getattr(extractor, "num_mel_bins", None) or (extractor.feature_size if hasattr(extractor, "n_samples") else None)
    if isinstance(wanted, int) and isinstance(given, int) and wanted != given:
        raise UserError(
            f"{key}: its feature extractor gives {given} mel bands, and the model takes {wanted} (num_mel_bins); set "
            "model.tokenizer to a folder or Hub id with one that fits"
        )


def _config(source: str) -> dict[str, Any]:
    if not source:
        return {}
    path = Path(source).expanduser()
    if path.exists():
        return read_json(path / "config.json" if path.is_dir() else path)
    from transformers import PreTrainedConfig

    try:
        return dict(PreTrainedConfig.get_config_dict(source)[0])
    except Exception as error:
        raise UserError(f"model.name_or_path: {source}: {first_line(error)}") from error

"""What encoders of sound are given of recordings, and their sizes, from configs alone: for predictions of memory and time."""

from __future__ import annotations

import io
import math
from math import prod
from typing import Any, NamedTuple

import numpy as np

from hfstrat.data.audio_files import UNKNOWN, AudioRef, check_header
from hfstrat.data.media_files import Unreadable
from hfstrat.errors import UserError, first_line
from hfstrat.models.parameter_names import BLOCK, CLASS_HEAD, config_size
from hfstrat.models.stack import Stack, Stem, linear
from hfstrat.recipe.schema import Recipe
from hfstrat.recipe.section import Shapes
from hfstrat.tasks.audio_classification.lengths import FAMILY, HOP, SECONDS, WINDOW, frames_of, strides, tokens_of
from hfstrat.tasks.base import Given

RATE = 16_000  # Hz, of nearly all models
KEPT = 0.995  # share of the sound within a proposed length
BANDS, FRAMES = 128, 1024  # of AST
SHORTEST = 0.5  # seconds of a model from scratch
EXTRA = 2  # positions of AST beside the patches: the class and distillation tokens
PARTS = ("feature_extractor.", "feature_projection.", "encoder.", "embeddings.", "layers.", "layernorm.")
# of a checkpoint: the body of a classifier, also with one more name before it
PREFIXES = (
    "wav2vec2.",
    "hubert.",
    "wavlm.",
    "unispeech.",
    "unispeech_sat.",
    "data2vec_audio.",
    "model.",
    f"{FAMILY.replace('-', '_')}.",
)


class Header(NamedTuple):
    """Seconds, rate (Hz) and channels of a recording."""

    seconds: float
    rate: int
    channels: int


class GivenSound(Given):
    """The beginnings of recordings.

    Args:
        seconds: that the model is given, at most; where it `is_fixed` of each.
        stride: samples for each position, where recordings keep their lengths.
        config: of the model.
        bands: of the spectrogram of AST.
        is_set: whether the recipe sets the length.
    """

    def __init__(
        self,
        seconds: float,
        rate: int,
        config: dict[str, Any],
        sections: dict[str, Any],
        bands: int = BANDS,
        is_set: bool = False,
        proposed: float | None = None,
    ) -> None:
        self.seconds, self.rate, self.config, self.sections = seconds, rate, config, sections
        self.bands, self.is_set, self.proposed = bands, is_set, proposed
        self.stride = strides(config)
        self.family = str(config.get("model_type") or FAMILY)
        self.is_fixed = self.family in ("whisper", FAMILY)

    def header(self, ref: Any) -> Header:
        import soundfile

        try:
            found = soundfile.info(io.BytesIO(ref.read()) if ref.member or ref.data is not None else ref.path)
            check_header(found.samplerate, found.frames)
            if found.frames >= UNKNOWN:
                raise Unreadable("its header does not say how long it is")
        except Unreadable:
            raise
        except MemoryError:
            raise
        except Exception as error:  # the decoders of the formats fail in any way
            raise Unreadable(f"it cannot be read: {first_line(error)}") from None
        return Header(found.frames / found.samplerate, int(found.samplerate), int(found.channels))

    def decode(self, ref: Any) -> None:
        AudioRef(*ref).samples(self.rate, self.seconds)

    def positions(self, header: Header) -> int:
        if self.family == FAMILY:
            return tokens_of(self.config, (self.frames, self.bands), self.seconds) + EXTRA
        if self.is_fixed:
            return tokens_of(self.config, (), self.seconds)
        return max(1, int(min(header.seconds, self.seconds) * self.rate) // self.stride)

    @property
    def frames(self) -> int:
        """Frames of the spectrogram of AST."""
        return frames_of(self.seconds)

    def lines(self, headers: list[Header]) -> list[str]:
        seconds = np.asarray([header.seconds for header in headers])
        low, middle, high = np.quantile(seconds, [0, 0.5, 1])
        rates = sorted({header.rate for header in headers})
        shown = " and ".join(f"{rate:,}" for rate in rates[:3]) + (" and more" if len(rates) > 3 else "")
        of = "of" if self.is_fixed else "of up to"
        longest = max(map(self.positions, headers))
        found = [
            f"{low:.2f} to {high:.2f} s, median {middle:.2f} s, at {shown} Hz; the model is given inputs {of} "
            f"{self.seconds:g} s at {self.rate:,} Hz: {'' if self.is_fixed else 'up to '}{longest:,} positions"
        ]
        cut = 1 - float(np.minimum(seconds, self.seconds).sum() / seconds.sum())
        if cut > 0:
            found.append(f"{cut:.1%} of the sound is beyond {self.seconds:g} s and not used (audio.max_length)")
        if self.proposed is not None:
            times = self.proposed / self.seconds
            found.append(
                f"audio.max_length={self.seconds:g} is proposed, by the recordings; the {self.proposed:g} s of the feature "
                f"extractor have {times:.2g} times as many positions, most of them silence"
            )
        wanted = max(SHORTEST, kept(seconds))
        if self.family == FAMILY and not self.is_set and wanted < self.seconds / 2:
            found.append(
                f"the recordings are short: audio.max_length={wanted:g} has about {self.seconds / wanted:.2g} times fewer "
                "positions; how accuracy changes has to be measured"
            )
        return found

    def fitted(self, headers: list[Header]) -> GivenSound:
        """Whisper with inputs as long as the recordings, in whole seconds: its positions are sinusoids, of any length."""
        if self.is_set or self.family != "whisper":
            return self
        wanted = float(math.ceil(kept(np.asarray([header.seconds for header in headers]))))
        if wanted >= self.seconds:
            return self
        section = {"audio": {**self.sections.get("audio", {}), "max_length": wanted}}
        return GivenSound(wanted, self.rate, self.config, section, self.bands, False, self.seconds)

    def scratch(self, headers: list[Any], parameters: float) -> tuple[Given, str, dict[str, Any]]:
        seconds = self.seconds
        if not self.is_set:
            seconds = max(SHORTEST, min(seconds, kept(np.asarray([header.seconds for header in headers]))))
        section = {"audio": {**self.sections.get("audio", {}), "max_length": seconds}}
        made = GivenSound(seconds, RATE, {"model_type": FAMILY}, section, BANDS, self.is_set)
        return made, FAMILY, {"max_length": made.frames, "num_mel_bins": BANDS}


def kept(seconds: np.ndarray) -> float:
    """The seconds, to a tenth, within which nearly all of the sound is."""
    low, high = 1, max(1, math.ceil(10 * float(seconds.max())))
    while low < high:  # the share grows with the length
        middle = (low + high) // 2
        if np.minimum(seconds, middle / 10).sum() >= KEPT * seconds.sum():
            high = middle
        else:
            low = middle + 1
    return low / 10


def given(config: dict[str, Any], shapes: Shapes, processor: dict[str, Any], recipe: Recipe) -> GivenSound:
    """What a model is given of recordings."""
    family, wanted = str(config.get("model_type") or FAMILY), recipe.audio.max_length
    rate, bands = int(processor.get("sampling_rate") or RATE), int(config.get("num_mel_bins") or BANDS)
    own = SECONDS
    if family == "whisper":
        own = float(processor.get("chunk_length") or config.get("max_source_positions", 1500) / 50)
    elif family == FAMILY:
        own = ((int(processor.get("max_length") or config.get("max_length") or FRAMES) - 1) * HOP + WINDOW) / rate
    if wanted is not None and family == "whisper" and wanted != round(wanted):
        raise UserError(f"audio.max_length: {wanted:g}: the inputs of Whisper have whole seconds; set {max(1, round(wanted))}")
    section = recipe.audio.model_dump(exclude_unset=True)
    return GivenSound(wanted or own, rate, config, {"audio": section} if section else {}, bands, wanted is not None)


def stack(name: str, shapes: Shapes, config: dict[str, Any], labels: int) -> Stack:
    """An encoder of sound. Raises UserError for other models."""
    family, width = str(config.get("model_type")), config_size(config, "width")
    layers = int(config.get("encoder_layers") or config_size(config, "layers"))
    of_samples = isinstance(config.get("conv_stride"), list | tuple) and "squeeze_factor" not in config
    if not (of_samples or family in ("whisper", FAMILY)) or not layers:
        raise UserError(
            f"--model: {name}: the encoder of {family} is not one of the kinds whose memory and time are predicted (wav2vec2, "
            "HuBERT, WavLM, Whisper, AST); measure it instead: hfstrat compare --model MODEL --data DATA --budget 5min"
        )
    body, head = body_of(shapes, family), head_of(shapes, config, width, labels)
    sizes = {
        "hidden_size": width,
        "intermediate_size": int(config.get("encoder_ffn_dim") or config_size(config, "inner") or 4 * width),
        "num_hidden_layers": layers,
        "num_attention_heads": int(config.get("encoder_attention_heads") or config_size(config, "heads")),
        "dropout": config.get("hidden_dropout") or config.get("dropout") or config.get("hidden_dropout_prob") or 0.0,
        "attention_dropout": config.get("attention_dropout") or config.get("attention_probs_dropout_prob") or 0.0,
    }
    stem = of_convolutions(config, body, width) if of_samples else of_spectrogram(body)
    return Stack(sizes, body, head, stem)


def body_of(shapes: Shapes, family: str) -> Shapes:
    """The parameters of the encoder."""
    found = {}
    for name, shape in shapes.items():
        plain = next((name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)), name)
        if plain.startswith(PARTS) and not CLASS_HEAD.search(name):
            found[plain] = shape
    return found


def head_of(shapes: Shapes, config: dict[str, Any], width: int, labels: int) -> Shapes:
    """The head; that of a checkpoint without one has the identity as its projector."""
    if config.get("model_type") == FAMILY:
        norm = {f"classifier.layernorm.{part}": (width,) for part in ("weight", "bias")}
        return norm | linear("classifier", labels, width)
    inner = shapes.get("projector.weight", (width, width))[0] if "classifier.weight" in shapes else width
    return linear("classifier.projector", inner, width) | linear("classifier", labels, inner)


def of_spectrogram(body: Shapes) -> Stem:
    """The convolutions of Whisper, of which the first has two frames for each position, or the patches of AST."""
    convolutions = {
        name: shape
        for name, shape in body.items()
        if len(shape) in (3, 4) and name.endswith("weight") and not BLOCK.search(name)
    }
    operations = numbers = 0.0
    for name, shape in convolutions.items():
        frames = 2 if name.endswith("conv1.weight") else 1
        operations += 2.0 * frames * prod(shape)
        numbers += frames * (prod(shape[1:]) if len(shape) == 4 else shape[1] + 2 * shape[0])
    return Stem(operations, numbers)


def of_convolutions(config: dict[str, Any], body: Shapes, width: int) -> Stem:
    """The feature encoder of wav2vec2 and its kind: each layer has as many frames for a position as the later strides reduce.

    Stored are inputs and outputs of each layer: of the convolution, of the norm (all layers, or the first only), of the GELU.
    """
    kernels, steps, widths = (list(config[key]) for key in ("conv_kernel", "conv_stride", "conv_dim"))
    operations, numbers, before = 0.0, 0.0, 1
    for index, (kernel, out) in enumerate(zip(kernels, widths, strict=True)):
        frames = prod(steps[index + 1 :])
        normed = config.get("feat_extract_norm") == "layer" or index == 0
        operations += 2.0 * frames * kernel * before * out
        numbers += frames * out * (3 if normed else 2)
        before = out
    operations += 2.0 * before * width
    positional = [shape for name, shape in body.items() if "pos_conv_embed" in name and len(shape) == 3 and shape[0] > 1]
    operations += sum(2.0 * prod(shape) for shape in positional)
    return Stem(operations, numbers + 2 * before + width * (2 if positional else 0))

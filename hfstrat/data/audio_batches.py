"""How recordings become tensors: transformers' feature extractor of a model, random changes in training, and batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from hfstrat.data.audio_files import AudioRef
from hfstrat.data.collate import TokenCollator, in_full_precision, rounded
from hfstrat.data.media_files import Unreadable
from hfstrat.errors import UserError
from hfstrat.recipe.audio import Changes

MASK = "attention_mask"
MOST_SHIFT = 0.25  # of a recording, however short it is


class AudioProcessor:
    """The feature extractor of a model, in the place of a tokenizer.

    Args:
        extractor: of transformers.
        seconds: of a recording that the model is given, at most.
        stride: samples for each of the model's `tokens`, where recordings keep their lengths.
        tokens: of each recording, where the extractor gives all the same length; 0 where it does not.
        least: samples that the model needs.
        augmentation: of training recordings; None for none.
        seed: of the augmentation.
    """

    pad_token_id = eos_token = None
    max_length = 0
    template = ""

    def __init__(
        self,
        extractor: Any,
        seconds: float,
        stride: int,
        tokens: int = 0,
        least: int = 1,
        augmentation: Changes | None = None,
        seed: int = 0,
    ) -> None:
        self.processor, self.seconds, self.stride, self.least = extractor, seconds, stride, least
        self.augmentation, self.seed = augmentation, seed
        self.rate, self.column = int(extractor.sampling_rate), str(extractor.model_input_names[0])
        self.most = round(seconds * self.rate)  # samples
        self.is_fixed = tokens > 0
        self.tokens = tokens or max(1, self.most // stride)

    @property
    def tokenizer(self) -> Self:
        """Where the renderer of a text has its tokenizer."""
        return self

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        self.processor.save_pretrained(folder)

    def tokens_of(self, samples: int) -> int:
        """The length of a recording in the units of batches."""
        return self.tokens if self.is_fixed else max(1, samples // self.stride)

    def load(self, ref: AudioRef) -> np.ndarray:
        """The samples that the model is given of a recording, `[n]`. Raises Unreadable."""
        found = ref.samples(self.rate, self.seconds)[: self.most]
        if len(found) < self.least:
            raise Unreadable(too_short(len(found), self))
        return found

    def one(self, samples: np.ndarray) -> dict[str, torch.Tensor]:
        """The inputs of one recording, `[1, ...]`, as in a pipeline of transformers."""
        with in_full_precision():
            return dict(self.processor(samples, sampling_rate=self.rate, return_tensors="pt"))

    def inputs(self, many: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        """The inputs of several recordings, `[B, ...]`: where their lengths differ padded with zeros, with an `attention_mask`.

        Each is computed alone, so that it does not depend on the others.
        """
        made = [self.one(samples) for samples in many]
        if self.is_fixed:
            return {self.column: torch.cat([one[self.column] for one in made])}
        values = [one[self.column][0] for one in made]
        masks = [one[MASK][0] if MASK in one else torch.ones(len(value)) for one, value in zip(made, values, strict=True)]
        width = rounded(max(map(len, values)), self.stride if values[0].dim() == 1 else 2)
        padded = values[0].new_zeros(len(values), width, *values[0].shape[1:])
        mask = torch.zeros(len(values), width, dtype=torch.long)
        for index, (value, marks) in enumerate(zip(values, masks, strict=True)):
            padded[index, : len(value)] = value
            mask[index, : len(marks)] = marks.long()
        return {self.column: padded, MASK: mask}

    def augmented(self, samples: np.ndarray, row: int, epoch: int) -> np.ndarray:
        """Samples with random changes, which depend on the seed, the epoch and the row alone."""
        assert self.augmentation is not None
        return augment(samples, self.augmentation, self.rate, np.random.default_rng((self.seed, epoch, row)))


def too_short(samples: int, processor: AudioProcessor) -> str:
    """Why a recording cannot be used, which has fewer samples than the model needs."""
    return (
        f"it has {samples:,} samples at {processor.rate:,} Hz, and this model needs {processor.least:,} "
        f"({processor.least / processor.rate * 1000:.0f} ms)"
    )


def augment(samples: np.ndarray, wanted: Changes, rate: int, source: np.random.Generator) -> np.ndarray:
    """A recording moved in time, with noise, a silenced part and a removed band of frequencies; float32 `[n]`.

    The last two are the masks of SpecAugment (arXiv 1904.08779) on the samples, as in WavAugment (arXiv 2007.00991), so that
    they are the same for models of samples and of spectrograms. Every number is drawn, whether it is used or not, so that one
    change does not depend on another.
    """
    count = len(samples)
    shift, noise, width, place, band, low = source.random(6)
    white = source.standard_normal(count).astype(np.float32)
    found = moved(samples, round((2 * shift - 1) * min(wanted.shift * rate, MOST_SHIFT * count)))
    level = float(np.sqrt(np.mean(np.square(samples, dtype=np.float64))))
    found = found + np.float32(noise * wanted.noise * level) * white
    silenced = round(width * wanted.time_mask * count)
    start = round(place * (count - silenced))
    found[start : start + silenced] = 0
    return without_band(found, band * wanted.frequency_mask, low, rate) if wanted.frequency_mask else found


def moved(samples: np.ndarray, by: int) -> np.ndarray:
    """Samples later by a number of places (earlier if it is negative), with zeros where there were none; a copy."""
    found = np.zeros_like(samples)
    if by >= 0:
        found[by:] = samples[: len(samples) - by]
    else:
        found[:by] = samples[-by:]
    return found


def without_band(samples: np.ndarray, share: float, place: float, rate: int) -> np.ndarray:
    """Samples without a band of this share of the mel scale, at this place (0 to 1) among those that fit."""
    top = mel(rate / 2)
    low = place * (1 - share) * top
    spectrum = np.fft.rfft(samples)
    mels = mel(np.fft.rfftfreq(len(samples), 1 / rate))
    spectrum[(mels >= low) & (mels < low + share * top)] = 0
    return np.fft.irfft(spectrum, len(samples)).astype(np.float32)


def mel(frequency: Any) -> Any:
    """Hz on the mel scale."""
    return 2595 * np.log10(1 + np.asarray(frequency) / 700)


class AudioCollator(TokenCollator):
    """Collates rows of recordings: the inputs of the model and `labels` as `ClassCollator` has them.

    Rows with an `epoch` are those of training, which are augmented.

    Args:
        labels: the number of labels, where a row may have several; None for one per row.
    """

    packs = False
    unpacked_because = "recordings are not packed"
    multiple, pad_token_id = 1, 0

    def __init__(self, processor: AudioProcessor, labels: int | None = None) -> None:
        self.processor, self.labels, self.varies = processor, labels, processor.augmentation is not None
        self.pads = not processor.is_fixed
        self.size = [processor.most]  # what cached features depend on, as is the next
        self.settings = sorted(f"{key}={value}" for key, value in processor.processor.to_dict().items() if key != "mel_filters")

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        found = [open_row(row, self.processor) for row in rows]
        if self.varies and all("epoch" in row for row in rows):
            each = zip(found, rows, strict=True)
            found = [self.processor.augmented(samples, int(row["row"]), int(row["epoch"])) for samples, row in each]
        return {**self.processor.inputs(found), "labels": self.encode_labels([row["label"] for row in rows])}

    def with_teacher(self, has_types: bool) -> Self:
        """The same: a teacher is given the inputs of the student."""
        return self


def open_row(row: dict[str, Any], processor: AudioProcessor) -> np.ndarray:
    """The samples of a prepared row. Raises UserError where they cannot be read any more."""
    ref = AudioRef(row["path"], row["member"], row["audio"])
    try:
        return processor.load(ref)
    except Unreadable as error:
        raise UserError(f"{ref.name}: {error}; it could be read when the data were prepared") from None

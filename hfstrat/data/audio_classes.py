"""The data of an audio classification: see `media_classes`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hfstrat.data import media_classes
from hfstrat.data.audio_files import AUDIO
from hfstrat.data.audio_rows import AudioFormat, AudioMeasure, AudioSource
from hfstrat.data.media_classes import MediaClasses, MediaEncoder
from hfstrat.data.splits import column
from hfstrat.recipe.data import Data


class AudioEncoder(MediaEncoder):
    """Recordings with labels; rows depend on their length for the model."""

    reading, opens = AudioFormat, AudioSource

    @property
    def measure(self) -> AudioMeasure:
        return AudioMeasure(self.renderer)

    @property
    def inputs(self) -> dict[str, Any]:
        one = self.renderer
        return {"length": [one.rate, one.seconds, one.stride, one.tokens if one.is_fixed else 0, one.least]}


@dataclass
class AudioClasses(MediaClasses):
    """Rows with `audio` (bytes of a table), `seconds`, `rate` and `channels`; `renderer` is the `AudioProcessor`."""

    kind, title = AUDIO, "audio"

    def sizes(self) -> str:
        """Durations and sample rates of the training recordings, and what the model is given."""
        seconds, rates = column(self.train, "seconds"), np.unique(column(self.train, "rate"))
        low, middle, high = np.quantile(seconds, [0, 0.5, 1])
        found = f"{low:.2f} to {high:.2f} s, median {middle:.2f} s, together {seconds.sum() / 60:.1f} min"
        given = " and ".join(f"{rate:,}" for rate in rates[:3]) + (" and more" if len(rates) > 3 else "")
        one, changed = self.renderer, self.renderer.augmentation
        length = f"{one.seconds:g} s" if one.is_fixed else f"up to {one.seconds:g} s"
        resampled = f", resampled from {given} Hz" if rates.tolist() != [one.rate] else ""
        words = augmentation_words(changed) if changed is not None else ""
        return f"{found}; the model is given {length} at {one.rate:,} Hz{resampled}, " + (
            f"training with {words}" if words else "without augmentation"
        )


def augmentation_words(wanted: Any) -> str:
    """The random changes of training recordings, in words."""
    parts = [f"shifts up to {wanted.shift:g} s"] if wanted.shift else []
    parts += [f"noise up to {wanted.noise:.0%}"] if wanted.noise else []
    parts += [f"up to {wanted.time_mask:.0%} silenced"] if wanted.time_mask else []
    parts += [f"up to {wanted.frequency_mask:.0%} of the frequencies removed"] if wanted.frequency_mask else []
    return ", ".join(parts) or "no random changes"


def prepare(
    data: Data,
    processor: Any,
    seed: int,
    samples: int = 0,
    max_eval_rows: int | None = None,
    held_out: np.ndarray | None = None,
) -> AudioClasses:
    """The data of an audio classification. Raises UserError as `media_classes.prepare` does."""
    return media_classes.prepare(AudioClasses, AudioEncoder(processor), data, seed, samples, max_eval_rows, held_out)


def prepare_eval(
    data: Data, processor: Any, names: list[str], many: bool, samples: int = 0, max_rows: int | None = None
) -> AudioClasses:
    """All rows of `data.train` as evaluation rows, by the labels that a classifier has. Raises UserError as `prepare` does."""
    return media_classes.prepare_eval(AudioClasses, AudioEncoder(processor, names, many), data, samples, max_rows)

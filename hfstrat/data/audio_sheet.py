"""A picture of the first training recordings as the model is given them, augmentation included: log-mel spectrograms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

ROWS, VIEWS, GAP = 8, 4, 4  # recordings, epochs of each, and pixels between them
BAND = 14  # pixels below each row for its label
WIDTH, HEIGHT = 240, 96  # pixels of a spectrogram
PAPER, INK = (255, 255, 255), (40, 40, 40)
BANDS, WINDOW, HOP = 64, 400, 160  # of the spectrogram of samples
RANGE = 8.0  # powers of ten below the largest value that are drawn
COLORS = np.array([(0, 0, 16), (64, 16, 96), (176, 48, 96), (248, 144, 64), (255, 248, 200)], dtype=np.float64)


def draw(data: Any, file: Path) -> str:
    """Write a PNG with a row for each of some training recordings, spread over the data: what the model is given in the first
    epochs (once without augmentation), time from left to right and frequency from bottom to top.

    Args:
        data: an `AudioClasses`.

    Returns:
        A line about it. Raises UserError where Pillow is not installed.
    """
    from PIL import Image, ImageDraw

    from hfstrat.data.audio_batches import AudioCollator, open_row

    processor = data.renderer
    varies = AudioCollator(processor, None).varies
    views = 1 + (VIEWS if varies else 0)
    places = np.unique(np.linspace(0, len(data.train) - 1, min(ROWS, len(data.train))).astype(int))
    sheet = Image.new("RGB", (views * (WIDTH + GAP) + GAP, len(places) * (HEIGHT + BAND + GAP) + GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, place in enumerate(places.tolist()):
        row, top = data.train[place], GAP + number * (HEIGHT + BAND + GAP)
        samples = open_row(row, processor)
        shown = [samples] + [processor.augmented(samples, int(row["row"]), epoch) for epoch in range(views - 1)]
        for column, each in enumerate(shown):
            sheet.paste(picture(spectrogram(each, processor)), (GAP + column * (WIDTH + GAP), top))
        labels = row["label"] if isinstance(row["label"], list) else [row["label"]]
        named = ", ".join(data.label_names[one] for one in labels)
        pen.text((GAP, top + HEIGHT), f"{named}  ({row['seconds']:.2f} s)", fill=INK)
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file)
    what = ", and augmented in the first epochs" if varies else ""
    return f"{file}: {len(places)} training recordings as the model is given them{what}"


def spectrogram(samples: np.ndarray, processor: Any) -> np.ndarray:
    """The model's own spectrogram `[bands, frames]`, or for a model of samples a log-mel spectrogram of its inputs."""
    values = processor.one(samples)[processor.column][0].numpy().astype(np.float64)
    if values.ndim == 2:
        bands = getattr(processor.processor, "num_mel_bins", None) or getattr(processor.processor, "feature_size", None)
        return values if values.shape[0] == bands else values.T  # type: ignore[no-any-return]
    return log_mel(values, processor.rate)


def log_mel(samples: np.ndarray, rate: int) -> np.ndarray:
    """`[bands, frames]`, powers of ten, from samples `[n]`."""
    from transformers.audio_utils import mel_filter_bank, window_function
    from transformers.audio_utils import spectrogram as computed

    filters = mel_filter_bank(1 + WINDOW // 2, BANDS, 0.0, rate / 2, rate)
    window = window_function(WINDOW, "hann")
    found: np.ndarray = computed(samples, window, WINDOW, HOP, power=2.0, mel_filters=filters, log_mel="log10")
    return np.maximum(found, found.max() - RANGE)


def picture(values: np.ndarray) -> Any:
    """An image of a spectrogram `[bands, frames]`, its smallest value dark."""
    from PIL import Image

    low, high = float(values.min()), float(values.max())
    scaled = (values[::-1] - low) / max(high - low, 1e-9) * (len(COLORS) - 1)
    below = np.clip(scaled.astype(int), 0, len(COLORS) - 2)
    colors = COLORS[below] + (scaled - below)[..., None] * (COLORS[below + 1] - COLORS[below])
    return Image.fromarray(colors.round().astype(np.uint8)).resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)

"""How many tokens recordings become, by the configs of a model and its feature extractor. No torch."""

from __future__ import annotations

from math import prod
from typing import Any

FAMILY = "audio-spectrogram-transformer"  # of a model with random weights, where none is named
SECONDS = 30.0  # of recordings whose feature extractor has no limit
STRIDE = 320  # samples for each token of a model without convolutions in its config: 20 ms, as of wav2vec2
HOP, WINDOW = 160, 400  # samples of the frames of a spectrogram


def frames_of(seconds: float) -> int:
    """Frames of a spectrogram of this length, 100 for each second."""
    return max(1, round(seconds * 100))


def tokens_of(config: dict[str, Any], shape: tuple[int, ...], seconds: float) -> int:
    """Tokens of inputs of one length: AST's patches, and Whisper's pairs of frames."""
    if config.get("model_type", FAMILY) == FAMILY and len(shape) == 2:
        patch, high = config.get("patch_size", 16), shape[1]
        sides = ((high, config.get("frequency_stride", 10)), (shape[0], config.get("time_stride", 10)))
        return max(1, prod((side - patch) // stride + 1 for side, stride in sides))
    return max(1, round(50 * seconds))


def strides(config: dict[str, Any]) -> int:
    """Samples for each token."""
    steps = config.get("conv_stride")
    return prod(steps) if isinstance(steps, list | tuple) and steps else STRIDE

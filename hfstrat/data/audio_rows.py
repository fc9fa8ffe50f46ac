"""Rows of one recording with labels: how they are read, and what is stored of a recording. See `media_rows`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hfstrat.data.audio_files import AUDIO, decode
from hfstrat.data.labeled import LABELS
from hfstrat.data.media_files import Unreadable
from hfstrat.data.media_rows import Measure, Measured, MediaFormat, MediaSource

FORMAT = "audio-classification"
OUR_COLUMNS = sorted({*AUDIO.names, *LABELS})
SILENT = "without sound (no sample above -80 dB)"


@dataclass
class AudioFormat(MediaFormat):
    """How the rows of one source are read: `columns` are our names of the recording and the label."""

    format = FORMAT
    media = AUDIO


@dataclass
class AudioSource(MediaSource):
    """One source of recordings."""

    kind = AUDIO


class AudioMeasure(Measure):
    """Duration, sample rate and channels of each recording.

    Args:
        processor: an `AudioProcessor`, which knows what the model is given.
    """

    kind = AUDIO
    fields = (("seconds", "float64"), ("rate", "int32"), ("channels", "int32"))

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, data: bytes) -> Measured:
        from hfstrat.data.audio_batches import too_short

        processor = self.processor
        found = decode(data, processor.rate, processor.seconds)
        given = min(len(found.samples), processor.most)
        if given < processor.least:
            raise Unreadable(too_short(given, processor))
        values = (found.seconds, found.rate, found.channels)
        return Measured(processor.tokens_of(given), values, tuple(found.changes), SILENT if found.is_silent else "")

"""Recordings of files, archives and tables: how they become samples of one channel at the rate of a model.

libsndfile (`soundfile`) decodes, channels are averaged, and soxr resamples. Of a recording that is longer than the model is
given, only the beginning is decoded. Both packages are imported when the first recording is opened.
"""

from __future__ import annotations

import io
import math
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

from hfstrat.data.media_files import Kind, MediaRef, Unreadable
from hfstrat.errors import UserError, first_line

if TYPE_CHECKING:
    import numpy as np

SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".oga", ".aiff", ".aif", ".aifc", ".au", ".caf", ".w64", ".rf64")
UNDECODED = (".m4a", ".mp4", ".aac", ".wma", ".amr", ".webm")  # that libsndfile does not read: named as unreadable
LEAST_RATE, MOST_RATE = 1_000, 768_000  # Hz
UNKNOWN = 2**40  # frames from which a header's number means that it was never filled in
STREAMED = (0, 0x7FFFFFFF, 0x7FFFF000, 0xFFFFFFFF)  # sizes in the header of a file that was written to a pipe
SILENT = 1e-4  # of full scale (-80 dB): largest sample of a recording that is called silent
MIXED = "have several channels, which are averaged"
CUT = "are longer than the model is given: the rest is left out"
WIDTHS = {"PCM_U8": 8, "PCM_S8": 8, "DPCM_8": 8}
EIGHT = "have 8-bit samples"


class AudioRef(MediaRef):
    """Where a recording is."""

    def samples(self, rate: int, seconds: float) -> np.ndarray:
        """The beginning of the recording as the model is given it, `[n]` in float32. Raises Unreadable."""
        return decode(self.read(), rate, seconds).samples


AUDIO = Kind(
    "recording",
    "recordings",
    "audio",
    ("audio", "file_name"),
    (
        "speech",
        "sound",
        "wav",
        "recording",
        "file_name",
        "filename",
        "file",
        "path",
        "filepath",
        "audio_path",
        "audio_file",
        "mp3",
    ),
    SUFFIXES + UNDECODED,
    "Audio",
    AudioRef,
)


class Decoded(NamedTuple):
    """The beginning of a recording at the model's rate `[n]` (float32), the file's own numbers, and what was changed."""

    samples: np.ndarray
    frames: int
    rate: int
    channels: int
    changes: list[str]

    @property
    def seconds(self) -> float:
        """The length of the complete recording."""
        return self.frames / self.rate

    @property
    def is_silent(self) -> bool:
        return bool(abs(self.samples).max() < SILENT)


def check_installed() -> None:
    """Raises UserError where soundfile or soxr is not installed. Imports nothing."""
    import importlib.util

    if missing := [name for name in ("soundfile", "soxr") if importlib.util.find_spec(name) is None]:
        raise UserError(f"task: audio-classification needs {missing[0]}: pip install 'hfstrat[audio]'")


def decode(data: bytes, rate: int, seconds: float) -> Decoded:
    """The first `seconds` of a file's bytes, of one channel at `rate` Hz. Raises Unreadable."""
    import numpy as np
    import soundfile

    if not data:
        raise Unreadable("the file is empty")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            check_header(file.samplerate, file.frames)
            wanted = math.ceil(seconds * file.samplerate)
            found = file.read(min(file.frames, wanted), dtype="float32", always_2d=True)
            check_complete(data, file, len(found), wanted)
            changes = [MIXED] if file.channels > 1 else []
            changes += [EIGHT] if file.subtype in WIDTHS else []
            changes += [CUT] if file.frames > wanted else []
            own, frames, channels = int(file.samplerate), int(file.frames), int(file.channels)
    except Unreadable:
        raise
    except soundfile.LibsndfileError as error:
        raise Unreadable(_because(data, error)) from None
    except MemoryError:
        raise
    except Exception as error:  # the decoders of the formats fail in any way
        raise Unreadable(f"it cannot be decoded: {first_line(error)}") from None
    mono = found.mean(axis=1) if channels > 1 else found[:, 0]
    if not np.isfinite(mono).all():
        raise Unreadable("it has samples that are not numbers (NaN or infinity)")
    return Decoded(resample(mono, own, rate), frames, own, channels, changes)


def resample(samples: np.ndarray, given: int, wanted: int) -> np.ndarray:
    """Samples `[n]` at another rate, by soxr's high quality; float32."""
    import numpy as np

    if given == wanted:
        return np.ascontiguousarray(samples)
    import soxr

    return np.ascontiguousarray(soxr.resample(samples, given, wanted, quality="HQ"), dtype=np.float32)


def check_header(rate: int, frames: int) -> None:
    """Refuse a rate that no recording has, and a recording without samples. Raises Unreadable."""
    if not LEAST_RATE <= rate <= MOST_RATE:
        raise Unreadable(f"its sample rate is {rate:,} Hz, expected {LEAST_RATE:,} to {MOST_RATE:,}")
    if frames <= 0:
        raise Unreadable("it has no samples")


def check_complete(data: bytes, file: Any, read: int, wanted: int) -> None:
    """Refuse a file that ends before the samples that its header names. Raises Unreadable."""
    if missing := missing_bytes(data):
        raise Unreadable(f"it is truncated: {missing:,} bytes of its samples are missing")
    if read < min(file.frames, wanted) and file.frames < UNKNOWN:
        raise Unreadable(f"it is truncated: it has {read:,} of {file.frames:,} samples")


def missing_bytes(data: bytes) -> int:
    """The bytes of samples that the header of a WAV file names and the file lacks, of which libsndfile says nothing."""
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        return 0
    place = 12
    while place + 8 <= len(data):
        size = struct.unpack("<I", data[place + 4 : place + 8])[0]
        if data[place : place + 4] == b"data":
            return 0 if size in STREAMED else max(0, size - (len(data) - place - 8))
        place += 8 + size + size % 2
    return 0


def _because(data: bytes, error: Exception) -> str:
    known = {b"ftyp": "MPEG-4 (m4a)", b"\x30\x26\xb2\x75": "Windows Media (wma)", b"#!AM": "AMR"}
    kind = known.get(data[4:8]) or known.get(data[:4])
    if kind:
        return f"it has the format {kind}, which libsndfile does not read; convert it to FLAC or WAV"
    if str(getattr(error, "error_string", "")).startswith(("Format not recognised", "Error : unknown format")):
        return "not a recording of a format that libsndfile reads"
    return f"it cannot be decoded: {getattr(error, 'error_string', first_line(error))}"

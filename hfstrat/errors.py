"""The ways a run can end, each with its own exit code."""

from __future__ import annotations

import errno
import logging
import os
import sys
import warnings

OK, CRASH, USER, NON_FINITE, OUT_OF_MEMORY, ARTIFACT, DISK_FULL, NOT_PUSHED, INTERRUPTED = 0, 1, 2, 3, 4, 5, 6, 7, 130

NAMES = {
    OK: "done",
    CRASH: "crashed",
    USER: "refused",
    NON_FINITE: "non-finite",
    OUT_OF_MEMORY: "out-of-memory",
    ARTIFACT: "artifact-differs",
    DISK_FULL: "disk-full",
    NOT_PUSHED: "not-pushed",  # by `hfstrat push` only
    INTERRUPTED: "interrupted",
}


class RunError(Exception):
    """An end with a name and a message, which is shown without a traceback.

    checkpoints: the part of the message that names checkpoints; a comparison, which deletes them, leaves it out.
    """

    code = CRASH

    def __init__(self, message: str, code: int | None = None, checkpoints: str = "") -> None:
        super().__init__(message)
        self.checkpoints = checkpoints
        self.code = self.code if code is None else code


class UserError(RunError):
    """A mistake that the user can fix: what was given, what was expected, what to write instead."""

    code = USER


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def named(error: BaseException) -> RunError:
    """The end that an exception means; an unknown one is a crash."""
    if isinstance(error, RunError):
        return error
    if isinstance(error, KeyboardInterrupt):
        message = (
            "interrupted; the same command resumes from the last complete checkpoint, or starts again if there is none; "
            "prepared data and cached computations are kept"
        )
        return RunError(str(error) or message, INTERRUPTED)
    text = str(error)
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or "can't allocate memory" in text:
        return RunError(
            "out of memory. Remedies, the cheapest first: training.per_device_train_batch_size=1 (the same result, "
            "accumulated), training.activation_checkpointing=true (about a third more time), a smaller data.max_length",
            OUT_OF_MEMORY,
        )
    if text.startswith("Expected more than 1 value per channel when training"):  # torch's batch norms
        shape = text.rpartition("torch.Size(")[2].rstrip(")") or "one value per channel"
        return RunError(
            f"a batch norm of the model got a pass of one example whose features are a single point ({shape}), of which it "
            "cannot take a mean and a spread. Remedies: training.per_device_train_batch_size of 2 or more (and a "
            "training.global_batch_size that leaves no last pass of one), or larger images: image.image_size",
            USER,
        )
    # safetensors and torch.save raise their own exceptions
    full = ("No space left on device", "os error 28", "PytorchStreamWriter failed")
    if (isinstance(error, OSError) and error.errno == errno.ENOSPC) or any(mark in text for mark in full):
        return RunError(
            f"the disk is full ({text.splitlines()[0]}); complete checkpoints are kept: with free space the same command "
            "resumes from the last one",
            DISK_FULL,
        )
    return RunError(f"{type(error).__name__}: {text}", CRASH)


def quiet_libraries() -> None:
    """Library warnings are silenced: their causes are handled or reported by hfstrat."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", "IProgress not found")  # tqdm in a notebook without widgets, which hfstrat does not use
    # PEFT looks for the fused parameters of experts among modules only; they are adapted with the rank of the pattern
    warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match", RuntimeWarning)
    if "transformers" in sys.modules and not sys.stderr.isatty():  # it has read the variable below already, as has the Hub's
        sys.modules["transformers.utils.logging"].disable_progress_bar()
    if "transformers" in sys.modules and "TRANSFORMERS_VERBOSITY" not in os.environ:
        sys.modules["transformers.utils.logging"].set_verbosity_error()  # it has read the variable already
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1" if not sys.stderr.isatty() else "0")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it in runs that quantize nothing

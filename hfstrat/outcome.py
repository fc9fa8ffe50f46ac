"""How a process ends: a sentence for a person, an exit code for a script, a file for the launcher's parent."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hfstrat import errors, stopping, watch

FILE = "HFSTRAT_OUTCOME"  # set by `hfstrat train` when it goes through a launcher


@contextmanager
def reported() -> Iterator[None]:
    """Run the body; end the process with a named exit code and one sentence. Only a crash shows a traceback."""
    quiet_libraries()
    try:
        stopping.listen(os.environ.get(FILE))
        yield
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        stopping.leave_if_cleared(error)
        named = watch.named(error)
        if named.code == errors.CRASH and not isinstance(named, watch.Gone):
            traceback.print_exc()
        end(named.code, str(named))
    else:
        end(errors.OK, "")


def end(code: int, sentence: str) -> None:
    """Say how it ended, once, and exit. The first process that failed is the one that is heard."""
    rank = int(os.environ.get("RANK", "0"))
    file = os.environ.get(FILE)
    if file:
        note(code, sentence)
    elif code and not file and (rank == 0 or code != errors.USER):
        print(f"{'' if rank == 0 else f'rank {rank}: '}{sentence}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if code and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(code)  # a process group with a missing member would wait for it on the way out
    sys.exit(code)


def note(code: int, sentence: str) -> None:
    """Leave it for the launcher's parent, where there is one that has not heard of an end yet."""
    rank, file = int(os.environ.get("RANK", "0")), os.environ.get(FILE)
    if file and (code or rank == 0) and not Path(file).exists():
        partial = Path(f"{file}.{rank}")
        partial.write_text(json.dumps({"code": code, "sentence": sentence, "rank": rank}))
        partial.rename(file)


def quiet_libraries() -> None:
    """What the libraries warn about is either handled here or ours to say."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1" if not sys.stderr.isatty() else "0")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it in runs that quantize nothing

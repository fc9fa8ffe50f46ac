"""How a process ends: a sentence for a person, an exit code for a script, a file for the launcher's parent."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from hfstrat import errors
from hfstrat.errors import quiet_libraries
from hfstrat.trainer import heartbeat, signals
from hfstrat.trainer.heartbeat import FILE, note


@contextmanager
def reported() -> Iterator[None]:
    """Run the body; end the process with a named exit code and one sentence. Only a crash shows a traceback."""
    quiet_libraries()
    try:
        signals.listen(os.environ.get(FILE))
        yield
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        signals.leave_if_cleared(error)
        named = heartbeat.named(error)
        if named.code == errors.CRASH and not isinstance(named, heartbeat.Gone):
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

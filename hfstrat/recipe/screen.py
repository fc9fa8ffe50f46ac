"""Where output goes: a terminal, a notebook's cell, or a file. No torch.

In a notebook rich would show each printed line as an output of its own, and a progress bar as a widget, which needs ipywidgets
and is lost when the notebook is saved. Here lines are plain text, and progress is one output of text that is replaced.
"""

from __future__ import annotations

import html
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    module = sys.modules.get("IPython")
    shell = module.get_ipython() if module is not None and hasattr(module, "get_ipython") else None
    return getattr(shell, "kernel", None) is not None


def console(**options: Any) -> Console:
    """A console of rich, which writes plain lines in a notebook."""
    from rich.console import Console

    plain = False if in_notebook() else None  # a kernel's output calls itself a terminal
    return Console(highlight=False, force_jupyter=plain, force_terminal=plain, **options)


class LiveText:
    """One output of a notebook's cell, whose text is replaced; the last text stays."""

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, text: str) -> None:
        import IPython.display

        display: Any = IPython.display.display
        data = {"text/plain": text, "text/html": f"<pre>{html.escape(text)}</pre>"}
        if self._handle is None:
            self._handle = display(data, raw=True, display_id=True)
        else:
            self._handle.update(data, raw=True)


def bar(done: float, width: int = 30) -> str:
    """A bar of text for a share from 0 to 1."""
    filled = round(min(1.0, max(0.0, done)) * width)
    return f"[{'=' * filled}{' ' * (width - filled)}]"

"""Trackers beside a run: they see what the Trainer logs, and nothing that happens to them touches the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks

Say = Callable[[str], None]


class Tracker(TrainerCallback):  # type: ignore[misc]
    """The Trainer's own callback for one tracker, until it fails: then the run goes on without it, and that is said.

    After training it sees no more: what is measured of the result would begin a second run there.

    Args:
        name: as in `training.report_to`.
        say: shows a line to the user.
    """

    def __init__(self, name: str, say: Say) -> None:
        self.name, self.say = name, say
        self.inner: Any = None
        self.carefully(self._begin)

    def _begin(self) -> None:
        (kind,) = get_reporting_integration_callbacks([self.name])
        self.inner = kind()

    def carefully(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except Exception as error:  # a service, a disk, a version: trackers have many ways to fail
            self.inner = None
            first = (str(error) or type(error).__name__).strip().splitlines()[0]
            self.say(f"{'tracker':<9} {self.name} failed, and the run goes on without it: {first}")
            return None


def _passed_on(event: str) -> Callable[..., Any]:
    def method(self: Tracker, *args: Any, **kwargs: Any) -> Any:
        given = self.carefully(getattr(self.inner, event), *args, **kwargs) if self.inner is not None else None
        if event == "on_train_end":
            self.inner = None
        return given

    return method


for _event in [name for name in vars(TrainerCallback) if name.startswith("on_")]:
    setattr(Tracker, _event, _passed_on(_event))


def callbacks(names: Sequence[str], say: Say) -> list[Tracker]:
    """One for each tracker of `training.report_to`."""
    return [Tracker(name, say) for name in names]

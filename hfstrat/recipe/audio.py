"""The recipe's `audio:` section: the length of recordings and their augmentation, for tasks whose examples are recordings."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import BeforeValidator, Field, model_validator

from hfstrat.recipe.section import Section, switch


class Changes(NamedTuple):
    """Random changes of training recordings: the keys of `Audio`."""

    shift: float = 0.1
    noise: float = 0.1
    time_mask: float = 0.15
    frequency_mask: float = 0.15


DEFAULT = Changes()


class Audio(Section):
    """How recordings become inputs of the model. Rate and normalization are those of the model's feature extractor.

    The random changes of augmentation depend on the seed, the epoch and the row alone.
    """

    max_length: float | None = Field(
        None,
        ge=0.1,
        le=600,
        description="Seconds of a recording that the model is given, from its beginning; default: those of its feature "
        "extractor, or 30. Models with inputs of one length (Whisper, AST) are fitted to it: with shorter ones they are faster",
    )
    augmentation: Annotated[Literal["auto", "on", "off"], BeforeValidator(switch)] = Field(
        "auto",
        description="Random shifts, noise and masks of training recordings; auto: on for full, lora and scratch, off where "
        "results are computed once (head, partial, distill)",
    )
    shift: float = Field(
        DEFAULT.shift, ge=0, le=10, description="Most seconds by which a recording is moved earlier or later; 0: none"
    )
    noise: float = Field(
        DEFAULT.noise, ge=0, le=1, description="Most white noise, as a share of the recording's mean amplitude (RMS); 0: none"
    )
    time_mask: float = Field(
        DEFAULT.time_mask, ge=0, lt=1, description="Most of a recording that is silenced in one place, as a share; 0: none"
    )
    frequency_mask: float = Field(
        DEFAULT.frequency_mask,
        ge=0,
        lt=1,
        description="Widest band of frequencies that is removed, as a share of the mel scale (SpecAugment); 0: none",
    )

    @property
    def changes(self) -> Changes:
        """The changes of an augmentation that is on."""
        return Changes(self.shift, self.noise, self.time_mask, self.frequency_mask)

    @model_validator(mode="after")
    def _changes_are_used(self) -> Audio:
        changed = next((key for key in Changes._fields if getattr(self, key) != getattr(DEFAULT, key)), None)
        if self.augmentation == "off" and changed is not None:
            raise ValueError(f"{changed}: augmentation is off; set augmentation: on, or remove it")
        return self

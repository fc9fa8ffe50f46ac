"""The recipe's `image:` section: the size of images and their augmentation, for tasks whose examples are images."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import BeforeValidator, Field, model_validator

from hfstrat.recipe.section import Section, switch


class Augmentation(NamedTuple):
    """Random changes of training images: the keys of `Images`."""

    crop: float = 0.5
    flip: bool = True
    color: float = 0.2


DEFAULT = Augmentation()


class Images(Section):
    """How images become inputs of the model. Their mean and spread are those of the model's image processor.

    The random changes of augmentation depend on the seed, the epoch and the row alone.
    """

    image_size: int | None = Field(
        None, ge=8, le=2048, description="Side in pixels of the model's input; default: that of its image processor"
    )
    augmentation: Annotated[Literal["auto", "on", "off"], BeforeValidator(switch)] = Field(
        "auto",
        description="Random crops, mirroring and colors of training images; auto: on for full, lora and scratch, off where "
        "results are computed once (head, partial, distill)",
    )
    crop: float = Field(
        DEFAULT.crop,
        gt=0,
        le=1,
        description="Least share of the area in a random crop, resized to the model's input; 1: no crop",
    )
    flip: bool = Field(DEFAULT.flip, description="Mirror every second image; turn it off where left and right have a meaning")
    color: float = Field(
        DEFAULT.color, ge=0, lt=1, description="Most change of brightness, contrast and saturation, as a share; 0: none"
    )

    @property
    def changes(self) -> Augmentation:
        """The changes of an augmentation that is on."""
        return Augmentation(self.crop, self.flip, self.color)

    @model_validator(mode="after")
    def _changes_are_used(self) -> Images:
        changed = next((key for key in Augmentation._fields if getattr(self, key) != getattr(DEFAULT, key)), None)
        if self.augmentation == "off" and changed is not None:
            raise ValueError(f"{changed}: augmentation is off; set augmentation: on, or remove it")
        return self

"""The recipe's `image:` section: the size of images and their augmentation, for tasks whose examples are images."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from hfstrat.recipe.section import Section


class Augmentation(Section):
    """Random changes of training images, drawn anew in each epoch from the seed, the epoch and the row."""

    crop: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Least share of the area in a random crop, which is resized to the model's size; 1: no crop",
    )
    flip: bool = Field(True, description="Mirror every second image from left to right; turn it off where sides have a meaning")
    color: float = Field(0.2, ge=0, lt=1, description="Most change of brightness, contrast and saturation, as a share; 0: none")


def _off(value: Any) -> Any:
    """YAML reads a bare `off` as false."""
    return "off" if value is False else value


class Images(Section):
    """How images become inputs of the model. Their mean and spread are those of the model's image processor."""

    image_size: int | None = Field(
        None, ge=8, le=2048, description="Side in pixels of the model's input; default: that of its image processor"
    )
    augmentation: Annotated[Literal["auto", "off"] | Augmentation, BeforeValidator(_off)] = Field(
        "auto",
        description="Random crops, mirroring and colors of training images: {crop, flip, color}, or off; auto: on "
        "for full, lora and scratch, off where results are computed once (head, partial, distill)",
    )

"""The recipe's `image:` section: the size of images and their augmentation, for tasks whose examples have images."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field, model_validator

from hfstrat.recipe.section import Section, switch


class Augmentation(NamedTuple):
    """Random changes of training images: the keys of `Images`."""

    crop: float = 0.5
    flip: bool = True
    color: float = 0.2
    mixup: float = 0.0


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
    mixup: float = Field(
        DEFAULT.mixup,
        ge=0,
        le=4,
        description="Mix each training image and its label with another one, by a share from Beta(mixup, mixup) of at least "
        "one half (arXiv 1710.09412), for task: image-classification; 0: no mixing, usual: 0.1 to 0.8",
    )

    views: int = Field(
        1,
        ge=1,
        le=64,
        description="With strategy head, the number of fixed views of each training image: the image itself and random "
        "changes of it (crop, flip, color)",
    )

    processor_kwargs: dict[str, Any] = Field(
        {},
        description="For task: image-text-to-text, settings of the model's image processor, such as {max_pixels: 262144} or "
        "{do_image_splitting: false}, which decide how many tokens an image becomes",
    )

    precompute: bool | Literal["auto"] = Field(
        "auto",
        description="For task: image-text-to-text with full or lora, compute the features of a frozen vision tower once and "
        "train without it; auto: for more than one epoch, where it is possible",
    )

    @property
    def changes(self) -> Augmentation:
        """The changes of an augmentation that is on."""
        return Augmentation(self.crop, self.flip, self.color, self.mixup)

    @model_validator(mode="after")
    def _changes_are_used(self) -> Images:
        changed = next((key for key in Augmentation._fields if getattr(self, key) != getattr(DEFAULT, key)), None)
        if self.augmentation == "off" and changed is not None:
            raise ValueError(f"{changed}: augmentation is off; set augmentation: on, or remove it")
        return self

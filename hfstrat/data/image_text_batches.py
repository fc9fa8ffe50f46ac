"""Batches of conversations with images: token ids padded on the right, and the pixels of the images in them."""

from __future__ import annotations

from typing import Any, Self

import torch

from hfstrat.data.collate import TokenCollator, loss_positions, shift
from hfstrat.data.image_files import ImageRef
from hfstrat.data.image_processing import ChatProcessor
from hfstrat.data.image_render import open_ref
from hfstrat.data.media_files import Unreadable
from hfstrat.data.render import IGNORED
from hfstrat.errors import UserError


class ImageTextCollator(TokenCollator):
    """Collates rows of a vision-language model.

    Batches are those of `collate.Collator`, with what the processor makes of the images: `pixel_values` and, by family, their
    sizes or grids; and the types of tokens, for families that read them.

    Args:
        masks_logits, selects_rows: as for `Collator`.
    """

    packs = False
    reads_images = True
    unpacked_because = (
        "the position of an image in a packed row depends on the family (its grid, its mask), which is not tested"
    )

    def __init__(self, processor: ChatProcessor, multiple: int, masks_logits: bool, selects_rows: bool = False) -> None:
        self.processor, self.pad_token_id, self.multiple = processor, processor.pad_token_id or 0, multiple
        self.masks_logits, self.selects_rows = masks_logits, selects_rows
        images = processor.processor.image_processor.to_dict()
        self.settings = sorted(f"{key}={value}" for key, value in images.items())  # what cached features depend on

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return self.with_pixels(rows, self.texts(rows))

    def texts(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The batch without pixels."""
        batch = self.pad(rows, input_ids=self.pad_token_id, labels=IGNORED)
        if name := self.processor.type_key:
            batch[name] = torch.zeros_like(batch["input_ids"])
            for index, row in enumerate(rows):
                batch[name][index, : len(row["input_ids"])] = torch.tensor(self.processor.types(row["input_ids"]))
        if self.selects_rows:
            batch |= loss_positions(batch["labels"])
        elif self.masks_logits:
            batch["logits_to_keep"] = shift(batch["labels"]) != IGNORED
        return batch

    def with_pixels(self, rows: list[dict[str, Any]], batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The batch with the pixels of its images; a batch without images has none."""
        opened = {id(row["images"]): row for row in rows if row.get("images")}  # the two sequences of a pair share theirs
        images = {key: images_of(row) for key, row in opened.items()}
        return batch | self.processor.pixels([images[id(row["images"])] for row in rows if row.get("images")])

    def of_sequences(self) -> Any:
        """The collator of single sequences with images: this one, but where an example is two sequences."""
        return self

    def with_sequences(self, collate: Any) -> Any:
        """This collator with another one of single sequences."""
        return collate

    def sequence(self, row: dict[str, Any]) -> dict[str, Any]:
        """An example as a single sequence with all of its images."""
        return row

    def with_teacher(self, has_types: bool) -> Self:
        return self


def images_of(row: dict[str, Any]) -> list[Any]:
    """The images of a prepared row. Raises UserError where one cannot be read any more."""
    try:
        return [open_ref(ImageRef(image["path"], image["member"] or "", image["data"])) for image in row["images"]]
    except Unreadable as error:
        raise UserError(f"{error}; it could be read when the data were prepared") from None

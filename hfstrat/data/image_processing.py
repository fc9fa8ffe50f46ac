"""The processor of a vision-language model in the place of a tokenizer: text, images, and how many tokens an image becomes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

TEXT_KEYS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
TYPE_KEYS = ("token_type_ids", "mm_token_type_ids")  # 1 where a token is of an image: Gemma 3, and Qwen-VL
REPEATED = re.compile(r"\s+")


class ChatProcessor:
    """A processor of transformers. What it does not have itself is of its tokenizer, in whose place it is used.

    Args:
        processor: of transformers, with an image processor, a tokenizer and an `image_token`.
        extra: files to write beside those of the processor, by name: what this machine cannot load.
        precompute: `image.precompute`.
        settings: `image.processor_kwargs`.
    """

    settings: dict[str, Any] = {}

    def __init__(self, processor: Any, extra: dict[str, str] | None = None, precompute: bool | str = False) -> None:
        self.processor, self.extra, self.precompute = processor, extra or {}, precompute
        self.words = processor.tokenizer
        self._pieces: dict[tuple[tuple[int, int], ...], list[str]] = {}

    def __getattr__(self, name: str) -> Any:
        if name in ("processor", "words", "extra") or name.startswith("__"):  # while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self.words, name)

    def __len__(self) -> int:
        return len(self.words)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.words(*args, **kwargs)

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        self.processor.save_pretrained(folder)
        for name, content in self.extra.items():
            (Path(folder) / name).write_text(content, encoding="utf-8")

    @property
    def image_token(self) -> str:
        """What a chat template writes in the place of an image."""
        return str(self.processor.image_token)

    @cached_property
    def image_ids(self) -> list[int]:
        """The ids of the tokens that the features of images replace."""
        return [int(each) for each in self.processor.image_token_ids if each is not None]

    @cached_property
    def reserved(self) -> list[str]:
        """Texts that mean an image to this processor: no text of the data may have them."""
        own = (getattr(self.processor, name, None) for name in ("image_token", "boi_token", "fake_image_token"))
        inner = self.words.convert_ids_to_tokens(self.image_ids)
        return list(dict.fromkeys(str(each) for each in (*own, *inner) if each))

    @cached_property
    def type_key(self) -> str:
        """The name under which the model is given the types of tokens; empty where it takes none."""
        from PIL import Image

        found = self._call([[Image.new("RGB", (64, 64))]])
        return next((name for name in TYPE_KEYS if name in found), "")

    def types(self, ids: Sequence[int]) -> list[int]:
        """The type of each token: 1 for those of images."""
        return np.isin(np.asarray(ids), self.image_ids).astype(int).tolist()  # type: ignore[no-any-return]

    def pieces(self, sizes: Sequence[tuple[int, int]]) -> list[str]:
        """The text that replaces `image_token` for each image of one row; it depends on the sizes (width, height) alone."""
        from PIL import Image

        key = tuple(sizes)
        if key not in self._pieces:
            found = self._call([[Image.new("RGB", size) for size in sizes]], return_text_replacement_offsets=True)
            self._pieces[key] = [str(each["replacement"]) for each in found["text_replacement_offsets"][0]]
        return self._pieces[key]

    def pixels(self, rows: Sequence[Sequence[Image]]) -> dict[str, torch.Tensor]:
        """The inputs of the vision tower for the images of several rows, each of which has some."""
        if not rows:
            return {}
        found = self._call(rows, return_tensors="pt", padding=True)
        return {name: value for name, value in found.items() if name not in TEXT_KEYS}

    def _call(self, rows: Sequence[Sequence[Image]], **options: Any) -> Any:
        from hfstrat.data.collate import in_full_precision

        texts = [self.image_token * len(images) for images in rows]
        with in_full_precision():
            return self.processor(text=texts, images=[list(images) for images in rows], add_special_tokens=False, **options)

    def cure(self, tokens: int, allowed: int) -> str:
        """The setting that makes images smaller, for a row whose images have `tokens` tokens of which `allowed` fit."""
        images = self.processor.image_processor
        names = type(images).valid_kwargs.__annotations__ if hasattr(type(images), "valid_kwargs") else {}
        share = max(allowed, 1) / max(tokens, 1)
        size = dict(images.size) if getattr(images, "size", None) else {}
        longest = size.get("longest_edge")
        if "max_pixels" in names and longest:
            return f"image.processor_kwargs: {{max_pixels: {int(longest * share)}}}"
        if getattr(images, "do_image_splitting", False):
            return "image.processor_kwargs: {do_image_splitting: false}"
        if longest and "size" in names:
            return f"image.processor_kwargs: {{size: {{longest_edge: {int(longest * share**0.5)}}}}}"
        return ""

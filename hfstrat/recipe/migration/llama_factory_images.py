"""Conversations with images in a LLaMA-Factory config: the task, the parts that stay frozen and the size of images."""

from __future__ import annotations

from typing import Any

from hfstrat.recipe.migration.rules import Draft, Rules, gone, keys, read_with, whole

PARTS = {  # LLaMA-Factory's switches, their defaults, and the parts here
    "freeze_vision_tower": (True, "vision"),
    "freeze_multi_modal_projector": (True, "projector"),
    "freeze_language_model": (False, "language"),
}
SIZES = {
    "image_max_pixels": "max_pixels",
    "image_min_pixels": "min_pixels",
    "image_do_pan_and_scan": "do_pan_and_scan",
    "crop_to_patches": "crop_to_patches",
}
UNREAD = "videos and sound of language models are not read"
RULES: Rules = {
    **keys(" ".join(PARTS), read_with("of a vision-language model", "strategy.freeze")),
    **keys(" ".join(SIZES), read_with("of a vision-language model", "image.processor_kwargs")),
    "media_dir": gone("paths of images are relative to the file with the rows"),
    **keys(
        "video_max_pixels video_min_pixels video_fps video_maxlen use_audio_in_video audio_sampling_rate",
        gone(UNREAD),
    ),
}


def images(draft: Draft, in_rows: bool) -> None:
    """Set the task and its keys where rows have images, or a key says that the model reads some."""
    given = [key for key in (*PARTS, *SIZES) if draft.given.get(key) is not None]
    if not given and not in_rows:
        return
    key = given[0] if given else "dataset"
    draft.put("task", "image-text-to-text", key)
    draft.look(key, "read as a vision-language model, whose rows have images; for texts alone: task: causal-lm")
    frozen = [part for switch, (default, part) in PARTS.items() if draft.take(switch, default)]
    draft.put("strategy.freeze", frozen, next((each for each in PARTS if each in draft.given), ""))
    sizes: dict[str, Any] = {ours: whole(draft.take(key)) for key, ours in SIZES.items() if draft.given.get(key) is not None}
    if sizes:
        draft.put("image.processor_kwargs", sizes, next(each for each in SIZES if draft.given.get(each) is not None))
        draft.look(
            "image.processor_kwargs", "the names of the settings are those of the model's own processor: `hfstrat check`"
        )

"""Tiny random vision-language models of several families with processors made by hand, and conversations about images."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import make_tokenizer

COLORS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220)}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
SPECIAL = {
    "idefics3": ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"],
    "smolvlm": ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"],
    "qwen2_5_vl": ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"],
    "qwen3_vl": ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"],
    "gemma3": ["<start_of_image>", "<end_of_image>", "<image_soft_token>"],
    "llava": ["<image>"],
    "llava_next": ["<image>"],
    "llava_onevision": ["<image>", "<video>"],
}
FAMILIES = tuple(SPECIAL)
WRITTEN = {  # what a chat template writes for an image
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "gemma3": "<start_of_image>",
}


def template(family: str) -> str:
    image = WRITTEN.get(family, "<image>")
    return (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
        "{% if part['type'] == 'image' %}" + image + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def vision(**more: Any) -> dict[str, Any]:
    return {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, **more}


def tokenizer_of(family: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    tokenizer = make_tokenizer(chat=False)
    if family == "gemma3":
        named = dict(zip(("boi_token", "eoi_token", "image_token"), SPECIAL[family], strict=True))
        kept = {"eos_token": tokenizer.eos_token, "pad_token": tokenizer.pad_token, "unk_token": tokenizer.unk_token}
        backend = tokenizer.backend_tokenizer
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, extra_special_tokens=named, **kept)
    else:
        tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[family]}, replace_extra_special_tokens=False)
    tokenizer.chat_template = template(family)
    return tokenizer


def processor_of(family: str, tokenizer: Any) -> Any:
    """The processor of a family, with small images."""
    import transformers as t

    from hfstrat.tasks.image_text_to_text.processor import _without_videos

    chat = {"chat_template": tokenizer.chat_template}
    if family in ("idefics3", "smolvlm"):
        images = (t.Idefics3ImageProcessorPil if family == "idefics3" else t.SmolVLMImageProcessorPil)(
            size={"longest_edge": 64}, max_image_size={"longest_edge": 32}
        )
        if family == "idefics3":
            return t.Idefics3Processor(images, tokenizer, image_seq_len=4, **chat)
        return _without_videos(t.SmolVLMProcessor)(images, tokenizer, None, image_seq_len=4, **chat)
    if family in ("qwen2_5_vl", "qwen3_vl"):
        images = t.Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=32 * 32)
        kind = _without_videos(t.Qwen2_5_VLProcessor if family == "qwen2_5_vl" else t.Qwen3VLProcessor)
        return kind(images, tokenizer, **chat)
    if family == "gemma3":
        return t.Gemma3Processor(
            t.Gemma3ImageProcessorPil(size={"height": 32, "width": 32}), tokenizer, image_seq_length=4, **chat
        )
    if family == "llava":
        images = t.LlavaImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
        more = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        return t.LlavaProcessor(images, tokenizer, **more, **chat)
    pinpoints = {"image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]}
    if family == "llava_next":
        images = t.LlavaNextImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, **pinpoints)
        more = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        return t.LlavaNextProcessor(images, tokenizer, **more, **chat)
    images = t.LlavaOnevisionImageProcessorPil(size={"height": 32, "width": 32}, **pinpoints)
    kind = _without_videos(t.LlavaOnevisionProcessor)
    return kind(images, tokenizer, num_image_tokens=16, vision_feature_select_strategy="full", **chat)


def config_of(family: str, tokenizer: Any) -> Any:
    import transformers as t

    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL[family]}
    common = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text = {**TEXT, **common, "bos_token_id": 1, "tie_word_embeddings": False}
    more = {"tie_word_embeddings": False}
    if family in ("idefics3", "smolvlm"):
        kind = t.Idefics3Config if family == "idefics3" else t.SmolVLMConfig
        tower = vision(image_size=32, patch_size=8)
        return kind(
            vision_config=tower,
            text_config={"model_type": "llama", **text},
            scale_factor=2,
            image_token_id=ids["<image>"],
            pad_token_id=tokenizer.pad_token_id,
            **more,
        )
    if family in ("qwen2_5_vl", "qwen3_vl"):
        tokens = {
            "image_token_id": ids["<|image_pad|>"],
            "video_token_id": ids["<|video_pad|>"],
            "vision_start_token_id": ids["<|vision_start|>"],
            "vision_end_token_id": ids["<|vision_end|>"],
        }
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
        if family == "qwen2_5_vl":
            tower = {
                "depth": 2,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_heads": 2,
                "patch_size": 4,
                "spatial_merge_size": 2,
                "out_hidden_size": 32,
                "window_size": 16,
                "fullatt_block_indexes": [1],
                "temporal_patch_size": 2,
            }
            return t.Qwen2_5_VLConfig(vision_config=tower, text_config={**text, "rope_parameters": rope}, **tokens, **more)
        tower = {
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "out_hidden_size": 32,
            "temporal_patch_size": 2,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        }
        return t.Qwen3VLConfig(
            vision_config=tower, text_config={**text, "head_dim": 8, "rope_parameters": rope}, **tokens, **more
        )
    if family == "gemma3":
        return t.Gemma3Config(
            text_config={**text, "head_dim": 8, "sliding_window": 64, "query_pre_attn_scalar": 8},
            vision_config=vision(image_size=32, patch_size=8, model_type="siglip_vision_model", vision_use_head=False),
            mm_tokens_per_image=4,
            boi_token_index=ids["<start_of_image>"],
            eoi_token_index=ids["<end_of_image>"],
            image_token_index=ids["<image_soft_token>"],
            **more,
        )
    clip = vision(image_size=32, patch_size=8, model_type="clip_vision_model", projection_dim=16)
    if family == "llava":
        return t.LlavaConfig(
            vision_config=clip,
            text_config={"model_type": "llama", **text},
            image_token_index=ids["<image>"],
            image_seq_length=16,
            **more,
        )
    grid = {"image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]}
    if family == "llava_next":
        return t.LlavaNextConfig(
            vision_config=clip, text_config={"model_type": "llama", **text}, image_token_index=ids["<image>"], **grid, **more
        )
    siglip = vision(image_size=32, patch_size=8, model_type="siglip_vision_model", vision_use_head=False)
    return t.LlavaOnevisionConfig(
        vision_config=siglip,
        text_config={"model_type": "qwen2", **text},
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        **grid,
        **more,
    )


def make_vision_language(folder: Path, family: str) -> Path:
    """Save a random model with its processor."""
    import torch
    from transformers import AutoModelForImageTextToText

    tokenizer = tokenizer_of(family)
    processor = processor_of(family, tokenizer)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config_of(family, tokenizer))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "norm" not in name:
            parameter.data = torch.randn_like(parameter) * 0.08
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def picture(folder: Path, name: str, color: str, size: tuple[int, int] = (40, 32)) -> str:
    from PIL import Image

    Image.new("RGB", size, COLORS[color]).save(folder / name)
    return name


def conversations(folder: Path, count: int = 24, seed: int = 0, most: int = 2) -> Path:
    """Conversations about pictures of one color, of one to `most` images, of unequal sizes; every fourth has none."""
    source, rows = random.Random(seed), []
    for number in range(count):
        colors = source.choices(list(COLORS), k=number % (most + 2) % (most + 1))
        sizes = [(source.choice((24, 40, 64)), source.choice((24, 32, 48))) for _ in colors]
        files = [
            picture(folder, f"{number}-{place}.png", color, size)
            for place, (color, size) in enumerate(zip(colors, sizes, strict=True))
        ]
        question = [*({"type": "image"} for _ in files), {"type": "text", "text": f"the colors {number} and a hat"}]
        answer = " and ".join(colors) or "no dog sat"
        rows.append(
            {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], "images": files}
        )
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def loaded(folder: Path, family: str) -> Any:
    """The processor of a tiny model, as a run loads it."""
    from hfstrat.tasks.image_text_to_text.processor import from_source

    found = from_source(str(folder), {}, "model.name_or_path", {})
    found.words.padding_side = "right"
    return found


Make = Callable[[str], Path]


def image_pairs(folder: Path, count: int = 24, seed: int = 0, most: int = 2, labeled: bool = False) -> Path:
    """Preferences between answers about pictures, in TRL's form; every fourth prompt has no picture."""
    source, rows = random.Random(seed), []
    for line in conversations(folder, count, seed, most).read_text().splitlines():
        row = json.loads(line)
        question, answer = row["messages"]
        wrong = {"role": "assistant", "content": " ".join(source.choices(["the", "hat", "ran", "not"], k=source.randint(1, 5)))}
        given: dict[str, Any] = {"prompt": [question], "images": row["images"]}
        if labeled:
            good = source.random() < 0.6
            rows.append({**given, "completion": [answer if good else wrong], "label": good})
        else:
            rows.append({**given, "chosen": [answer], "rejected": [wrong]})
    path = folder / ("labeled.jsonl" if labeled else "pairs.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path

"""Predicted and measured memory of vision-language models, by family and by what is trained.

    python -m benchmarks.vision_memory [--only FAMILY/RUN,..]

Writes benchmarks/results/vision_memory.json and .md. Each run is
`hfstrat train` in a process of its own, of a few steps, and its prediction is that of `report.json`, made before the
run; results are written at once, so that an interrupted benchmark resumes. The model of `llava` is that of scripts/demo_vlm.py;
the others have random weights in the shapes of their families: a language model of 12 layers of width 576 with the tokenizer of
SmolLM2, and a tower of 8 layers of width 384. Rows are 96 photographs of ../shared/data/blood_cells with what is in them.

Predicted before the first run: 16 % off in the median, 40 % in the worst case, which is `all`, since what a tower stores was
never compared with a run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS, ROOT, machine, train, write
from hfstrat.advisor.hardware import import_bytes

DATA = ROOT.parent / "shared" / "data" / "blood_cells"
DEMO, WORDS = ROOT / "models" / "vision-language-demo", ROOT / "models" / "SmolLM2-135M-Instruct"
RESULT = RESULTS / "vision_memory.json"
WORK = ROOT / "runs" / "benchmarks" / "vision_memory"
ROWS, BATCH, STEPS = 96, 8, 3
FAMILIES = ("llava", "smolvlm", "qwen2_5_vl", "gemma3")
RUNS: dict[str, dict[str, Any]] = {
    "projector": {"name": "full", "freeze": ["vision", "language"]},
    "lora": {"name": "lora"},
    "partial": {"name": "partial", "last_n_layers": 4},
    "full": {"name": "full"},
    "all": {"name": "full", "freeze": []},
}
TEXT = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
}
VISION = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 6}
MARKS = {
    "smolvlm": ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"],
    "qwen2_5_vl": ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"],
    "gemma3": ["<start_of_image>", "<end_of_image>", "<image_soft_token>"],
}
WRITTEN = {"smolvlm": "<image>", "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>", "gemma3": "<start_of_image>"}


def template(family: str) -> str:
    return (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
        "{% if part['type'] == 'image' %}" + WRITTEN[family] + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def model_of(family: str) -> Path:
    """The folder of a model with its processor, made if it is not there."""
    if family == "llava":
        return DEMO
    folder = WORK / family
    if (folder / "model.safetensors").is_file():
        return folder
    import torch
    from transformers import AutoModelForImageTextToText, AutoTokenizer, PreTrainedTokenizerFast

    tokenizer: Any = AutoTokenizer.from_pretrained(WORDS)
    if family == "gemma3":
        named = dict(zip(("boi_token", "eoi_token", "image_token"), MARKS[family], strict=True))
        kept = {"eos_token": tokenizer.eos_token, "pad_token": tokenizer.pad_token, "unk_token": tokenizer.unk_token}
        backend = tokenizer.backend_tokenizer
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, extra_special_tokens=named, **kept)
    else:
        tokenizer.add_special_tokens({"additional_special_tokens": MARKS[family]}, replace_extra_special_tokens=False)
    tokenizer.chat_template = template(family)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config_of(family, tokenizer), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    processor_of(family, tokenizer).save_pretrained(folder)
    return folder


def config_of(family: str, tokenizer: Any) -> Any:
    import transformers as t

    ids = {mark: tokenizer.convert_tokens_to_ids(mark) for mark in MARKS[family]}
    common = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": 1}
    text = {**TEXT, **common, "vocab_size": len(tokenizer), "tie_word_embeddings": True}
    if family == "smolvlm":
        tower = {**VISION, "image_size": 224, "patch_size": 16}
        return t.SmolVLMConfig(
            vision_config=tower,
            text_config={"model_type": "llama", **text},
            scale_factor=2,
            image_token_id=ids["<image>"],
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=True,
        )
    if family == "gemma3":
        return t.Gemma3Config(
            text_config={**text, "head_dim": 64, "sliding_window": 512, "query_pre_attn_scalar": 64},
            vision_config={
                **VISION,
                "image_size": 448,
                "patch_size": 14,
                "model_type": "siglip_vision_model",
                "vision_use_head": False,
            },
            mm_tokens_per_image=256,
            boi_token_index=ids["<start_of_image>"],
            eoi_token_index=ids["<end_of_image>"],
            image_token_index=ids["<image_soft_token>"],
            tie_word_embeddings=True,
        )
    tower = {
        "depth": 8,
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_heads": 6,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "out_hidden_size": 576,
        "window_size": 112,
        "fullatt_block_indexes": [3, 7],
        "temporal_patch_size": 2,
    }
    return t.Qwen2_5_VLConfig(
        vision_config=tower,
        text_config={**text, "rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1e6}},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def processor_of(family: str, tokenizer: Any) -> Any:
    import transformers as t

    from hfstrat.tasks.image_text_to_text.processor import _without_videos

    chat = {"chat_template": tokenizer.chat_template}
    if family == "smolvlm":
        images = t.SmolVLMImageProcessorPil(size={"longest_edge": 448}, max_image_size={"longest_edge": 224})
        return _without_videos(t.SmolVLMProcessor)(images, tokenizer, None, image_seq_len=49, **chat)
    if family == "gemma3":
        images = t.Gemma3ImageProcessorPil(size={"height": 448, "width": 448})
        return t.Gemma3Processor(images, tokenizer, image_seq_length=256, **chat)
    images = t.Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, min_pixels=56 * 56, max_pixels=448 * 448)
    return _without_videos(t.Qwen2_5_VLProcessor)(images, tokenizer, **chat)


def rows() -> Path:
    """Photographs and what is in them, of unequal sizes and lengths."""
    from PIL import Image

    folder = WORK / "rows"
    if (folder / "rows.jsonl").is_file():
        return folder / "rows.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    with zipfile.ZipFile(DATA / "train.zip") as archive:
        lines = [json.loads(line) for line in archive.read("metadata.jsonl").splitlines()]
        for number, row in enumerate(lines[:ROWS]):
            with archive.open(row["file_name"]) as file:
                image = Image.open(file)
                side = (256, 320, 416)[number % 3]
                image.resize((side, side * 3 // 4)).save(folder / f"{number:03}.jpg")
            counts = Counter(str(each) for each in row["objects"]["categories"])
            boxes = [[round(value) for value in box] for box in row["objects"]["bbox"]][: 1 + number % 5]
            answer = f"{', '.join(f'{count} of class {name}' for name, count in counts.items())}; boxes {boxes}"
            question = "<image>Which cells are in it, and where?"
            made.append({"prompt": question, "completion": answer, "images": f"{number:03}.jpg"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return folder / "rows.jsonl"


def measure(family: str, name: str) -> dict[str, Any]:
    recipe = {
        "task": "image-text-to-text",
        "model": str(model_of(family)),
        "strategy": RUNS[name],
        "data": {"train": str(rows()), "max_length": 1024},
        "training": {"max_steps": STEPS, "global_batch_size": BATCH, "learning_rate": 1e-4, "eval_steps": 1.0},
        "evaluation": {"samples": 0, "eval_on_start": False, "control": "off", "max_rows": 8},
    }
    result = train(f"{family}/{name}", recipe, WORK, module="hfstrat train").report["result"]
    predicted = result["predicted"]
    return {
        "predicted": {key: predicted.get(key) for key in ("memory_bytes", "reason")},
        "peak_memory_bytes": result["peak_memory_bytes"],
        "trainable_parameters": result["trainable_parameters"],
        "micro_batch": result["plan"]["micro_batch"],
    }


def lines_of(result: dict[str, Any]) -> list[str]:
    lines = [
        f"Steps of {BATCH} rows with one photograph each, in bfloat16 on a processor, if it has it.",
        "",
        "| family | trained | trainable | micro-batch | peak memory predicted | measured | off by |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for name, run in result["runs"].items():
        predicted, peak = run["predicted"]["memory_bytes"], run["peak_memory_bytes"]
        lines.append(
            f"| {name.replace('/', ' | ')} | {run['trainable_parameters'] / 1e6:.1f} M | {run['micro_batch']} "
            f"| {predicted / 2**20:,.0f} MiB | {peak / 2**20:,.0f} MiB | {predicted / peak - 1:+.0%} |"
        )
    whole, above = result["memory"]["of_all"], result["memory"]["above_imports"]
    return [
        *lines,
        "",
        f"Peak memory was off by {whole['median']:.0%} (median) and {whole['worst']:.0%} (worst); without the "
        f"{result['imports'] / 2**20:,.0f} MiB of the imported libraries by {above['median']:.0%} and {above['worst']:.0%}.",
    ]


def summary(runs: dict[str, Any]) -> dict[str, Any]:
    imports = import_bytes(True)
    pairs = [(run["predicted"]["memory_bytes"], run["peak_memory_bytes"]) for run in runs.values()]
    errors = {"of_all": [one / two - 1 for one, two in pairs]}
    errors["above_imports"] = [(one - imports) / (two - imports) - 1 for one, two in pairs]
    bands = {
        name: {"median": statistics.median(map(abs, each)), "worst": max(map(abs, each)), "count": len(each)}
        for name, each in errors.items()
    }
    return {"machine": machine(), "runs": runs, "imports": imports, "memory": bands}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default=",".join(f"{family}/{name}" for family in FAMILIES for name in RUNS))
    wanted = parser.parse_args().only.split(",")
    WORK.mkdir(parents=True, exist_ok=True)
    runs: dict[str, Any] = json.loads(RESULT.read_text())["runs"] if RESULT.is_file() else {}
    for name in wanted:
        if name not in runs:
            runs[name] = measure(*name.split("/"))
            print(name, runs[name], flush=True)
            result = summary(runs)
            write("vision_memory", result, lines_of(result))


if __name__ == "__main__":
    main()

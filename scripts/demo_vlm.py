"""A vision-language model assembled from a vision transformer and a language model, and questions about photographs for it.

The projector between the two is new, so that the model answers by chance until it is trained: first the projector alone, then
LoRA on the language model (recipes/vision-language/). Questions are of two classes: "Which is in the picture: cat or ship?".

    python scripts/demo_vlm.py model VISION LANGUAGE OUTPUT_DIR
    python scripts/demo_vlm.py data ZIP_FOLDER OUTPUT_DIR
    python scripts/demo_vlm.py run RESULT.json

VISION is the folder of scripts/demo_image_model.py, LANGUAGE that of a Llama-like chat model. ZIP_FOLDER has train.zip and
test.zip with a folder for each class. `run` trains by the two recipes, in an hour on a third of a core, and writes the
accuracy before and after each with its 95% interval.
"""

from __future__ import annotations

import json
import random
import sys
import zipfile
from pathlib import Path
from typing import Any

SIDE, LAYER = 98, -3  # pixels, and the layer with the best features of this vision transformer (index 10 of 12)
TRAIN_ROWS, EVAL_ROWS = 640, 200
IMAGE = "<image>"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RECIPES = {"projector": "recipes/vision-language/projector.yaml", "lora": "recipes/vision-language/lora.yaml"}


def make_model(vision: str, language: str, output: str) -> None:
    """Write a LLaVA model with these two parts and a random projector."""
    import torch
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        AutoTokenizer,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaImageProcessorPil,
        LlavaProcessor,
    )

    tower, words = AutoModel.from_pretrained(vision), AutoModelForCausalLM.from_pretrained(language, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(language)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]}, replace_extra_special_tokens=False)
    words.resize_token_embeddings(len(tokenizer))
    patch = tower.config.patch_size
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=words.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(SIDE // patch) ** 2,
        vision_feature_layer=LAYER,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(words.model.state_dict())
    model.tie_weights()
    model.save_pretrained(output)
    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}, "resample": 3}
    images = LlavaImageProcessorPil(**size, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
    more = {"patch_size": patch, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    LlavaProcessor(images, tokenizer, chat_template=TEMPLATE, **more).save_pretrained(output)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.model.named_children()}
    print(f"{output}: {', '.join(f'{name} {count / 1e6:.1f} M' for name, count in counts.items())}")


def make_data(source: str, output: str) -> None:
    """Write questions about photographs, each about another photograph, and the photographs."""
    folder = Path(output)
    for split, archive, count in (("train", "train.zip", TRAIN_ROWS), ("eval", "test.zip", EVAL_ROWS)):
        with zipfile.ZipFile(Path(source) / archive) as found:
            names = sorted(name for name in found.namelist() if name.count("/") and not name.endswith("/"))
            classes = sorted({name.split("/")[-2] for name in names})
            draw, rows = random.Random(0), []
            (folder / split).mkdir(parents=True, exist_ok=True)
            for number, name in enumerate(draw.sample(names, count)):
                answer = name.split("/")[-2]
                pair = draw.sample([answer, draw.choice([one for one in classes if one != answer])], 2)
                file = f"{split}/{number:04d}{Path(name).suffix}"
                (folder / file).write_bytes(found.read(name))
                question = f"<image>Which is in the picture: {pair[0]} or {pair[1]}?"
                rows.append({"prompt": question, "completion": answer, "images": [file]})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{output}: {TRAIN_ROWS} questions to train on, {EVAL_ROWS} to evaluate")


def run(target: str) -> None:
    """Train by both recipes and write what they report."""
    import hfstrat

    found: dict[str, Any] = {"command": "python scripts/demo_vlm.py run " + target, "chance": 0.5}
    for name, recipe in RECIPES.items():
        report = json.loads((Path(hfstrat.train(recipe, overwrite=True).folder).parent / "report.json").read_text())
        result = report["result"]
        answers = result["measured"]["answers"]
        entry = {when: answers[when]["exact_match"] for when in ("before", "after", "difference")}
        keys = ("steps", "train_seconds", "trainable_parameters", "total_parameters", "peak_memory_bytes")
        found[name] = {"accuracy": entry, **{key: result[key] for key in keys}, "loss": result["metrics_after"]["loss"]}
        found[name]["facts"] = {key: result[key] for key in ("vision_features",) if result.get(key)}
        found["environment"] = {
            key: report["environment"].get(key) for key in ("cpu", "libraries") if key in report["environment"]
        }
    Path(target).write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


COMMANDS = {"model": (make_model, 3), "data": (make_data, 2), "run": (run, 1)}

if __name__ == "__main__":
    name, given = (sys.argv[1] if len(sys.argv) > 1 else ""), sys.argv[2:]
    if name not in COMMANDS or len(given) != COMMANDS[name][1]:
        sys.exit(__doc__)
    COMMANDS[name][0](*given)  # type: ignore[operator]

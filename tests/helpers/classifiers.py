"""Tiny encoders and labeled examples, created for the tests."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from conftest import WORDS, make_model, make_tokenizer, write_jsonl

ENCODERS = ("bert", "distilbert", "roberta", "modernbert")
FAMILIES = (*ENCODERS, "llama", "gpt2")
LABELS = ("cat", "dog", "fish")


def encoder_tokenizer(types: bool) -> Any:
    """A tokenizer that writes [CLS] a [SEP] b [SEP], as BERT's does."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    backend = make_tokenizer(chat=False).backend_tokenizer
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    backend.add_special_tokens(special)
    ids = [(token, backend.token_to_id(token)) for token in special[1:3]]
    backend.post_processor = TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0", pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1", special_tokens=ids
    )
    names = ["input_ids", "token_type_ids", "attention_mask"] if types else ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        model_max_length=64,
        model_input_names=names,
    )


def make_encoder(folder: Path, family: str, head: str = "body") -> Path:
    """A random encoder: only its body, or (`head="mlm"`) with a masked-LM head."""
    import torch
    import transformers as tf

    tokenizer = encoder_tokenizer(types=family == "bert")
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    wide = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    kinds: dict[str, Any] = {
        "bert": lambda: tf.BertConfig(**sizes, **wide, max_position_embeddings=64),
        "roberta": lambda: tf.RobertaConfig(
            **sizes, **wide, max_position_embeddings=64 + tokenizer.pad_token_id + 1, type_vocab_size=1
        ),
        "distilbert": lambda: tf.DistilBertConfig(**sizes, dim=32, hidden_dim=64, n_layers=3, n_heads=4),
        "modernbert": lambda: tf.ModernBertConfig(
            **sizes, **wide, cls_token_id=0, sep_token_id=0, bos_token_id=0, eos_token_id=0, max_position_embeddings=64
        ),
    }
    auto = tf.AutoModelForMaskedLM if head == "mlm" else tf.AutoModel
    auto.from_config(kinds[family]()).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_any(folder: Path, family: str) -> Path:
    return make_encoder(folder, family) if family in ENCODERS else make_model(folder, family, chat=False)


def labeled(folder: Path, count: int = 90, many: bool = False, pairs: bool = False, seed: int = 3) -> Path:
    """Examples with one word that determines the label."""
    source = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        label = LABELS[number % 3 if number % 7 else 0]
        text = " ".join([*source.choices(WORDS[3:], k=source.randint(1, 9)), label, str(number)])
        row: dict[str, Any] = {"text": text, "label": label}
        if pairs:
            row = {"premise": text, "hypothesis": " ".join(source.choices(WORDS, k=3)), "label": label}
        if many:
            row["labels"] = sorted({label, LABELS[number % 2]})[: number % 3]
            del row["label"]
        rows.append(row)
    return write_jsonl(folder / "labeled.jsonl", rows)


def measured(folder: Path, targets: int = 1, offset: float = 2000.0) -> Path:
    """Texts whose number is `offset` plus how often a word is in them; a second target is a small negative number."""
    source = random.Random(3)
    rows: list[dict[str, Any]] = []
    for number in range(90):
        hits = number % 4
        words = [*source.choices(WORDS[3:], k=source.randint(2, 6)), *["cat"] * hits, str(number)]
        source.shuffle(words)
        values = [offset + 5.0 * hits, -0.01 * hits]
        rows.append({"text": " ".join(words)} | ({"score": values[0]} if targets == 1 else {"scores": values}))
    return write_jsonl(folder / "measured.jsonl", rows)


def write_recipe(folder: Path, model: Path, rows: Path, task: str = "text-classification") -> Path:
    file = folder / "recipe.yaml"
    file.write_text(
        f"task: {task}\nmodel: {model}\nstrategy: full\ndata: {{train: {rows}, eval_size: 20, max_length: 64}}\n"
        "training: {max_steps: 4, global_batch_size: 8, per_device_train_batch_size: 4, learning_rate: 1e-2,\n"
        "  eval_steps: 2, logging_steps: 1}\n"
        f"evaluation: {{samples: 2}}\noutput_dir: {folder / 'run'}\n"
    )
    return file

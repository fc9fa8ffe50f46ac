"""One cell of `benchmarks.gpu`: a model shape, a strategy, a kind of rows and a contender, in a process of its own.

    python -m benchmarks.gpu_cells --one SHAPE STRATEGY ROWS CONTENDER FOLDER STEPS      # prints one line of JSON
    python -m benchmarks.gpu_cells --matmul                                              # the peak of a matrix product

The weights are random, in the shapes of Llama 3.2 1B and 3B and Llama 3.1 8B; the text is words of a Zipf distribution, one
token each, so that all contenders have the same tokens and the loss falls. `full` rows have 4,096 tokens; `short` rows have the
lengths of ../shared/data/llamafactory_demos/alpaca_en_demo.jsonl (words x 1.35), or of a log-normal distribution (median 90
tokens, at most 1,024) where that file is missing. Every contender trains on the same rows once, at the same rate; its loss
afterwards is measured on the same held-out rows by the same code. Throughput is real tokens over the time of the steps after
the first ones. MFU is that of the operations that training needs, without recomputed ones, over the measured peak.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT

SHAPES: dict[str, dict[str, Any]] = {
    "1B": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "intermediate_size": 8192, "tied": True},
    "3B": {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "intermediate_size": 8192, "tied": True},
    "8B": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336, "tied": False},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "tied": True},
}
VOCABULARY, WORDS, KEY_VALUE_HEADS = 128_256, 8_000, 8
LONG, SHORT_MEDIAN, SHORT_MOST, PER_WORD = 4096, 90, 1024, 1.35
TOKENS_PER_STEP, HELD_OUT, WARMUP_STEPS, RATE, RANK = 32_768, 16, 3, 1e-4, 16
TINY = 64  # times smaller: the rows and steps of the tiny shape, for a dry run on a CPU
ALPACA = ROOT.parent / "shared" / "data" / "llamafactory_demos" / "alpaca_en_demo.jsonl"
# of hfstrat: whether the blocks are compiled, and whether products are computed in float8
WAYS = {"hfstrat": (False, False), "hfstrat-compiled": (True, False), "hfstrat-float8": (True, True)}
CONTENDERS = (*WAYS, "trl", "trl-liger", "float32")


class Timer:
    """Seconds of the steps after the first ones; a callback of transformers' Trainer by duck typing."""

    def __init__(self, warmup: int) -> None:
        self.warmup, self.steps, self.first, self.last = warmup, 0, 0.0, 0.0

    def callback(self) -> Any:
        from transformers import TrainerCallback

        timer = self

        class Callback(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                timer.note()

        return Callback()

    def note(self) -> None:
        synchronize()
        self.steps += 1
        self.last = time.perf_counter()
        if self.steps == self.warmup:
            self.first = self.last

    def tokens_per_second(self, tokens: int) -> float:
        """Tokens of all steps, as if all steps had the same number."""
        timed = self.steps - self.warmup
        return tokens * timed / self.steps / (self.last - self.first)


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


# data and models


def scale(shape: str) -> int:
    return TINY if shape == "tiny" else 1


def lengths(kind: str, shape: str, tokens: int) -> list[int]:
    """Row lengths with about so many tokens in all."""
    source, long = random.Random(0), LONG // scale(shape)
    if kind == "full":
        return [long] * max(1, tokens // long)
    if ALPACA.is_file():
        rows = [json.loads(line) for line in ALPACA.read_text(encoding="utf-8").splitlines()]
        known = [int(PER_WORD * sum(len(str(row[key]).split()) for key in ("instruction", "input", "output"))) for row in rows]
    else:
        known = [round(source.lognormvariate(0, 0.9) * SHORT_MEDIAN) for _ in range(1000)]
    found: list[int] = []
    while sum(found) < tokens:
        found.append(min(SHORT_MOST, long, max(8, source.choice(known))))
    return found


def texts(sizes: list[int], seed: int, words: int = WORDS) -> list[str]:
    """Texts of so many words, Zipf-distributed; a third of them repeats the word before the last, which can be learned."""
    import numpy as np

    source = np.random.default_rng(seed)
    chances = 1 / np.arange(1, words + 1)
    found = []
    for size in sizes:
        ids = source.choice(words, size=size, p=chances / chances.sum())
        again = np.flatnonzero(source.random(size) < 1 / 3)
        for place in again[again >= 2]:
            ids[place] = ids[place - 2]
        found.append(" ".join(f"w{number}" for number in ids))
    return found


def make_data(folder: Path, kind: str, shape: str, steps: int) -> dict[str, Any]:
    """Write training and held-out rows; returns their files, the tokens to train on and the rows of a step."""
    sizes = lengths(kind, shape, steps * TOKENS_PER_STEP // scale(shape))
    rows_per_step = max(1, len(sizes) // steps)
    sizes = sizes[: rows_per_step * steps]
    words = WORDS if shape != "tiny" else 200
    held = texts(lengths(kind, shape, 10 * sum(sizes))[-HELD_OUT:], 1, words)
    files = {}
    for name, found in (("train", texts(sizes, 0, words)), ("eval", held)):
        files[name] = folder / f"{name}-{kind}-{shape}.jsonl"
        files[name].write_text("".join(json.dumps({"text": text}) + "\n" for text in found), encoding="utf-8")
    more = {"long": LONG // scale(shape), "packed": kind == "short", "per_step": TOKENS_PER_STEP // scale(shape)}
    return {**files, "tokens": sum(sizes), "rows_per_step": rows_per_step, "longest": max(sizes), **more}


def make_model(folder: Path, shape: str) -> Path:
    """A folder with random weights in bfloat16 and a tokenizer of whole words; kept between the runs of one benchmark."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    place = folder / f"model-{shape}"
    if (place / "tokenizer_config.json").is_file():
        return place
    given = dict(SHAPES[shape])
    size = VOCABULARY if shape != "tiny" else 256
    heads = min(KEY_VALUE_HEADS, given["num_attention_heads"])
    config = LlamaConfig(
        vocab_size=size,
        num_key_value_heads=heads,
        tie_word_embeddings=given.pop("tied"),
        max_position_embeddings=LONG,
        rope_theta=500_000.0,
        bos_token_id=None,
        eos_token_id=size - 1,
        pad_token_id=size - 2,
        **given,
    )
    torch.manual_seed(0)
    with torch.device(device()):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(place)
    words = {f"w{number}": number for number in range(size - 3)} | {"<unk>": size - 3, "<pad>": size - 2, "</s>": size - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(place)
    return place


# contenders; each returns the trained model and the micro-batch that it used


def run_hfstrat(
    model: Path, strategy: str, data: dict[str, Any], folder: Path, timer: Timer, way: str = "hfstrat"
) -> tuple[Any, dict[str, Any]]:
    from hfstrat.recipe.load import load_recipe
    from hfstrat.run.setup import set_up
    from hfstrat.trainer.distributed import join_world

    compiled, float8 = (str(on).lower() for on in WAYS[way])
    named = f"{{name: lora, r: {RANK}, lora_alpha: {2 * RANK}}}" if strategy == "lora" else "full"
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"model: {model}\nstrategy: {named}\n"
        f"data: {{train: {data['train']}, eval: {data['eval']}, max_length: {data['longest'] + 1}}}\n"
        f"training: {{num_train_epochs: 1, global_batch_size: {data['rows_per_step']}, learning_rate: {RATE},\n"
        f"  warmup_steps: 0, torch_compile: {compiled}, float8: {float8},\n"
        "  lr_scheduler_type: constant, load_best_model_at_end: false, eval_steps: 1.0, save_steps: 1.0}\n"
        "evaluation: {eval_on_start: false, samples: 0, control: 'off', metrics: []}\n"
        f"output_dir: {folder / 'run'}\n"
    )
    job = set_up(load_recipe(str(recipe)), join_world(), overwrite=True)
    job.trainer.add_callback(timer.callback())
    job.trainer.args.save_strategy = "no"  # only the steps are timed
    job.trainer.train()
    plan = job.plan
    return job.trainer.model, {
        "micro_batch": plan.rows_at_once,
        "packed": plan.bins is not None,
        "checkpointing": plan.checkpointing,
    }


def run_trl(
    model: Path, strategy: str, data: dict[str, Any], folder: Path, timer: Timer, liger: bool
) -> tuple[Any, dict[str, Any]]:
    """TRL's fastest settings: bfloat16, packing without padding, fused AdamW, and the largest micro-batch that fits, with
    checkpointing only where nothing fits without."""
    import torch

    packed = data["packed"]
    rows = max(1, data["per_step"] // data["long"]) if packed else data["rows_per_step"]
    tried = [(size, False) for size in (16, 8, 4, 2, 1)] + [(size, True) for size in (16, 8, 4, 2, 1)]
    for size, checkpointing in tried:
        if size > rows or rows % size:
            continue
        try:
            timer.steps = 0
            trained = _trl(model, strategy, data, folder, timer, liger, packed, (size, rows // size, checkpointing))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            continue
        return trained, {"micro_batch": size, "packed": packed, "checkpointing": checkpointing}
    raise RuntimeError("TRL does not fit")


def _trl(
    model: Path, strategy: str, data: dict[str, Any], folder: Path, timer: Timer, liger: bool, packed: bool, batch: Any
) -> Any:
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import is_flash_attn_2_available
    from trl import SFTConfig, SFTTrainer

    size, accumulation, checkpointing = batch
    attention = "flash_attention_2" if is_flash_attn_2_available() else "sdpa"
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, attn_implementation=attention)
    config = SFTConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        gradient_checkpointing=checkpointing,
        num_train_epochs=1,
        max_length=data["long"] + 1,
        packing=packed,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        bf16=True,
        optim="adamw_torch_fused",
        use_liger_kernel=liger,
        use_cpu=device() == "cpu",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        loaded,
        config,
        train_dataset=load_dataset("json", data_files=str(data["train"]), split="train"),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=lora if strategy == "lora" else None,
        callbacks=[timer.callback()],
    )
    trainer.train()
    return trainer.model


def run_float32(model: Path, strategy: str, data: dict[str, Any], timer: Timer) -> tuple[Any, dict[str, Any]]:
    """The reference: float32, one row at a time, torch's AdamW, the loss of transformers summed over the tokens of a step."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device())
    if strategy == "lora":
        network = get_peft_model(
            network, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        )
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [json.loads(line)["text"] for line in Path(data["train"]).read_text().splitlines()]
    random.Random(0).shuffle(rows)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    network.train()
    for start in range(0, len(rows), data["rows_per_step"]):
        batch = [ids_of(tokenizer, text) for text in rows[start : start + data["rows_per_step"]]]
        count = sum(len(ids) - 1 for ids in batch)
        for ids in batch:
            (nats(network, ids) / count).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        timer.note()
    return network, {"micro_batch": 1, "packed": False, "checkpointing": False}


def ids_of(tokenizer: Any, text: str) -> Any:
    import torch

    return torch.tensor([*tokenizer(text)["input_ids"], tokenizer.eos_token_id], device=device())


def nats(model: Any, ids: Any) -> Any:
    """The summed cross-entropy of a row."""
    import torch.nn.functional as F

    logits = model(input_ids=ids[None]).logits[0, :-1].float()
    return F.cross_entropy(logits, ids[1:], reduction="sum")


def held_out_loss(model: Any, folder: Path, data: dict[str, Any]) -> float:
    """Nats per token on the held-out rows, one at a time, under bfloat16 autocast for every contender."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model.eval()
    total, count = 0.0, 0
    for line in Path(data["eval"]).read_text().splitlines():
        ids = ids_of(tokenizer, json.loads(line)["text"]).to(next(model.parameters()).device)
        with torch.no_grad(), torch.autocast(device(), torch.bfloat16):
            total += float(nats(model, ids))
        count += len(ids) - 1
    return total / count


# operations


def operations_per_token(shape: str, strategy: str, kind: str, mean_length: float) -> float:
    """Operations of training per token: twice the weights of all matrix products forward, as much backward for the inputs, and
    as much again for weights that train; attention over half of the row. Recomputation does not count."""
    given = SHAPES[shape]
    width, depth, inner = given["hidden_size"], given["num_hidden_layers"], given["intermediate_size"]
    key_value = width * min(KEY_VALUE_HEADS, given["num_attention_heads"]) / given["num_attention_heads"]
    weights = depth * (2 * width * width + 2 * width * key_value + 3 * width * inner)
    weights += width * (VOCABULARY if shape != "tiny" else 256)
    sides = [(width, width)] * 2 + [(width, key_value)] * 2 + [(width, inner)] * 3
    adapters = depth * RANK * sum(a + b for a, b in sides) if strategy == "lora" else 0.0
    attention = depth * 2 * width * mean_length  # forward: scores and values, each 2 x width x length, half of them masked
    return (4.0 if strategy == "lora" else 6.0) * weights + 6.0 * adapters + 3.0 * attention


def matmul_peak(seconds: float = 3.0) -> float:
    """Operations per second of a bfloat16 matrix product: the best of several sizes."""
    import torch

    best = 0.0
    for size in (4096, 8192, 16384) if device() == "cuda" else (512,):
        left, right = (torch.randn(size, size, dtype=torch.bfloat16, device=device()) for _ in range(2))
        for _ in range(3):
            left @ right
        synchronize()
        started, count = time.perf_counter(), 0
        while time.perf_counter() - started < seconds / 3:
            for _ in range(10):
                left @ right
            synchronize()
            count += 10
        best = max(best, count * 2.0 * size**3 / (time.perf_counter() - started))
    return best


def one(shape: str, strategy: str, kind: str, contender: str, folder: Path, steps: int) -> dict[str, Any]:
    """Run a cell; returns throughput, operations, peak memory and loss."""
    import torch

    from hfstrat.trainer.autobatch import peak_bytes

    model, data = make_model(folder, shape), make_data(folder, kind, shape, steps)
    place = folder / "-".join((shape, strategy, kind, contender))
    place.mkdir(exist_ok=True)
    timer = Timer(min(WARMUP_STEPS, max(1, steps // 3)))
    if contender in WAYS:
        trained, facts = run_hfstrat(model, strategy, data, place, timer, contender)
    elif contender == "float32":
        trained, facts = run_float32(model, strategy, data, timer)
    else:
        trained, facts = run_trl(model, strategy, data, place, timer, contender == "trl-liger")
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_bytes()
    rate = timer.tokens_per_second(data["tokens"])
    mean = data["tokens"] / (data["rows_per_step"] * steps)
    return {
        "tokens_per_second": rate,
        "operations_per_second": rate * operations_per_token(shape, strategy, kind, mean),
        "peak_bytes": float(peak),
        "loss": held_out_loss(trained, model, data),
        "steps": timer.steps,
        **facts,
    }


if __name__ == "__main__":
    if sys.argv[1] == "--matmul":
        print(json.dumps({"peak": matmul_peak()}))
    else:
        print(json.dumps(one(*sys.argv[2:6], Path(sys.argv[6]), int(sys.argv[7]))))

"""Tiny models and data created for the tests: no network, nothing from outside the repository."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a Hub id costs a minute of retries before its error
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HFSTRAT_CACHE", tempfile.mkdtemp(prefix="hfstrat-tests-"))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # with tiny models a second thread only adds waiting

import pytest

from hfstrat.tasks import verify

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell sets it for what it starts with `&`; programs inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

pytest.register_assert_rewrite("helpers")  # assertions there show values

COMPARE = verify.compare
SHARED = Path(__file__).parents[2] / "shared"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "under",
    "mat",
    "hat",
    "red",
    "blue",
    "one",
    "two",
    "three",
    "and",
    "not",
]


def sentences(count: int, seed: int = 0) -> list[str]:
    import random

    source = random.Random(seed)
    return [" ".join(source.choices(WORDS, k=source.randint(2, 14))) for _ in range(count)]


def compare_here(spec: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """`verify.compare` without the ten seconds that a fresh process takes to import the libraries."""
    import traceback

    try:
        found = verify.compared(json.loads(json.dumps(spec)))
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
        return subprocess.CompletedProcess([], code, "", str(ended.code))
    except Exception:
        return subprocess.CompletedProcess([], 1, "", traceback.format_exc())
    return subprocess.CompletedProcess([], 0, json.dumps(found), "")


def make_tokenizer(chat: bool = True) -> Any:
    """A byte-level BPE of 320 tokens whose padding token is its end token, as in SmolLM2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(sentences(200), trainer)
    end = "<|im_end|>"
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end, unk_token="<|endoftext|>")
    if chat:
        fast.chat_template = TEMPLATE
    return fast


def make_model(folder: Path, family: str = "llama", tied: bool = False, dtype: str = "float32", chat: bool = True) -> Path:
    """Save a random model of some 50 thousand parameters with its tokenizer."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer(chat)
    torch.manual_seed(0)
    common = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    common |= {"bos_token_id": 1, "tie_word_embeddings": tied}
    if family == "gpt2":
        model: Any = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=2, n_positions=256, **common))
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=256,
                **common,
            )
        )
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`models(family=..., tied=..., dtype=..., chat=...)` returns a folder, created once per session."""
    made: dict[Any, Path] = {}

    def get(**kind: Any) -> Path:
        key = tuple(sorted(kind.items()))
        if key not in made:
            made[key] = make_model(tmp_path_factory.mktemp("model"), **kind)
        return made[key]

    return get


@pytest.fixture(scope="session")
def tiny(models: Callable[..., Path]) -> Path:
    return models()


@pytest.fixture(scope="session")
def bodies(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`bodies(family, head="body")` returns the folder of a tiny model without a classifier, created once per session."""
    from helpers.classifiers import make_any, make_encoder

    made: dict[Any, Path] = {}

    def get(family: str, head: str = "body") -> Path:
        if (family, head) not in made:
            folder = tmp_path_factory.mktemp(family)
            made[family, head] = make_any(folder, family) if head == "body" else make_encoder(folder, family, head)
        return made[family, head]

    return get


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_pairs(folder: Path, count: int) -> Path:
    """This many prompt/completion examples of unequal lengths."""
    said = sentences(2 * count, seed=1)
    data = [{"prompt": f"{n} {a}", "completion": b} for n, (a, b) in enumerate(zip(said[::2], said[1::2], strict=True))]
    return write_jsonl(folder / "rows.jsonl", data)


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 prompt/completion examples of unequal lengths."""
    return write_pairs(tmp_path_factory.mktemp("data"), 60)


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`families("mixtral")` returns the folder of a tiny causal LM of that family, created once per session."""
    from helpers.families import make_family

    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = make_family(tmp_path_factory.mktemp(family), family)
        return made[family]

    return get


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`made("llava")` returns the folder of a tiny vision-language model of that family, created once per session."""
    from helpers.vision_language import make_vision_language

    folders: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family == "smolvlm":
            pytest.importorskip("num2words")
        if family not in folders:
            folders[family] = make_vision_language(tmp_path_factory.mktemp(family), family)
        return folders[family]

    return get


@pytest.fixture(scope="session")
def short_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 prompt/completion examples."""
    return write_pairs(tmp_path_factory.mktemp("data"), 30)


@pytest.fixture(scope="session")
def short_labeled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 labeled texts."""
    from helpers.classifiers import labeled

    return labeled(tmp_path_factory.mktemp("labeled"), 40)


@pytest.fixture(scope="session", autouse=True)
def _verified_here() -> Iterator[None]:
    """Results are verified in this process; `fresh_process` is for what a fresh one shows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "compare", compare_here)
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_work_for_nothing() -> Iterator[None]:
    """No power fails here, so files are not awaited; and a template of cards is compiled once, not for each checkpoint."""
    import jinja2

    compiled: dict[tuple[int, str], Any] = {}
    original = jinja2.Environment.compile

    def compile_once(self: Any, source: Any, *args: Any, **kwargs: Any) -> Any:
        key = (id(self), source)
        if args or kwargs or not isinstance(source, str):
            return original(self, source, *args, **kwargs)
        if key not in compiled:
            compiled[key] = original(self, source), self  # kept, so that no other takes its number
        return compiled[key][0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda number: None)
        patch.setattr(jinja2.Environment, "compile", compile_once)
        yield


@pytest.fixture
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are verified as for a user: loaded in a fresh process."""
    monkeypatch.setattr(verify, "compare", COMPARE)


@pytest.fixture
def recipe(tiny: Path, rows: Path, tmp_path: Path) -> Callable[..., Any]:
    """`recipe("training.max_steps=3", ...)` loads a small LoRA recipe with overrides."""
    from hfstrat.recipe.load import load_recipe

    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"model: {tiny}\nstrategy: {{name: lora, r: 4}}\ndata: {{train: {rows}, eval_size: 12, max_length: 128}}\n"
        "training: {max_steps: 4, global_batch_size: 8, per_device_train_batch_size: 4, learning_rate: 1e-2,\n"
        "  eval_steps: 2, logging_steps: 1}\n"
        f"evaluation: {{samples: 1, max_new_tokens: 4, control: off}}\noutput_dir: {tmp_path / 'run'}\n"
    )

    def load(*overrides: str) -> Any:
        return load_recipe(str(file), list(overrides))

    return load


@pytest.fixture
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("needs ../shared, which this checkout does not have")
    return SHARED


@pytest.fixture(autouse=True)
def _no_process_group() -> Iterator[None]:
    """Reset accelerate's state after each test."""
    yield
    from accelerate.state import AcceleratorState, GradientState, PartialState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()


@pytest.fixture(scope="session")
def run_script() -> Callable[..., str]:
    """Run one of our scripts as a user would; return its output."""
    import subprocess
    import sys

    def run(name: str, *words: str) -> str:
        script = Path(__file__).parents[1] / "scripts" / name
        return subprocess.run([sys.executable, str(script), *words], check=True, capture_output=True, text=True).stdout

    return run

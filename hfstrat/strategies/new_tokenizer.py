"""A tokenizer trained on the training data: byte-level BPE, so every text has tokens and is decoded byte for byte."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfstrat.errors import UserError
from hfstrat.recipe.strategies import BYTES, END, PAD, NewTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hfstrat.recipe.schema import Recipe

TURN, TURN_END = "<|im_start|>", "<|im_end|>"
FIRST = "<|cls|>"  # before a text to classify: encoders pool there, decoders at the end token
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train(recipe: Recipe, options: NewTokenizer) -> PreTrainedTokenizerBase:
    """The tokenizer trained on the training data, from the cache if it was trained on the same bytes and options.

    Raises UserError: the texts are too short for this vocabulary.
    """
    import tokenizers

    from hfstrat.data import cache
    from hfstrat.data.chat_template import check_template
    from hfstrat.data.splits import open_corpus
    from hfstrat.tasks import TASKS

    corpus = open_corpus(recipe, TASKS[recipe.task].rows.reader)
    template = options.chat_template
    if template == "auto":
        template = "chatml" if corpus.has_conversations() else "none"
    known = {"chatml": CHATML, "none": None}
    text = known[template] if template in known else check_template(template)
    framed = TASKS[recipe.task].rows.framed
    special = [END, PAD, *([TURN, TURN_END] if template == "chatml" else []), *([FIRST] if framed else [])]
    special += options.special_tokens
    inputs = {
        "sources": [source.fingerprint_inputs() for source in corpus.sources],
        "data": recipe.data.model_dump(include={"documents", "eval_size"}),
        "held_out": None if corpus.held_out is None else corpus.held_out.tolist(),
        "vocab_size": options.vocab_size,
        "special": special,
        "tokenizers": tokenizers.__version__,
    }

    def build(target: Path) -> None:
        made = _train_bpe(corpus.texts(), options.vocab_size, special)
        if made.get_vocab_size() < options.vocab_size:
            raise UserError(
                f"strategy.tokenizer.vocab_size: {options.vocab_size:,}: the training data yield at most "
                f"{made.get_vocab_size():,} tokens (a merge has to occur twice); set a smaller one"
            )
        made.save(str(target))

    description = f"a tokenizer of {options.vocab_size:,} tokens, from {recipe.data.train[0].path}"
    entry = cache.fetch("tokenizer", cache.fingerprint(inputs), description, build)
    tokenizer = _load(entry.path, TURN_END if template == "chatml" else END, special, framed)
    tokenizer.chat_template = text
    return tokenizer


def _load(file: Path, end: str, special: list[str], framed: bool) -> PreTrainedTokenizerBase:
    """The tokenizer in a file for transformers; with `framed` it adds the tokens around a text to classify."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    backend, frame = tokenizers.Tokenizer.from_file(str(file)), dict[str, Any]()
    if framed:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{FIRST} $A {END}",
            pair=f"{FIRST} $A {END} $B {END}",
            special_tokens=[(token, backend.token_to_id(token)) for token in (FIRST, END)],
        )
        frame = {"cls_token": FIRST, "sep_token": END, "model_input_names": ["input_ids", "attention_mask"]}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=end,
        pad_token=PAD,
        **frame,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        additional_special_tokens=[token for token in special if token not in (end, PAD, FIRST)],
    )


def _train_bpe(texts: Any, vocab_size: int, special: list[str]) -> Any:
    """Byte-level BPE (arXiv 1508.07909 over bytes, as in GPT-2), deterministic for any number of threads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    made.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return made


def check_vocabulary_size(recipe: Recipe, options: NewTokenizer) -> None:
    """Refuse a vocabulary that is larger than the data in bytes, since each merge needs a byte. Raises UserError."""
    from hfstrat.data import sources
    from hfstrat.data.chat_template import check_template

    if options.chat_template not in ("auto", "chatml", "none"):
        try:
            check_template(options.chat_template)
        except UserError as error:
            raise UserError(str(error).replace("data.template", "strategy.tokenizer.chat_template", 1)) from None
    split = sources.SPLITS.get(recipe.data.split, recipe.data.split)
    total = 0
    for source in recipe.data.train:
        files = sources.local_files(source.path, "data.train", (split,))
        if files is None or any(file.suffix not in (".txt", ".json", ".jsonl", ".csv", ".tsv") for file in files):
            return
        total += sum(file.stat().st_size for file in files)
    if options.vocab_size > total + BYTES + 4 + len(options.special_tokens):
        raise UserError(
            f"strategy.tokenizer.vocab_size: {options.vocab_size:,}: {total:,} bytes of data cannot yield so many tokens; set "
            "a smaller one, or add text"
        )

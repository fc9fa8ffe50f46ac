"""The cases of benchmarks/regret.py: a model, examples, and seconds of training per strategy.

The second twelve were written down before anything of the adviser that predicts scores, so that they can test it. Predicted for
them before any of them was run (the best strategy, and why):
  banking77-1000  head      13 examples a class
  trec50-2000     head      40 examples a class, too few steps for the classes
  imdb-100        head      50 examples a class
  agnews-100      head      25 examples a class
  agnews-all      full      1,500 examples a class
  trec6-all       full      900 examples a class, short texts
  nli-all         full      pairs: the features of a frozen sentence encoder do not say how two texts relate
  stdlib          full      a base of 260,000 weights on text unlike its own
  trec6-smollm2   lora      a decoder, 1,000 examples
  coffee-chats    lora      chats, of which every answer is short and alike
  sequences       scratch   strings of four letters: nothing that was pretrained helps, and a small model takes more steps
  log-lines       scratch   machine logs of one format, as above
"""

from __future__ import annotations

import csv
import gzip
import json
import random
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from benchmarks.measure import ROOT

SHARED = ROOT.parent / "shared" / "data"
PIECE = 1000  # characters per example of running text
SETS = {  # names of data sets in hfstrat/advisor/measured_runs.csv, where they are others
    "ag_news7k": "ag_news",
    "imdb_counterfactual": "imdb",
    "tinystories": "stories",
    "tinyshakespeare": "shakespeare",
    "trec50": "trec6",
    "nli_counterfactual": "nli",
}
RARE = 30  # a fine class of trec with fewer training rows is left out: a sample might not have it


class Case(NamedTuple):
    """Training examples of a dataset (None: all), evaluation examples, and seconds of training per strategy.

    `without` excludes strategies with a new tokenizer, which cannot be compared with one whose tokens have no defined bytes.
    """

    model: str
    data: str
    rows: int | None
    eval_rows: int
    budget: int
    about: str = ""
    without: tuple[str, ...] = ()


FIRST = {
    "sst2-100": Case("MiniLM", "sst2", 100, 1000, 45, "100 rows"),
    "trec6-100": Case("MiniLM", "trec6", 100, 500, 30, "100 rows of six classes"),
    "trec6-1000": Case("MiniLM", "trec6", 1000, 500, 45),
    "sst2-all": Case("MiniLM", "sst2", None, 1000, 45),
    "banking77-all": Case("MiniLM", "banking77", None, 1000, 60, "77 classes"),
    "stories": Case("stories260K", "tinystories", None, 60, 45, "text like the base's", ("scratch",)),
    "shakespeare": Case("stories260K", "tinyshakespeare", None, 60, 45, "text unlike the base's", ("scratch",)),
    "docstrings": Case("SmolLM2-135M", "docstrings", 1000, 24, 60, "prompts and answers"),
    "agnews-400": Case("MiniLM", "ag_news7k", 400, 1000, 45, "100 rows a class"),
    "imdb-500": Case("MiniLM", "imdb_counterfactual", 500, 488, 60, "long texts"),
    "wikitext": Case("stories260K", "wikitext2_eval", None, 60, 45, "text unlike the base's", ("scratch",)),
    "instructions": Case("SmolLM2-135M", "llms_from_scratch", 1000, 100, 60, "short instructions"),
}
SECOND = {
    "banking77-1000": Case("MiniLM", "banking77", 1000, 1000, 45, "13 rows a class"),
    "trec50-2000": Case("MiniLM", "trec50", 2000, 500, 60, "30 classes of unequal size"),
    "imdb-100": Case("MiniLM", "imdb_counterfactual", 100, 488, 60, "long texts, 100 rows"),
    "agnews-100": Case("MiniLM", "ag_news7k", 100, 1000, 45, "25 rows a class"),
    "agnews-all": Case("MiniLM", "ag_news7k", None, 1000, 120, "1,500 rows a class"),
    "trec6-all": Case("MiniLM", "trec6", None, 500, 90),
    "nli-all": Case("MiniLM", "nli_counterfactual", None, 1000, 120, "pairs of texts"),
    "stdlib": Case("stories260K", "stdlib", None, 60, 120, "text unlike the base's", ("scratch",)),
    "trec6-smollm2": Case("SmolLM2-135M", "trec6", 1000, 500, 120, "a decoder classifies"),
    "coffee-chats": Case("SmolLM2-135M", "taskmaster4_chat", 1000, 100, 90, "chats of several turns"),
    "sequences": Case("SmolLM2-135M", "sequences", 10_000, 100, 120, "strings of four letters"),
    "log-lines": Case("SmolLM2-135M", "log_lines", 10_000, 100, 90, "machine logs"),
}
CASES = FIRST | SECOND


def rows_of(case: Case) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return training and evaluation examples, the same ones each time."""
    train, test = read(case.data)
    draw = random.Random(0)
    return draw.sample(train, min(case.rows or len(train), len(train))), draw.sample(test, min(case.eval_rows, len(test)))


def read(name: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """All training and test examples of a dataset."""
    if name in ("tinystories", "tinyshakespeare"):
        file = {"tinystories": "tinystories_sample/tiny_stories.txt", "tinyshakespeare": "tinyshakespeare/input.txt"}[name]
        pieces = pieces_of((SHARED / file).read_text(encoding="utf-8"))
        return pieces[: -len(pieces) // 10], pieces[-len(pieces) // 10 :]
    if name == "wikitext2_eval":
        texts = ((SHARED / name / f"{part}.txt").read_text(encoding="utf-8") for part in ("valid", "test"))
        train, test = map(pieces_of, texts)
        return train, test
    if name == "llms_from_scratch":
        pairs = json_lines(SHARED / name / "instruction.jsonl")
        return pairs[:-100], pairs[-100:]
    if name == "imdb_counterfactual":
        return table_of(SHARED / name / "original_train.csv"), table_of(SHARED / name / "original_test.csv")
    if name == "taskmaster4_chat":
        return json_lines(SHARED / name / "train.jsonl.gz"), json_lines(SHARED / name / "test.jsonl.gz")
    if name in ("docstrings", "stdlib"):
        return json_lines(ROOT / "data" / name / "train.jsonl"), json_lines(ROOT / "data" / name / "eval.jsonl")
    if name in MADE:
        rows = MADE[name](random.Random(1))
        return rows[:-200], rows[-200:]
    if name == "trec50":
        train, test = (table_of(SHARED / "trec6" / f"{part}.csv", "label_fine") for part in ("train", "test"))
        counts = Counter(row["label"] for row in train)
        return tuple([row for row in rows if counts[row["label"]] >= RARE] for rows in (train, test))  # type: ignore[return-value]
    return table_of(SHARED / name / "train.csv"), table_of(SHARED / name / "test.csv")


def sequences(draw: random.Random) -> list[dict[str, str]]:
    """Strings of a Markov chain of order three over four letters, in which each context has a preferred letter."""
    letters = "ACGT"
    contexts = [a + b + c for a in letters for b in letters for c in letters]
    weights = {context: [draw.expovariate(1.0) ** 2 for _ in letters] for context in contexts}
    rows = []
    for _ in range(10_200):
        text = draw.choice(contexts)
        while len(text) < 120:
            text += draw.choices(letters, weights[text[-3:]])[0]
        rows.append({"text": text})
    return rows


def log_lines(draw: random.Random) -> list[dict[str, str]]:
    """Lines of a service's log: a running time, a host, a level, a request and a duration that depends on both."""
    paths = ["/v1/items", "/v1/items/{n}", "/v1/login", "/health", "/v1/search?q={n}", "/static/{n}.js"]
    rows, clock = [], 0
    for _ in range(10_200):
        lines = []
        for _ in range(4):
            clock += draw.randrange(1, 900)
            host, number = draw.randrange(12), draw.randrange(10_000)
            place = draw.randrange(len(paths))
            status = draw.choices([200, 404, 500], [90, 7 if "{n}" in paths[place] else 1, 3])[0]
            level = {200: "INFO", 404: "WARN", 500: "ERROR"}[status]
            took = 3 * (place + 1) + (host if status == 200 else 10 * host)
            lines.append(
                f"t={clock:010d} web-{host:02d} {level} GET {paths[place].format(n=number)} {status} {took}ms id={number:04x}"
            )
        rows.append({"text": "\n".join(lines)})
    return rows


MADE = {"sequences": sequences, "log_lines": log_lines}


def pieces_of(text: str) -> list[dict[str, str]]:
    """Split text into examples of complete lines, at most PIECE characters each."""
    pieces = [""]
    for line in text.splitlines(keepends=True):
        if len(pieces[-1]) + len(line) > PIECE:
            pieces.append("")
        pieces[-1] += line
    return [{"text": piece} for piece in pieces if piece.strip()]


def json_lines(file: Path) -> list[dict[str, str]]:
    raw = file.read_bytes()
    text = (gzip.decompress(raw) if file.suffix == ".gz" else raw).decode("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def table_of(file: Path, label: str = "label") -> list[dict[str, str]]:
    """The texts of a CSV file with their labels; `premise` and `hypothesis` where it has pairs."""
    with file.open(encoding="utf-8", newline="") as source:
        rows = list(csv.DictReader(source))
    texts = ("premise", "hypothesis") if "premise" in rows[0] else ("text",)
    return [{name: row[name] for name in texts} | {"label": row[label]} for row in rows]

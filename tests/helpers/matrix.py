"""One combination of the conformance matrix: a model family and a strategy, from training to a merged model.

A run of two steps trains, restores its best checkpoint, saves, and is loaded again by plain transformers, PEFT or
sentence-transformers with the logits of the trained model. An adapter is merged; a classifier predicts for a batch what it
predicts for single texts. Where `resumed_of` names the strategy, the folder is put back to what a run killed after step 1
leaves behind, and the same recipe resumes: weights and optimizer are those of the uninterrupted run, bit for bit.
"""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from helpers.runs import run
from hfstrat.errors import UserError
from hfstrat.publish import merge
from hfstrat.recipe.load import load_recipe
from hfstrat.tasks import artifact, verify

STRATEGIES = {
    "full": "full",
    "partial": "{name: partial, last_n_layers: 1}",
    "head": "{name: head}",
    "lora": "{name: lora, r: 4}",
    "distill": "{name: distill, student: full, teacher: MODEL, baseline: false}",
    "scratch": "{name: scratch}",
}
# as these classes make their models; their LM head is trained alone only with a matrix of its own
_TIED = """
    bloom biogpt cohere cohere2 ernie4_5 ernie4_5_moe falcon falcon_mamba gemma gemma2 gemma3_text gpt2 gpt_bigcode gpt_neo
    jetmoe lfm2 lfm2_moe mamba minicpm3 mpt opt recurrent_gemma smollm3 starcoder2 xglm
"""
TIED = frozenset(_TIED.split())
RESUME_ALL = {"llama", "gemma3_text", "mixtral", "mamba", "gpt2", "bert"}
READ_PADDING = {"convbert", "nystromformer"}  # a little, and the run says so
FLOAT32 = {"deberta", "fnet", "xmod"}  # their code fails in 16 bits, and a run says so
PADDING = "changes with the padding of its batch"
NOT_CUT = "not that of its last block"
NO_LINEAR = "no linear layer that PEFT adapts"
REFUSED = {  # family, strategy or all: words of the sentence
    ("albert", "partial"): "has 0 layers",
    ("albert", "head"): "not a stack of blocks",
    ("fnet", "all"): PADDING,
    ("ibert", "lora"): NO_LINEAR,
    ("longformer", "head"): NOT_CUT,
    ("squeezebert", "head"): NOT_CUT,
    ("squeezebert", "lora"): NO_LINEAR,
    ("xlnet", "all"): PADDING,
    ("xlnet", "head"): NOT_CUT,
}
SETTINGS = """\
model: {model}
task: {task}
strategy: {strategy}
data: {{train: {rows}, eval_size: 6, max_length: 48}}
training: {{max_steps: 2, global_batch_size: 4, per_device_train_batch_size: 2, learning_rate: 1e-2, eval_steps: 1,
  save_steps: 1, save_total_limit: 5, logging_steps: 1}}
evaluation: {{samples: 0, control: off}}
output_dir: {output}
"""
TEXTS = ["the cat sat", "a dog ran under the red mat and the blue hat", "fish", "two dogs sat on the mat"]


def check_family(place: Path, model: Path, family: str, rows: Path, task: str = "causal-lm") -> None:
    """Each strategy has the outcome of the table. A classifier's teacher is the result of `full`."""
    for strategy in STRATEGIES:
        folder = place / strategy
        folder.mkdir()
        name = "untied" if strategy == "head" and family in TIED else strategy
        teacher = place / "full" / "run" / "final" if task != "causal-lm" else None
        if strategy == "distill" and (family, "all") in REFUSED:
            continue  # there is no teacher
        found = outcome(folder, model, name, rows, task, teacher, strategy in resumed_of(family))
        expected = REFUSED.get((family, strategy), REFUSED.get((family, "all"), "yes"))
        assert expected in found, (family, strategy, found)
        if strategy != "full":
            shutil.rmtree(folder)


def resumed_of(family: str) -> set[str]:
    """The strategies that resume on this family: all on a few, else `full` and another, in turn."""
    others = [name for name in STRATEGIES if name != "full"]
    return set(STRATEGIES) if family in RESUME_ALL else {"full", others[zlib.crc32(family.encode()) % len(others)]}


def outcome(
    place: Path,
    model: Path,
    strategy: str,
    rows: Path,
    task: str = "causal-lm",
    teacher: Path | None = None,
    resumed: bool = True,
) -> str:
    """`yes`, or the sentence with which the run was refused before training. Anything else that goes wrong is raised.

    Args:
        place: an empty folder; the run is in `run` below it.
        rows: the examples.
        teacher: of a distillation; by default the model itself.
        resumed: whether a killed run is resumed too.
    """
    file, output = place / "recipe.yaml", place / "run"
    section = (STRATEGIES | {"untied": "{name: head, untie: true}"})[strategy].replace("MODEL", str(teacher or model))
    name = f"{{name_or_path: {model}, dtype: float32}}" if model.name in FLOAT32 else model
    file.write_text(SETTINGS.format(model=name, task=task, strategy=section, rows=rows, output=output))
    try:
        report = run(load_recipe(str(file)))
    except UserError as error:
        assert not output.exists(), "a refused run wrote something"
        return str(error)
    holds(report)
    if resumed and (output / "checkpoint-2").is_dir():  # a solved head makes no steps
        resumes(file, output)
    if (output / "final" / "adapter_config.json").is_file():
        merge.merge(str(output), place / "merged")
        assert loads_merged(output, place / "merged")
    if task != "causal-lm" and model.name not in READ_PADDING:
        assert predicts_in_batches(output)
    return "yes"


def holds(report: Any) -> None:
    """The result of a run loads with the logits of the trained model."""
    reload = report["result"]["verified"]
    assert reload["bit_equal"] or reload["max_difference"] < 2e-2 * reload["max_logit"]


def resumes(file: Path, output: Path) -> None:
    """The same recipe continues what a run killed after its first step left behind, to the same bits."""
    last = output / "checkpoint-2"
    before = state_of(last), weights_of(output / "final")
    for name in ("final", "checkpoint-2"):
        shutil.rmtree(output / name)
    (output / "report.json").unlink()
    report = run(load_recipe(str(file)))
    assert report["result"]["resumed_from"].endswith("checkpoint-1")
    for theirs, ours in zip(before, (state_of(last), weights_of(output / "final")), strict=True):
        assert theirs.keys() == ours.keys()
        different = [name for name in theirs if not torch.equal(theirs[name], ours[name])]
        assert not different, different


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.rglob("*.safetensors")):
        found |= {f"{file.relative_to(folder)}/{name}": tensor for name, tensor in load_file(file).items()}
    assert found
    return found


def state_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Weights and the optimizer's state, tensor by tensor."""
    if not (checkpoint / "optimizer.pt").is_file():
        return weights_of(checkpoint)
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    moments = {f"{index}/{name}": tensor for index, state in optimizer.items() for name, tensor in state.items()}
    assert moments
    return weights_of(checkpoint) | moments


def loads_merged(output: Path, merged: Path) -> bool:
    """The merged folder is a complete model of the adapter's architecture."""
    options = {"task": artifact.task_of(str(output)).name}
    one, two = (artifact.load_artifact(str(folder), torch.float32, options) for folder in (output / "final", merged))
    return type(one.get_base_model()) is type(two)


def predicts_in_batches(output: Path) -> bool:
    """A padded batch has the logits of single texts."""
    model, tokenizer, _ = artifact.load(str(output), dtype="float32")
    with torch.no_grad():
        batch = verify.probe_logits(model, dict(tokenizer(TEXTS, padding=True, return_tensors="pt")))
        single = torch.cat([verify.probe_logits(model, dict(tokenizer([text], return_tensors="pt"))) for text in TEXTS])
    off, largest = float((batch - single).abs().max()), float(batch.abs().max())
    assert off <= 1e-4 * max(1.0, largest), (off, largest)
    return True


REASONS = {
    PADDING: "reads padding",
    NOT_CUT: "its output is not that of its last block",
    NO_LINEAR: "no linear layers",
    "has 0 layers": "its layers share their weights",
    "not a stack of blocks": "its layers share their weights",
}


def table(families: Iterable[str]) -> str:
    """The rows of `docs/families.md` for these families: what the tests of the matrix assert."""
    lines = [f"| family | {' | '.join(f'`{name}`' for name in STRATEGIES)} |", "|---" * (1 + len(STRATEGIES)) + "|"]
    for family in families:
        cells = [_cell(family, strategy) for strategy in STRATEGIES]
        note = " (says that it reads padding)" if family in READ_PADDING else ""
        note += " (with `model.dtype: float32`)" if family in FLOAT32 else ""
        lines.append(f"| `{family}`{note} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(family: str, strategy: str) -> str:
    words = REFUSED.get((family, strategy), REFUSED.get((family, "all")))
    if words:
        return f"refused: {REASONS[words]}"
    return "Y with `untie: true`" if strategy == "head" and family in TIED else "Y"

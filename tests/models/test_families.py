"""The conformance matrix: families of transformers, from their configuration classes, times the strategies.

Each combination trains, restores the best of its checkpoints, saves, and loads again with plain transformers or PEFT with the
same logits. The whole matrix is slow; some families, one of each kind, run by default.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.distributed_worker import reload_here
from helpers.families import DENSE, FAMILIES, MOE, RECURRENT, make_family
from helpers.runs import run, stop_at, weights

from hfstrat.errors import UserError
from hfstrat.tasks import generation

STRATEGIES = {
    "full": "full",
    "partial": "{name: partial, last_n_layers: 1}",
    "head": "{name: head}",
    "lora": "{name: lora, r: 4}",
    "distill": "{name: distill, student: full, teacher: MODEL, baseline: false}",
}
KINDS = ["gpt_neox", "gemma2", "mixtral", "deepseek_v3", "mamba", "rwkv"]
FURTHER = ["gpt2", "bloom", "xglm", "phimoe", "gpt_oss", "jetmoe", "jamba", "falcon_h1", "qwen3_next"]
ROUTERS = (".gate", ".router", "router.layer", "shared_expert_gate", "lm_head")
SHORT = ["training.max_steps=2", "training.eval_steps=1", "training.learning_rate=0.05", "evaluation.samples=0"]
TIED = "is tied to its embeddings"


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = make_family(tmp_path_factory.mktemp(family), family)
        return made[family]

    return get


@pytest.fixture
def train(recipe: Any, families: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`train("mixtral", "lora")` runs two steps, of which the better one is kept; None if the family's tied head is refused."""
    monkeypatch.setattr("hfstrat.tasks.verify.verify", reload_here)

    def go(family: str, strategy: str, *more: str, overwrite: bool = False) -> Any:
        model = families(family)
        changes = [f"strategy={STRATEGIES[strategy].replace('MODEL', str(model))}", f"model={model}", *SHORT, *more]
        try:
            return run(recipe(*changes), overwrite)
        except UserError as error:
            if strategy == "head" and TIED in str(error):
                return None
            raise

    return go


def holds(report: Any) -> None:
    """The result of a run moved, and loads with the logits of the trained model."""
    reload = report["result"]["verified"]
    assert reload["bit_equal"] or reload["max_difference"] < 2e-2 * reload["max_logit"]


@pytest.mark.parametrize("strategy", ["full", "lora"])
@pytest.mark.parametrize("family", KINDS)
def test_a_family_of_each_kind(train: Any, family: str, strategy: str) -> None:
    holds(train(family, strategy))


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in KINDS])
def test_every_family(train: Any, tmp_path: Path, family: str) -> None:
    for strategy in ("full", "lora"):
        holds(train(family, strategy, f"output_dir={tmp_path / strategy}"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", [*KINDS, "gpt2", "bloom", "xglm", "phimoe", "gpt_oss", "jetmoe", "jamba", "falcon_h1", "qwen3_next"]
)
def test_every_strategy(train: Any, tmp_path: Path, family: str) -> None:
    for strategy in ("partial", "head", "distill"):
        report = train(family, strategy, f"output_dir={tmp_path / strategy}")
        assert report is not None or strategy == "head"
        if report is not None:
            holds(report)


@pytest.mark.parametrize("family", ["gpt_neox", "mixtral"])
def test_stopped_and_resumed_equals_uninterrupted(
    train: Any, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Families whose checkpoints have other names and shapes than the model, to which an optimizer's state belongs."""
    steps = ["training.max_steps=4", "training.save_steps=2", "training.eval_steps=2", "training.learning_rate=1e-3"]
    train(family, "full", *steps, f"output_dir={tmp_path / 'whole'}")
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            train(family, "full", *steps, f"output_dir={tmp_path / 'broken'}")
    report = train(family, "full", *steps, f"output_dir={tmp_path / 'broken'}")
    assert report["result"]["resumed_from"].endswith("checkpoint-2")
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2", "mamba", "rwkv", "recurrent_gemma"])
def test_batched_generation_is_that_of_single_prompts(families: Any, family: str) -> None:
    """Left padding changes nothing; in a family whose states read it, prompts of one length share a batch."""
    batched_equals_single(families(family))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_batched_generation_in_every_family(families: Any, family: str) -> None:
    batched_equals_single(families(family))


def batched_equals_single(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompts = [[5, 6, 7, 8, 9, 10, 11], [11, 12, 13], [20], [30, 31, 32]]
    batched = generation.continued(model, prompts, None, 6, eos_token_id=None)
    single = [generation.continued(model, [prompt], None, 6, eos_token_id=None)[0] for prompt in prompts]
    assert torch.equal(batched, torch.stack(single))


def test_the_table_has_every_kind() -> None:
    assert len(FAMILIES) >= 40
    assert len(DENSE) > 20
    assert len(MOE) > 10
    assert len(RECURRENT) > 8


@pytest.mark.parametrize("family", [*MOE, "jamba", "qwen3_next", "granitemoehybrid", "mamba", "falcon_h1"])
def test_lora_leaves_routers_alone_and_reports_experts(families: Any, family: str) -> None:
    from helpers.recipes import recipe_of

    from hfstrat import strategies
    from hfstrat.models.linear_layers import expert_parameters
    from hfstrat.models.load import load_tokenizer
    from hfstrat.tasks.loading import load_base

    recipe = recipe_of(families(family), {"name": "lora", "r": 4})
    base, lines = load_base(recipe.model, load_tokenizer(recipe.model)), list[str]()
    base.say = lines.append  # type: ignore[method-assign]
    has_experts = bool(expert_parameters(base.model))
    model = strategies.build(recipe.strategy).build_model(base)
    adapted = [name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad]
    assert adapted
    assert not [name for name in adapted if name.endswith(ROUTERS)]
    assert has_experts == any("the routed experts" in line for line in lines)
    if has_experts:
        assert any("experts are adapted" in line for line in lines) == any(".experts" in name for name in adapted)


def test_experts_are_adapted_where_they_are_named(recipe: Any, families: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfstrat.tasks.verify.verify", reload_here)
    named = "strategy={name: lora, r: 2, target_parameters: [down_proj, gate_up_proj]}"
    report = run(recipe(named, f"model={families('gpt_oss')}", *SHORT))
    holds(report)
    saved = weights(Path(report["run"]["recipe"]["output_dir"]))
    assert any("experts" in name for name in saved)


def test_an_adapter_on_tied_weights_is_refused(recipe: Any, models: Callable[..., Path]) -> None:
    """Merged, it would change the input embeddings and the LM head."""
    for target in ("lm_head", "embed_tokens"):
        with pytest.raises(UserError, match=f"target_modules: {target} is tied"):
            run(recipe(f"strategy={{name: lora, target_modules: [q_proj, {target}]}}", f"model={models(tied=True)}"))


def test_an_initialization_that_changes_the_base_is_refused_in_16_bits(recipe: Any) -> None:
    """The difference of base weights and adapter would be rounded, and the saved adapter not the trained one."""
    for init in ("pissa", "olora"):
        with pytest.raises(UserError, match=r"set model.dtype: float32"):
            run(recipe(f"strategy={{name: lora, init_lora_weights: {init}}}", "model.dtype=bfloat16"))


def test_an_adapter_of_another_base_is_refused(
    recipe: Any, families: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hfstrat.tasks.verify.verify", reload_here)
    run(recipe("strategy={name: lora, r: 2}", *SHORT, f"output_dir={tmp_path / 'first'}"))
    adapter = tmp_path / "first" / "final"
    with pytest.raises(UserError, match=r"does not fit .*: it was trained on"):
        run(recipe(f"strategy={{name: lora, adapter: {adapter}}}", f"model={families('qwen3')}", *SHORT))
    run(recipe("strategy={name: lora, r: 2}", "model.add_tokens=['<a>', '<b>']", *SHORT, f"output_dir={tmp_path / 'added'}"))
    adapter = tmp_path / "added" / "final"
    with pytest.raises(UserError, match=r"with 2 tokens more than this base model has .*set model.tokenizer"):
        run(recipe(f"strategy={{name: lora, adapter: {adapter}}}", *SHORT))


def test_every_end_token_of_the_model_ends_an_answer(families: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = families("llama")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = [5, 6, 7]
    third = int(generation.continued(model, [prompt], None, 6, eos_token_id=None)[0][2])
    model.generation_config.eos_token_id = [third, 319]
    answer = generation.continued(model, [prompt], tokenizer, 6)[0].tolist()
    assert answer.index(third) == len(answer) - 1, "generation goes on after one of the model's end tokens"

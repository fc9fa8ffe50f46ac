"""Families of transformers: a part of the conformance matrix, and what is special about some.

The whole matrix (`helpers.matrix`) is slow: `test_matrix_dense.py` and `test_matrix_others.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.encoder_families import ENCODERS, make_encoder_family
from helpers.families import DENSE, FAMILIES, MOE, RECURRENT
from helpers.matrix import holds, outcome, table
from helpers.runs import run, weights

from hfstrat.advisor import architecture, candidates
from hfstrat.advisor.data import Survey
from hfstrat.errors import UserError
from hfstrat.tasks import generation

ROUTERS = (".gate", ".router", "router.layer", "shared_expert_gate", "lm_head")
SHORT = ["training.max_steps=2", "training.eval_steps=1", "training.learning_rate=0.05", "evaluation.samples=0"]


@pytest.mark.parametrize("family", ["gpt_neox", "mixtral"])
@pytest.mark.slow
def test_an_adapter_of_a_decoder_that_is_no_llama(families: Any, short_rows: Path, tmp_path: Path, family: str) -> None:
    assert outcome(tmp_path, families(family), "lora", short_rows) == "yes"


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
    assert len(ENCODERS) >= 8


def test_the_docs_have_the_table_of_the_matrix() -> None:
    """`docs/families.md` shows for each family and strategy what the tests of the matrix assert."""
    docs = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
    for families in (DENSE, MOE, RECURRENT, ENCODERS):
        assert table(sorted(families)) in docs


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


def test_experts_are_adapted_where_they_are_named(recipe: Any, families: Any) -> None:
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


def test_an_adapter_of_another_base_is_refused(recipe: Any, families: Any, tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    "family", ["llama", "gpt_neox", "granitemoe", "gpt_oss", "mixtral", "mamba", "deepseek_v2", "qwen2_moe", "jamba", "rwkv"]
)
def test_the_adapters_of_experts_are_counted(families: Any, family: str) -> None:
    """By the names in the files, which have another form than the fused parameters that PEFT adapts, with twice the rank."""
    counts_equal(families(family))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapters_of_every_family_are_counted(families: Any, family: str) -> None:
    counts_equal(families(family))


def counts_equal(folder: Path) -> None:
    from helpers.recipes import recipe_of

    from hfstrat import strategies
    from hfstrat.models.load import count_parameters, load_tokenizer
    from hfstrat.tasks.loading import load_base

    recipe = recipe_of(folder, {"name": "lora", "r": 4})
    described = strategies.describe(recipe)
    base = load_base(recipe.model, load_tokenizer(recipe.model))
    model = strategies.build(recipe.strategy).build_model(base)
    assert described is not None
    assert described.footprint.trainable == count_parameters(model)[0]
    rows = Survey("rows", "causal-lm", 100, np.full(1, 64))
    candidate = candidates.propose("lora", architecture.read(str(folder)), rows)
    described = strategies.describe(recipe_of(folder, candidate.section))
    assert described is not None
    assert candidate.footprint == described.footprint, "advise counts them too"


def test_the_families_whose_experts_peft_adapts() -> None:
    """Our table for what is known before torch is imported is that of the installed PEFT."""
    from peft.utils import transformers_weight_conversion as installed

    from hfstrat.models import experts

    theirs = {name for name, like in installed._MODEL_TO_CONVERSION_PATTERN.items() if like in ("mixtral", "qwen2_moe")}
    assert {*experts.LIKE_MIXTRAL, *experts.LIKE_QWEN} == {name for name in theirs if name.islower()}


def test_shared_experts_get_an_adapter(families: Any) -> None:
    """PEFT takes their names for those of routed experts: they are adapted as parameters, which plain PEFT loads."""
    from helpers.recipes import recipe_of

    from hfstrat import strategies
    from hfstrat.models.load import load_tokenizer
    from hfstrat.tasks.loading import load_base

    recipe = recipe_of(families("deepseek_v3"), {"name": "lora", "r": 4})
    base = load_base(recipe.model, load_tokenizer(recipe.model))
    model = strategies.build(recipe.strategy).build_model(base)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    for layer in ("layers.0.mlp.gate_proj", "layers.1.mlp.shared_experts.down_proj", "layers.1.mlp.experts"):
        assert any(layer in name for name in names), layer
    assert not any("without an adapter" in line for line in base.remarks)


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("fnet", "changes with the padding of its batch"),
        ("squeezebert", "all-linear: SqueezeBertForSequenceClassification has no linear layer that PEFT adapts"),
    ],
)
def test_an_encoder_that_cannot_be_trained_is_refused(
    recipe: Any, short_labeled: Path, tmp_path: Path, family: str, words: str
) -> None:
    model = make_encoder_family(tmp_path / family, family)
    settings = ("task=text-classification", f"data.train={short_labeled}", "model.dtype=float32", *SHORT)
    with pytest.raises(UserError, match=words):
        run(recipe(f"model={model}", *settings))
    assert not (tmp_path / "run").exists()


def test_a_forward_pass_that_fails_is_one_sentence(recipe: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from transformers import LlamaModel

    def forward(*given: Any, **named: Any) -> Any:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(LlamaModel, "forward", forward)
    with pytest.raises(UserError, match=r"the forward pass of this model fails .*shapes cannot be multiplied"):
        run(recipe(*SHORT))
    assert not (tmp_path / "run").exists()


def test_a_family_without_gradients_is_refused() -> None:
    from hfstrat.models.check import check_trainable

    check_trainable("a/b", "llama")
    with pytest.raises(UserError, match="is an xlstm model, and the code for it"):
        check_trainable("a/b", "xlstm")

"""Frozen weights in 8 or 4 bits: the intended layers are quantized and do not change; trainable ones are trained correctly."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_tokenizer
from helpers.classifiers import labeled

pytest.importorskip("bitsandbytes")

from helpers.runs import run

from hfstrat import strategies
from hfstrat.errors import UserError
from hfstrat.models import quantization
from hfstrat.models.load import Base, count_parameters, load_tokenizer, read_shapes, set_precision
from hfstrat.models.parameter_names import weight_bytes
from hfstrat.publish import merge
from hfstrat.recipe.load import load_recipe
from hfstrat.recipe.schema import Recipe
from hfstrat.run.preflight import check
from hfstrat.strategies.frozen.boundary import can_precompute, find_prefix
from hfstrat.tasks import artifact
from hfstrat.tasks.loading import load_base
from hfstrat.trainer.cached_columns import digest_of_weights

FORMS = ("nf4", "fp4", "int8")
LORA = {"name": "lora", "r": 4}
ADAPTED = "{name: lora, r: 4, lora_dropout: 0.1}"
SLOW_INT8 = ["nf4", pytest.param("int8", marks=pytest.mark.slow)]
PARTIAL = {"name": "partial", "last_n_layers": 1, "head": True}


def make(folder: Path, dtype: str = "float32", tied: bool = False, config: Any = None) -> Path:
    """A model as wide as a block of 4-bit weights is long; a family of another config by `config`."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    words = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = config or LlamaConfig(
        **shape, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=tied, **words
    )
    AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("wide"))


@pytest.fixture(scope="module", autouse=True)
def in_16_bits() -> Iterator[None]:
    """The forward pass is in 16 bits, as on a GPU, also on CPUs where float32 would be chosen."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
        yield


def recipe_of(model: Path, strategy: Any, quantized: Any, **more: Any) -> Recipe:
    section = {"name_or_path": str(model), "quantization": quantized}
    return Recipe.model_validate({"model": section, "strategy": strategy, "data": "x.jsonl", "output_dir": "x", **more})


def trained_by(recipe: Recipe) -> Any:
    """From shapes to the parameters that are trained and so must not be quantized."""
    return lambda *shapes: strategies.build(recipe.strategy).describe(*shapes).unquantized


def built(folder: Path, strategy: Any, quantized: Any) -> tuple[Any, Base]:
    recipe = recipe_of(folder, strategy, quantized)
    base = load_base(recipe.model, load_tokenizer(recipe.model), learns=trained_by(recipe))
    model = strategies.build(recipe.strategy).build_model(base)
    set_precision(model, base.compute_dtype)
    return model, base


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad(set_to_none=True)
    ids = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def evaluate(model: Any) -> torch.Tensor:
    model.eval()
    ids = torch.randint(3, 300, (1, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return model(input_ids=ids).logits


@pytest.mark.parametrize("strategy", [LORA, PARTIAL], ids=["lora", "partial"])
@pytest.mark.parametrize("form", FORMS)
def test_an_evaluation_leaves_every_gradient_as_it_was(wide: Path, form: str, strategy: Any) -> None:
    """On CPUs with AVX512_BF16 bitsandbytes repacks weights in an evaluation, and gradients are wrong from then on."""
    model, _ = built(wide, strategy, form)
    for parameter in model.parameters():  # a fresh adapter's A has no gradient
        if parameter.requires_grad:
            parameter.data += 0.01
    before, first = gradients(model), evaluate(model)
    after, second = gradients(model), evaluate(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(first, second)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_weights_that_the_bits_stand_for(wide: Path, form: str) -> None:
    """Against an ordinary model of the dequantized weights, in the same precision."""
    model, base = built(wide, LORA, form)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1
    found = gradients(model)
    learnt = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    plain, _ = built(wide, LORA, None)
    for name, layer in quantization.layers(model):
        plain.get_submodule(name).weight.data = quantization.dequantized_weight(layer, torch.bfloat16)
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            parameter.data = learnt[name]
    wanted = gradients(plain)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=5e-2, atol=2e-2 * float(wanted[name].abs().max()))
    assert base.quantized["name"] == form


@pytest.mark.parametrize("strategy", [LORA, PARTIAL, {"name": "head"}], ids=["lora", "partial", "head"])
@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_only_what_is_declared_moves_and_none_of_that_is_quantized(wide: Path, form: str, strategy: Any) -> None:
    model, _ = built(wide, strategy, form)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    scales = {name: tensor.clone() for name, tensor in quantization.scale_tensors(model)}
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        gradients(model)
        optimiser.step()
        evaluate(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(before[name], parameter) != parameter.requires_grad, name
        wanted = torch.float32 if parameter.requires_grad else torch.bfloat16
        assert parameter.dtype == wanted or not parameter.is_floating_point()
    assert all(torch.equal(tensor, dict(quantization.scale_tensors(model))[name]) for name, tensor in scales.items())
    held = {name for name, _ in quantization.layers(model)}
    assert held, "nothing is quantized"
    assert not any(
        name.startswith(layer) and p.requires_grad and "lora" not in name
        for layer in held
        for name, p in model.named_parameters()
    )


@pytest.mark.parametrize("strategy", [LORA, PARTIAL], ids=["lora", "partial"])
@pytest.mark.parametrize("form", [*FORMS, {"name": "nf4", "use_double_quant": False}])
def test_footprint_and_bytes_are_the_real_ones(wide: Path, form: Any, strategy: Any) -> None:
    recipe = recipe_of(wide, strategy, form)
    shapes = read_shapes(wide)
    base = load_base(recipe.model, load_tokenizer(recipe.model), learns=trained_by(recipe))
    learning = trained_by(recipe)(shapes, False)
    set_precision(base.model.requires_grad_(False), torch.bfloat16)
    told, real = weight_bytes(shapes, recipe.model.quantization, learning), quantization.bytes_in_memory(base.model)
    tables = 1300 * len(list(quantization.layers(base.model)))  # of the codes: the same few numbers for any size of layer
    assert told <= real <= told + tables
    strategy = strategies.build(recipe.strategy)
    assert strategy.describe(shapes, False).footprint == count_parameters(strategy.build_model(base))


def test_nothing_is_computed_backwards_through_a_frozen_prefix(wide: Path) -> None:
    """Preparing a model for k-bit training would enable input gradients and extend the backward pass to all blocks."""
    model, _ = built(wide, PARTIAL, "nf4")
    reached: set[int] = set()
    for index, layer in enumerate(model.model.layers):
        layer.register_full_backward_hook(lambda module, into, out, index=index: reached.add(index))
    gradients(model)
    assert reached == {2}


def test_what_int8_layers_give_depends_on_the_batch_and_is_not_computed_once(wide: Path) -> None:
    """A column with an outlier in any row is left out of the quantized product, for all rows of the batch."""
    row, neighbour = torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(0))
    neighbour[0, 0] = 50.0
    for form in FORMS:
        model, _ = built(wide, PARTIAL, form)
        layer = model.eval().model.layers[0].self_attn.q_proj
        with torch.no_grad():
            beside = [layer(torch.cat([row, other]))[:1] for other in (row, neighbour)]
        assert torch.equal(*beside) == (form != "int8")
        batch = {"input_ids": torch.ones(2, 8, dtype=torch.long)}
        prefix = find_prefix(model, batch)
        reason = can_precompute(prefix, batch)
        prefix.boundary.unbind()
        assert reason is None if form != "int8" else "depends on outliers of the other examples in the batch" in str(reason)


def test_other_scales_are_another_model(wide: Path) -> None:
    """The bits of a matrix and of twice the matrix are the same: a cached result of one must not be used for the other."""
    found = []
    for factor in (1.0, 2.0):
        _, base = built(wide, LORA, "nf4")
        layer = next(layer for _, layer in quantization.layers(base.model))
        layer.weight.quant_state.offset = layer.weight.quant_state.offset * factor
        found.append(digest_of_weights(base.model))
    assert found[0] != found[1]


# what is quantized


def test_what_is_left_out_is_listed(wide: Path) -> None:
    section = {"name": "nf4", "skip_modules": ["down_proj", "layers.0.self_attn"]}
    _, base = built(wide, LORA, section)
    left = base.quantized["left_out"]
    assert {"lm_head", "model.embed_tokens", "model.layers.*.mlp.down_proj x3"} <= set(left)
    assert "model.layers.*.self_attn.q_proj" in left
    assert any("not quantized: " in remark and "down_proj" in remark for remark in base.remarks)
    quantized = sum(quantization.elements(layer.weight) for _, layer in quantization.layers(base.model))
    assert base.quantized["quantized_parameters"] == quantized
    with pytest.raises(UserError, match=r"skip_modules: 'donw_proj' matches no module .* did you mean 'down_proj'"):
        built(wide, LORA, {"name": "nf4", "skip_modules": ["donw_proj"]})
    with pytest.raises(UserError, match="no layer would be quantized"):
        built(wide, LORA, {"name": "nf4", "skip_modules": ["layers"]})


def test_experts_in_one_piece_are_no_silent_gap(tmp_path: Path) -> None:
    from transformers import MixtralConfig

    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(**shape, num_key_value_heads=1, num_local_experts=4, vocab_size=320)
    folder = make(tmp_path / "moe", config=config)
    with pytest.raises(UserError, match=r"model\.quantization: nf4 would quantize only .*experts\.gate_up_proj"):
        built(folder, LORA | {"target_modules": ["q_proj"]}, "nf4")
    _, base = built(folder, LORA | {"target_modules": ["q_proj"]}, {"name": "nf4", "skip_modules": ["experts", "gate"]})
    assert 0 < base.quantized["share"] < 0.5


def test_transposed_layers_are_quantized_too(tmp_path: Path) -> None:
    """GPT-2 stores its matrices transposed, in a class of its own."""
    from transformers import GPT2Config

    folder = make(tmp_path / "gpt2", config=GPT2Config(n_embd=64, n_layer=2, n_head=2, n_positions=64, vocab_size=320))
    model, base = built(folder, LORA, "nf4")
    assert len(list(quantization.layers(base.model))) == 8
    said = evaluate(model)
    _, other = built(folder, {"name": "head", "untie": True}, "nf4")
    quantization.dequantize(other.model, torch.float32)
    assert not list(quantization.layers(other.model))
    torch.testing.assert_close(evaluate(other.model).float(), said.float(), rtol=0.1, atol=0.05)


# whole runs


@pytest.fixture(scope="module")
def trained(wide: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`trained(strategy, form)` runs a recipe, once."""
    made: dict[str, Path] = {}

    def get(strategy: str, form: str, *words: str) -> Path:
        key = " ".join([strategy, form, *words])
        if key not in made:
            folder = tmp_path_factory.mktemp("trained")
            recipe = folder / "recipe.yaml"
            recipe.write_text(
                f"model: {{name_or_path: {wide}, quantization: {form}}}\nstrategy: {strategy}\n"
                f"data: {{train: {rows}, max_length: 128}}\n"
                "training: {max_steps: 4, global_batch_size: 8, learning_rate: 3e-2, eval_steps: 2}\n"
                f"evaluation: {{samples: 1, max_new_tokens: 4}}\noutput_dir: {folder / 'run'}\n"
            )
            run(load_recipe(str(recipe), list(words)))
            made[key] = folder / "run"
        return made[key]

    return get


@pytest.mark.parametrize("form", SLOW_INT8)
def test_an_adapter_reloads_on_the_base_that_it_was_trained_on(trained: Any, form: str) -> None:
    """Verified in a fresh process by the run; and here by plain peft, with the facts of the report."""
    from peft import AutoPeftModelForCausalLM
    from transformers import BitsAndBytesConfig

    folder = trained(ADAPTED, form)
    result = json.loads((folder / "report.json").read_text())["result"]
    assert result["verified"]["bit_equal"]
    assert result["quantization"]["name"] == form
    reload = result["reload"]
    plain = AutoPeftModelForCausalLM.from_pretrained(
        folder / "final",
        dtype=getattr(torch, reload["dtype"]),
        quantization_config=BitsAndBytesConfig(**reload["quantization"]),
    )
    quantization.prevent_repacking(plain)
    ours, _, _ = artifact.load(str(folder))
    assert len(list(quantization.layers(ours))) == 21
    assert torch.equal(evaluate(plain), evaluate(ours))
    full, _, _ = artifact.load(str(folder), "none")
    assert not list(quantization.layers(full))
    other, _, _ = artifact.load(str(folder), "fp4")
    assert next(layer for _, layer in quantization.layers(other)).weight.quant_type == "fp4"


def test_an_adapter_is_merged_into_the_16_bit_base(trained: Any, wide: Path, tmp_path: Path, capsys: Any) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = trained(ADAPTED, "nf4")
    merge.merge(str(folder), tmp_path / "merged")
    told = capsys.readouterr().out
    assert "KL(nf4 with adapter || merged)" in told
    assert "held-out examples" in told
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.dtype == torch.bfloat16
    base = AutoModelForCausalLM.from_pretrained(wide, dtype=torch.bfloat16)
    wanted = PeftModel.from_pretrained(base, folder / "final").float().merge_and_unload().to(torch.bfloat16)
    for (name, one), (_, two) in zip(merged.named_parameters(), wanted.named_parameters(), strict=True):
        assert torch.equal(one, two), name
    assert not hasattr(merged.config, "quantization_config")


def test_a_changed_base_is_not_merged_into(trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = trained(ADAPTED, "nf4")
    monkeypatch.setattr("hfstrat.models.fingerprint.model_fingerprint", lambda *_: "another")
    with pytest.raises(UserError, match="have changed since training"):
        merge.merge(str(folder), tmp_path / "merged")


@pytest.mark.parametrize("form", SLOW_INT8)
@pytest.mark.slow
def test_blocks_learn_above_a_quantized_prefix(trained: Any, form: str) -> None:
    """The result is saved as it was trained; plain transformers loads it, or hfstrat without quantization."""
    from transformers import AutoModelForCausalLM

    folder = trained("{name: partial, last_n_layers: 1, head: true}", form)
    result = json.loads((folder / "report.json").read_text())["result"]
    assert result["verified"]["bit_equal"]
    plain = AutoModelForCausalLM.from_pretrained(folder / "final", dtype=torch.bfloat16)
    held = [name for name, _ in quantization.layers(plain)]
    assert len(held) == 14
    assert not any(".2." in name or "lm_head" in name for name in held)
    whole, _, _ = artifact.load(str(folder), "none")
    assert not list(quantization.layers(whole))
    quantization.prevent_repacking(plain)
    torch.testing.assert_close(evaluate(whole).float(), evaluate(plain).float(), rtol=0.1, atol=0.05)
    with pytest.raises(UserError, match="is already saved quantized"):
        artifact.load(str(folder), "fp4")


@pytest.mark.parametrize(
    ("strategy", "form"),
    [
        pytest.param(ADAPTED, "nf4", marks=pytest.mark.slow),
        pytest.param("{name: partial, last_n_layers: 1, precompute: false}", "int8", marks=pytest.mark.slow),
    ],
    ids=["lora", "partial"],
)
def test_a_resumed_run_is_the_uninterrupted_one(trained: Any, tmp_path: Path, strategy: str, form: str) -> None:
    import shutil

    from accelerate.state import AcceleratorState
    from safetensors.torch import load_file

    whole = trained(strategy, form)
    text = (whole.parent / "recipe.yaml").read_text().replace(str(whole), str(tmp_path / "run"))
    (tmp_path / "recipe.yaml").write_text(text)

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hfstrat.trainer.trainer.StrategyTrainer._load_best_model", stop)
        with pytest.raises(KeyboardInterrupt):
            run(load_recipe(str(tmp_path / "recipe.yaml")))
    AcceleratorState._reset_state(True)
    for folder in (tmp_path / "run").glob("checkpoint-4"):
        shutil.rmtree(folder)
    with pytest.MonkeyPatch.context() as patch:  # the first run was verified, and this one is compared with it
        done = {"bit_equal": True, "max_difference": 0.0, "loaded_with": "nobody"}
        patch.setattr("hfstrat.tasks.verify.verify", lambda *_: done)
        run(load_recipe(str(tmp_path / "recipe.yaml")))
    assert json.loads((tmp_path / "run" / "report.json").read_text())["result"]["resumed_from"]
    one, two = (load_file(next((run_ / "final").glob("*.safetensors"))) for run_ in (whole, tmp_path / "run"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_checkpoint_of_another_base_is_refused(wide: Path) -> None:
    from hfstrat.errors import RunError

    model, _ = built(wide, PARTIAL, "nf4")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    name = next(name for name in state if name.endswith(".absmax"))
    state[name] = state[name] + 1
    with pytest.raises(RunError, match="belongs to another base model"):
        model.load_state_dict(state, strict=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "form"),
    [("{name: head, layer: 2, pooling: mean}", "nf4"), ("{name: head, layer: 2, pooling: mean}", "int8"), ("lora", "nf4")],
)
def test_a_classifier_on_a_quantized_body(wide: Path, tmp_path: Path, strategy: str, form: str) -> None:
    """Verified in a fresh process by the run; a head is published with the dequantized weights."""
    (tmp_path / "recipe.yaml").write_text(
        f"task: text-classification\nmodel: {{name_or_path: {wide}, quantization: {form}}}\nstrategy: {strategy}\n"
        f"data: {{train: {labeled(tmp_path)}, max_length: 64}}\ntraining: {{max_steps: 3, global_batch_size: 8}}\n"
        f"evaluation: {{samples: 0}}\noutput_dir: {tmp_path / 'run'}\n"
    )
    report = run(load_recipe(str(tmp_path / "recipe.yaml")))
    assert report is not None
    model, _, _ = artifact.load(str(tmp_path / "run"))
    if strategy == "lora":
        assert len(list(quantization.layers(model))) == 21
        config = json.loads((tmp_path / "run" / "final" / "config.json").read_text())
        assert "quantization_config" not in config  # plain peft takes it for that of the weights it reads
        merge.merge(str(tmp_path / "run"), tmp_path / "merged")
    else:
        assert not list(quantization.layers(model))
        assert report["result"]["head"]["published"]["top1_agreement"] > 0.8
        with pytest.raises(UserError, match="sentence-transformers"):
            artifact.load(str(tmp_path / "run"), "nf4")


def test_a_quantized_teacher_and_its_answers(wide: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cached outputs of one are not used for the other; another run with the same teacher computes nothing."""
    monkeypatch.setenv("HFSTRAT_CACHE", str(tmp_path / "cache"))
    built = []
    for number, form in enumerate(["null", "nf4", "fp4", "nf4"]):
        (tmp_path / "recipe.yaml").write_text(
            f"model: {wide}\nstrategy:\n  name: distill\n  student: {{name: partial, last_n_layers: 1}}\n"
            f"  teacher: {{name_or_path: {wide}{'' if form == 'null' else f', quantization: {form}'}}}\n  baseline: false\n"
            f"data: {{train: {rows}, max_length: 128}}\n"
            "training: {num_train_epochs: 2, max_steps: 1, global_batch_size: 16}\n"
            f"evaluation: {{samples: 0, eval_on_start: false}}\noutput_dir: {tmp_path / f'run{number}'}\n"
        )
        job = set_up(load_recipe(str(tmp_path / "recipe.yaml")))
        built.append(job.train_data.facts["distillation"]["cache"]["built"])
        job.lock.close()
    assert all(built[:3])
    assert not built[3]


def test_a_quantized_base_is_its_own_teacher(wide: Path, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        f"model: {{name_or_path: {wide}, quantization: nf4}}\nstrategy: {{name: distill, student: lora}}\n"
        f"data: {{train: {rows}, max_length: 128}}\ntraining: {{max_steps: 1, global_batch_size: 16}}\n"
        f"evaluation: {{samples: 0, eval_on_start: false}}\noutput_dir: {tmp_path / 'run'}\n"
    )
    job = set_up(load_recipe(str(tmp_path / "recipe.yaml")))
    assert len(list(quantization.layers(job.trainer.model))) == 21
    job.lock.close()


def set_up(loaded: Any) -> Any:
    from hfstrat.run import setup

    world = SimpleNamespace(is_main_process=True, num_processes=1, wait_for_everyone=lambda: None)
    return setup.set_up(loaded, world, overwrite=False)


# what can be known before


def test_what_bitsandbytes_is_needed_for_is_said_at_once(wide: Path, rows: Path, tmp_path: Path, monkeypatch: Any) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "bitsandbytes" else real(name))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {wide}\nstrategy: lora\ndata: {rows}\noutput_dir: {tmp_path / 'run'}\n")
    for words in (
        ["model.quantization=nf4"],
        ["training.optim=adamw_8bit"],
        ["training.optim=paged_adamw_32bit"],
        [f"strategy={{name: distill, student: full, teacher: {{name_or_path: {wide}, quantization: int8}}}}"],
    ):
        with pytest.raises(UserError, match=r"needs bitsandbytes: pip install 'hfstrat\[quantization\]'"):
            check(load_recipe(str(recipe), words))
    with pytest.raises(UserError, match=r"needs bitsandbytes.*or --quantization none"):
        artifact.check("recorded", str(wide), {"load_in_4bit": True})
    artifact.check("none", str(wide), {"load_in_4bit": True})
    with pytest.raises(UserError, match="expected one of recorded, none, int8, nf4, fp4"):
        artifact.check("nf5", str(wide), None)


def test_a_teacher_is_counted_in_its_bits(wide: Path) -> None:
    from hfstrat.strategies.description import Footprint
    from hfstrat.strategies.distill.teacher import check_room

    with pytest.raises(UserError, match="quantization: nf4"):
        check_room("t", (2e9, 6e8), Footprint(10**8, 10**8), 3 * 10**9, True)
    check_room("t", (6e8, 6e8), Footprint(10**8, 10**8), 3 * 10**9, True)


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit"])
def test_optimisers_in_few_bits_step(wide: Path, rows: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "recipe.yaml").write_text(
        f"model: {{name_or_path: {wide}, quantization: nf4}}\nstrategy: {{name: lora, r: 64}}\n"
        f"data: {{train: {rows}, max_length: 128}}\ntraining: {{max_steps: 1, global_batch_size: 16, optim: {name}}}\n"
        f"evaluation: {{samples: 0, eval_on_start: false}}\noutput_dir: {tmp_path / 'run'}\n"
    )
    job = set_up(load_recipe(str(tmp_path / "recipe.yaml")))
    optimiser = job.trainer.create_optimizer()
    before = {id(p): p.detach().clone() for group in optimiser.param_groups for p in group["params"]}
    found = gradients(job.trainer.model)
    optimiser.step()
    moved = [not torch.equal(before[id(p)], p) for group in optimiser.param_groups for p in group["params"]]
    assert any(moved)
    assert found
    assert "bitsandbytes" in type(getattr(optimiser, "optimizer", optimiser)).__module__
    job.lock.close()


# measured without training


def loss_by_hand(model: Any, target: Path, rows: Path) -> float:
    """Each row alone through a plain forward pass; the mean over what is supervised."""
    from hfstrat.data.prepare import prepare_eval
    from hfstrat.evaluation.evaluate import Request

    tokenizer = artifact.load(str(target), "none")[1]
    asked = Request(str(target), data=str(rows)).recipe()
    total, count = 0.0, 0
    for row in prepare_eval(asked.data, tokenizer, 0, None).eval:
        with torch.no_grad():
            logits = model.eval()(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].float()
        wanted = torch.tensor(row["labels"])[1:].long()
        total += float(torch.nn.functional.cross_entropy(logits, wanted, ignore_index=-100, reduction="sum"))
        count += int((wanted != -100).sum())
    return total / count


def measured(target: Path, rows: Path, form: str, against: str | None = None, side: str = "after") -> float:
    from hfstrat.evaluation.evaluate import Request
    from hfstrat.evaluation.evaluate import evaluate as carry_out

    switched_off = ["evaluation.control=off", "evaluation.samples=0"]
    whole = carry_out(Request(str(target), against, str(rows), switched_off, quantization=form))
    assert whole is not None
    assert whole["settings"]["quantization"] == form
    return float(whole["measured"]["evaluation rows"][side]["loss"]["value"])


def bits(form: str) -> Any:
    from transformers import BitsAndBytesConfig

    four = {"load_in_4bit": True, "bnb_4bit_quant_type": form, "bnb_4bit_use_double_quant": True}
    arguments = {"load_in_8bit": True} if form == "int8" else four | {"bnb_4bit_compute_dtype": "bfloat16"}
    return BitsAndBytesConfig(**arguments, llm_int8_skip_modules=["lm_head"])


@pytest.mark.parametrize("form", ["nf4", "int8"])
@pytest.mark.slow
def test_a_model_is_measured_in_the_bits_that_were_asked_for(wide: Path, rows: Path, form: str) -> None:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(wide, dtype=torch.bfloat16, quantization_config=bits(form))
    quantization.prevent_repacking(plain)
    found = measured(wide, rows, form)
    expected, whole = loss_by_hand(plain, wide, rows), measured(wide, rows, "none")
    assert abs(found - expected) < 3e-5 < abs(found - whole)


@pytest.mark.slow
def test_an_adapter_is_measured_on_the_base_in_the_bits_that_were_asked_for(trained: Any, wide: Path, rows: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, found = trained(ADAPTED, "nf4"), dict[str, float]()
    for form in ("fp4", "none"):
        how = {} if form == "none" else {"quantization_config": bits(form)}
        plain = AutoModelForCausalLM.from_pretrained(wide, dtype=torch.bfloat16, **how)
        quantization.prevent_repacking(plain)
        alone = loss_by_hand(plain, wide, rows)
        expected = loss_by_hand(PeftModel.from_pretrained(plain, folder / "final"), folder, rows)
        found[form] = measured(folder, rows, form)
        assert found[form] == pytest.approx(expected, abs=1e-4)
        assert measured(folder, rows, form, "base", "before") == pytest.approx(alone, abs=1e-4)  # both in the same bits
    found["recorded"] = measured(folder, rows, "recorded")
    assert len(set(found.values())) == 3
    assert measured(folder, rows, "nf4") == found["recorded"]


def test_what_cannot_be_measured_in_other_bits_is_refused_before_it_is_loaded(trained: Any, wide: Path, tmp_path: Path) -> None:
    from hfstrat.evaluation.evaluate import Request

    folder = trained("{name: partial, last_n_layers: 1, head: true}", "nf4")
    with pytest.raises(UserError, match=r"--quantization: nf5: expected one of recorded, none, int8, nf4, fp4"):
        Request(str(wide), quantization="nf5").check()
    with pytest.raises(UserError, match="is already saved quantized"):
        Request(str(folder), quantization="int8").check()
    with pytest.raises(UserError, match="is already saved quantized"):
        Request(str(wide), against=str(folder), quantization="int8").check()
    (tmp_path / "modules.json").write_text("[]")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="the format of sentence-transformers"):
        Request(str(tmp_path), quantization="int8").check()
    assert Request(**json.loads(Request(str(wide), quantization="fp4").to_json())).quantization == "fp4"

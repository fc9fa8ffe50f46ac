"""A new head has a learning rate of its own, by every strategy that trains one beside other weights; no other head has."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.classifiers import labeled, write_recipe

from hfstrat.errors import UserError
from hfstrat.recipe.load import load_recipe
from hfstrat.run import preflight, setup

RATE, HEAD = 1e-3, 7e-3
STRATEGIES = {
    "full": "full",
    "lora": "{name: lora, r: 4}",
    "partial": "{name: partial, last_n_layers: 2, layer_decay: 0.5}",
}


@pytest.fixture
def rates_of(tmp_path: Path, bodies: Any) -> Any:
    """The peak learning rate of each trainable parameter, by its name."""

    def get(family: str, strategy: str, *overrides: str, creates: bool = True) -> dict[str, float]:
        recipe = str(write_recipe(tmp_path, bodies(family), labeled(tmp_path)))
        keys = [f"strategy={strategy}", f"training.learning_rate={RATE}", "model.dtype=float32", "evaluation.baselines=false"]
        world: Any = SimpleNamespace(is_main_process=True, num_processes=1, wait_for_everyone=lambda: None)
        job = setup.set_up(load_recipe(recipe, [*keys, *overrides]), world, overwrite=True)
        assert job.lock is not None
        job.lock.close()
        if not creates:
            return {}
        job.trainer.create_optimizer_and_scheduler(10)
        groups = job.trainer.optimizer.param_groups
        assert groups[0]["initial_lr"] == RATE  # the one that Trainer logs
        lrs = {id(p): group["initial_lr"] for group in groups for p in group["params"]}
        return {name: lrs[id(p)] for name, p in job.trainer.model.named_parameters() if p.requires_grad}

    return get


@pytest.mark.parametrize(("family", "head"), [("bert", ("classifier",)), ("llama", ("score",))])
@pytest.mark.parametrize("name", ["full", "lora", "partial"])
def test_only_new_parameters_have_the_rate_of_the_head(rates_of: Any, family: str, head: tuple[str, ...], name: str) -> None:
    """BERT's pooler comes with the checkpoint."""
    found = rates_of(family, STRATEGIES[name], f"training.head_learning_rate={HEAD}")
    plain = rates_of(family, STRATEGIES[name], f"training.head_learning_rate={RATE}")
    assert found.keys() == plain.keys()
    for key, rate in found.items():
        is_head = key.removeprefix("base_model.model.").startswith(head)
        assert rate == pytest.approx(plain[key] * (HEAD / RATE if is_head else 1)), key
    assert max(found.values()) == pytest.approx(HEAD)


@pytest.mark.parametrize(
    ("strategy", "steps", "warns"),
    [("full", 9, True), ("full", 100, False), ("head", 9, False), ("{name: head, then: full}", 9, False)],
)
def test_too_few_steps_for_a_new_head_are_said(
    rates_of: Any, capsys: pytest.CaptureFixture[str], strategy: str, steps: int, warns: bool
) -> None:
    """Not for a head that is solved."""
    rates_of("bert", strategy, f"training.max_steps={steps}", "training.num_train_epochs=null", creates=False)
    said = capsys.readouterr().out
    assert ("9 steps for a head with random weights" in " ".join(said.split())) == warns


def test_where_there_is_no_new_head_it_is_refused(rates_of: Any, tmp_path: Path, bodies: Any) -> None:
    with pytest.raises(UserError, match=r"training\.head_learning_rate: the head of this model is trained already"):
        rates_of("bert", "{name: head, then: full}", f"training.head_learning_rate={HEAD}")
    recipe = str(write_recipe(tmp_path, bodies("bert"), labeled(tmp_path)))
    for keys, words in (
        (["strategy=head"], "trains nothing else"),
        (["strategy={name: scratch, model_type: bert}"], "all weights of this model are new"),
    ):
        with pytest.raises(UserError, match=words):
            preflight.check(load_recipe(recipe, [*keys, f"training.head_learning_rate={HEAD}"]), overwrite=True)


def test_a_solved_head_has_the_rate_of_the_other_weights(rates_of: Any) -> None:
    assert set(rates_of("bert", "{name: head, then: full}").values()) == {RATE}

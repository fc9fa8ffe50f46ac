"""Laws of the advisor: sums equal terms, more room never hurts, footprints are exact."""

from __future__ import annotations

import json
import random
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_jsonl
from helpers import rewarded

from hfstrat.advisor import architecture, candidates, decide, hardware, memory, recipes, show, speed
from hfstrat.advisor.data import Survey, proposed_length
from hfstrat.advisor.decide import Situation
from hfstrat.advisor.hardware import Device, Sharing
from hfstrat.advisor.memory import Shape
from hfstrat.cli import tune
from hfstrat.cli.advise import Request, advise, situation_of
from hfstrat.errors import UserError
from hfstrat.recipe.load import load_recipe
from hfstrat.strategies import defaults

GIB = 2**30
CPU = Device("a CPU", 16.0 * GIB, is_cpu=True)
RATE = speed.Rate(1e11, "a test")


def random_model(source: random.Random) -> architecture.Model:
    return architecture.by_hand(source.choice(["2M", "30M", "300M", "1.1B", "7B"]), source.choice([4096, 32000]), 2048)


def random_data(source: random.Random, task: str | None = None) -> Survey:
    task = task or source.choice(["causal-lm", "text-classification"])
    classes = source.choice([2, 6, 77])
    lengths = np.asarray([source.randint(8, 1500) for _ in range(20)])
    labels = {f"class {n}": 10 for n in range(classes)} if task == "text-classification" else {}
    rows = round(10 ** source.uniform(1.5, 6.5))
    return Survey("rows", task, rows, lengths, labels=labels, max_length=source.choice([128, 512, 1500]))


def situations(count: int, task: str | None = None) -> Iterator[Situation]:
    source = random.Random(8)
    for _ in range(count):
        limit = 2 ** source.uniform(0, 7) * GIB
        time = source.choice([None, 60.0, 3600.0, 86400.0])
        yield Situation(random_model(source), random_data(source, task), CPU, limit, time=time, rate=RATE)


def fitting_names(situation: Situation) -> set[str]:
    return {scored.name for scored in decide.decide(situation, defaults.ORDER).ranked if scored.timed.fits}


@pytest.mark.slow
def test_more_memory_or_time_never_makes_a_strategy_stop_fitting() -> None:
    for situation in situations(12):
        before = fitting_names(situation)
        assert before <= fitting_names(replace(situation, limit=2 * situation.limit))
        assert before <= fitting_names(replace(situation, time=None if situation.time is None else 3 * situation.time))


def test_sums_equal_their_terms() -> None:
    for situation in situations(8):
        for scored in decide.decide(situation, defaults.ORDER).ranked:
            prediction = scored.fitted.prediction
            assert prediction.total == pytest.approx(sum(prediction.terms.values()))
            assert prediction.total == max(sum(terms.values()) for terms in prediction.phases.values())
            assert all(value > 0 for terms in prediction.phases.values() for value in terms.values())


def test_processes_that_share_need_less_each() -> None:
    model = architecture.by_hand("1.1B", 32000, 2048)
    candidate = candidates.propose("full", model, random_data(random.Random(0), "causal-lm"))
    shape = Shape(512, 1)
    ways = [Sharing(), Sharing("zero2", 4, False, True, True), Sharing("fsdp2", 4, True, True, True)]
    totals = [memory.predict(model, candidate.description, shape, way).total for way in ways]
    assert totals == sorted(totals, reverse=True)
    assert memory.predict(model, candidate.description, shape, Sharing("ddp", 4)).total >= totals[0]


def test_weights_gradients_and_moments_take_four_four_and_eight_bytes_per_trainable_parameter() -> None:
    model = architecture.by_hand("30M", 4096, 512)
    candidate = candidates.propose("full", model, random_data(random.Random(0), "causal-lm"))
    terms = memory.predict(model, candidate.description, Shape(64, 1, 2)).phases["optimizer step"]
    trainable = candidate.footprint.trainable
    assert (terms["weights"], terms["gradients"], terms["optimizer"]) == (4 * trainable, 4 * trainable, 8 * trainable)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_footprint_is_the_exact_one(models: Callable[..., Path], family: str, tied: bool) -> None:
    """`description` and `footprint` have the same trainable parameters, and the loaded model has the same total."""
    from transformers import AutoModelForCausalLM

    folder = models(family=family, tied=tied)
    model = architecture.read(str(folder))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert model.parameters == sum(p.numel() for p in {id(p): p for p in loaded.parameters()}.values())
    data = random_data(random.Random(0), "causal-lm")
    for name in ("head", "partial", "lora", "full", "distill"):
        candidate = candidates.propose(name, model, data)
        found = candidate.description
        adapters = sum(found.rank * sum(found.shapes[key]) for key in found.adapted)
        trainable = adapters + sum(int(np.prod(found.shapes[key])) for key in found.names)
        assert trainable == candidate.footprint.trainable


def test_recomputed_activations_and_fewer_rows_need_less() -> None:
    for situation in situations(6, "causal-lm"):
        candidate = candidates.propose("full", situation.model, situation.data)

        def total(description: Any = candidate.description, model: Any = situation.model, **given: Any) -> float:
            return memory.predict(model, description, Shape(512, **given)).total

        assert total(micro=4, recompute=True) <= total(micro=4)
        assert total(micro=1) <= total(micro=2) <= total(micro=8)


def test_units_are_parsed() -> None:
    assert hardware.parse_memory("16GiB") == 16 * GIB
    assert hardware.parse_memory("24 GB") == 24e9
    assert hardware.parse_time("1.5h") == 5400
    assert speed.gain(10, 3 * 2, 3) == pytest.approx(3 * 16 / (10 + 18))


def test_operations_are_six_per_weight_and_token_if_all_weights_are_trained() -> None:
    model = architecture.by_hand("300M", 4096, 2048)
    candidate = candidates.propose("full", model, random_data(random.Random(0), "causal-lm"))
    found = speed.work(model, candidate.description, 1.0, 1.0).training
    assert found == pytest.approx(6 * model.parameters, rel=0.01)


def test_a_proposed_length_keeps_nearly_all_tokens() -> None:
    source = np.random.default_rng(0)
    for _ in range(50):
        lengths = source.integers(1, 3000, 200)
        context = int(source.integers(64, 4096))
        length = proposed_length(lengths, context)
        assert length <= max(16, context)
        if length < context:
            assert np.minimum(lengths, length).sum() >= 0.995 * lengths.sum()


@pytest.mark.slow
def test_the_advice_for_real_rows_writes_recipes_that_pass_the_checks(
    tiny: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    advise(Request(model=str(tiny), data=str(rows), memory="8GiB", device="cpu", time="1h"), tmp_path / "out", as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["recipes"]
    assert found["data"]["rows"] == 60
    ranked = [strategy["name"] for strategy in found["strategies"]]
    assert sorted(ranked) == sorted(defaults.ORDER)
    for strategy in found["strategies"]:
        if strategy["can"]:
            assert strategy["memory"]["peak"] == pytest.approx(sum(strategy["memory"]["terms"].values()))


def test_columns_are_mapped_as_in_a_recipe(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`advise` and `compare` read the data as `train` does with the same override; without it they name the override."""
    from helpers import comparisons

    from hfstrat.engine import entries

    monkeypatch.setattr(speed, "matmul_rate", lambda: (1e10, 0.0))
    data = tmp_path / "rows.csv"
    data.write_text("review,sentiment\n" + "".join(f'"a, text {n}",{"ab"[n % 2]}\n' for n in range(40)))
    given = Request(model=str(tiny), data=str(data), device="cpu", memory="8GiB", strategies="full,lora")
    with pytest.raises(UserError, match=re.escape("Set `data.columns: {review: text, sentiment: label}`")):
        advise(given, None, as_json=True)
    mapped = ("data.columns={review: text, sentiment: label}", "data.max_length=48")
    advise(replace(given, overrides=mapped), tmp_path / "out", as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["data"]["labels"] == {"a": 20, "b": 20}
    written = [load_recipe(file) for file in found["recipes"]]
    assert len(written) == 2
    assert all(each.recipe.data.columns == {"review": "text", "sentiment": "label"} for each in written)
    assert all(each.recipe.data.max_length == 48 for each in written)
    assert recipes.predict({"one": written[0]})["one"]["rank"] == 1
    wanted = comparisons.request(tmp_path / "compared", model=str(tiny), data=str(data), strategies="lora", budget="10min")
    lineup = entries.line_up(replace(wanted, overrides=list(mapped)))
    assert "text-classification (detected from the columns" in lineup.remarks[0]


def test_what_is_written_can_be_compared(tiny: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from helpers import comparisons

    from hfstrat.engine import entries

    advise(Request(model=str(tiny), data=str(rows), device="cpu", memory="8GiB"), tmp_path / "out", as_json=False)
    assert f"hfstrat compare {tmp_path}/out/*.yaml --budget 10min" in capsys.readouterr().out
    files = sorted(map(str, (tmp_path / "out").glob("*.yaml")))
    lineup = entries.line_up(comparisons.request(tmp_path / "compared", recipes=files, budget="10min"))
    assert len(lineup.entries) == len(files) > 1


def test_a_recipe_keeps_the_time_limit_and_is_not_written_if_nothing_fits(
    tiny: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training ends early enough that loading and verification are within the time too."""
    import yaml

    monkeypatch.setattr(speed, "matmul_rate", lambda: (1e7, 0.0))
    monkeypatch.chdir(tmp_path)  # without reports of past runs that give another rate
    given = Request(model=str(tiny), data=str(rows), device="cpu", memory="8GiB", strategies="lora")
    advise(given, None, as_json=True)
    seconds = json.loads(capsys.readouterr().out)["strategies"][0]["time"]["seconds"]
    time = round(0.8 * seconds)
    advise(replace(given, time=f"{time}s"), tmp_path / "out", as_json=True)
    assert json.loads(capsys.readouterr().out)["strategies"][0]["time"]["seconds"] == time
    recipe = yaml.safe_load((tmp_path / "out" / "1-lora.yaml").read_text())
    assert recipe["training"]["max_time"] == f"{time - speed.START_SECONDS:.0f}s"
    advise(replace(given, memory="100MiB"), tmp_path / "none", as_json=False)
    output = capsys.readouterr().out
    assert "no strategy fits into 100 MiB: lora needs least" in output
    assert "no recipe written: no strategy fits into the given memory" in output
    assert not (tmp_path / "none").exists()
    advise(replace(given, time="5s"), tmp_path / "late", as_json=False)
    assert "no strategy finishes within 5.0s" in capsys.readouterr().out
    assert (tmp_path / "late" / "1-lora.yaml").is_file()


def test_a_speed_that_was_measured_on_a_busy_machine_is_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(speed.cache, "folder", lambda: tmp_path)
    answers = iter([{"rate": 1e9, "others": 0.6}, {"rate": 4e11, "others": 0.0}])

    def answer(*args: Any, **kwargs: Any) -> Any:
        return subprocess.CompletedProcess([], 0, json.dumps(next(answers)), "")

    speed.time_product.cache_clear()
    monkeypatch.setattr(speed, "processor", lambda: "a processor")  # finding its name may start a process too
    monkeypatch.setattr(speed.subprocess, "run", answer)
    for _ in range(2):  # measured once in a process
        busy = speed.rate_of(CPU)
        assert "other processes used 60%" in busy.source
        assert busy.band is None
    speed.time_product.cache_clear()
    assert [speed.matmul_rate() for _ in range(2)] == [(4e11, 0.0)] * 2


def test_a_speed_that_cannot_be_measured_is_assumed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(speed.cache, "folder", lambda: tmp_path)
    monkeypatch.setattr(speed, "MATMUL", "raise RuntimeError('no such instruction')")
    speed.time_product.cache_clear()
    assert speed.matmul_rate() == (None, 0.0)
    assert "an assumed rate" in speed.rate_of(CPU).source
    speed.time_product.cache_clear()


@pytest.mark.slow
def test_labels_are_detected_as_a_classification(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"row {n} has text", "label": "ab"[n % 2]} for n in range(50)])
    advise(Request(model=str(tiny), data=str(file), device="cpu"), tmp_path / "out", as_json=False)
    output = capsys.readouterr().out
    assert "2 classes" in output
    assert "scratch" in output
    assert "not available" in output
    assert "model used" in output


def test_sizes_by_hand_are_enough(capsys: pytest.CaptureFixture[str]) -> None:
    advise(Request(parameters="1.1B", rows=10_000, tokens=2_000_000, device="a100", goal="speed"), None, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["model"]["by_hand"]
    assert any("not validated" in words for words in found["caveats"])


MODEL = {"parameters": "30M", "rows": 100, "tokens": 10_000}
BAD: list[tuple[dict[str, Any], str]] = [
    ({**MODEL, "device": "a1000"}, "--device: a1000: unknown; did you mean a100?"),
    ({"model": "/no/such/model", "data": "x.jsonl"}, "--model: /no/such/model: no such folder"),
    ({"model": "HERE", "data": "x.jsonl"}, "has no config.json"),
    ({"parameters": "30M", "data": "/no/rows.jsonl"}, "no such file"),
    ({"parameters": "30M", "data": "BROKEN"}, "not valid JSON"),
    ({**MODEL, "memory": "0GiB"}, "--memory: 0GiB"),
    ({**MODEL, "memory": "lots"}, "--memory: lots: expected an amount"),
    ({**MODEL, "memory": "99999TiB"}, "expected between 64MiB"),
    ({**MODEL, "time": "0.1s"}, "expected between 5s"),
    ({**MODEL, "time": "soon"}, "--time: soon: expected a time such as"),
    ({**MODEL, "time": "100000h"}, "and a year"),
    ({**MODEL, "goal": "fame"}, "--goal: fame: expected one of quality"),
    ({**MODEL, "strategies": "lora,magic"}, "--strategies: magic: no such strategy"),
    ({**MODEL, "task": "vision"}, "--task: vision: expected one of"),
    ({**MODEL, "parameters": "many"}, "--parameters: many: expected a number of parameters"),
    ({**MODEL, "tokens": 5}, "--tokens: 5 tokens for 100 rows"),
    ({**MODEL, "rows": 0}, "--rows: 0: expected at least 1"),
    ({**MODEL, "accelerate_config": "fsdp9"}, "--accelerate-config: fsdp9: no such name among the bundled accelerate_configs"),
    ({**MODEL, "measure": "30s"}, "--measure: it needs a model folder and data"),
    ({**MODEL, "strategies": "lora,lora"}, "--strategies: lora,lora: expected some of"),
    ({**MODEL, "classes": 3, "task": "causal-lm"}, "--classes: task causal-lm has no classes"),
    ({"parameters": "30M", "data": "BROKEN", "classes": 3}, "--classes: --data already has labels"),
    ({"parameters": "30M", "data": "LABELED", "task": "causal-lm"}, "--data: "),
    ({"parameters": "30M", "data": "UNKNOWN"}, "map columns to text and label, or to text and score"),
    ({"model": "HERE", "data": "x.jsonl", "vocab": 9}, "--vocab: --model already has a vocabulary"),
    ({"rows": 100, "tokens": 10_000}, "--model: missing"),
    ({"parameters": "30M"}, "--data: missing"),
    ({**MODEL, "overrides": ("data.columns={a: text}",)}, "advise: data.columns={a: text}: only keys of the section data"),
    ({"parameters": "30M", "data": "LABELED", "overrides": ("training.max_steps=3",)}, "only keys of the section data"),
    ({"parameters": "30M", "data": "LABELED", "overrides": ("data.train=x",)}, "data.train: --data already sets it"),
    ({"parameters": "30M", "data": "LABELED", "overrides": ("data.colums={a: b}",)}, "did you mean 'columns'?"),
    ({"parameters": "30M", "data": "LABELED", "overrides": ("data.columns={txt: text}",)}, "data.columns: "),
]


@pytest.mark.parametrize(("given", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_a_sentence(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text('{"text": "a"\n')
    labeled = write_jsonl(tmp_path / "labeled.jsonl", [{"text": f"row {n}", "label": "ab"[n % 2]} for n in range(9)])
    unknown = write_jsonl(tmp_path / "unknown.jsonl", [{"foo": "a", "bar": "b"}] * 9)
    places = {"UNKNOWN": str(unknown), "HERE": str(tmp_path), "BROKEN": str(tmp_path / "broken.jsonl"), "LABELED": str(labeled)}
    given = {
        "device": "cpu",
        **{name: places.get(value, value) if isinstance(value, str) else value for name, value in given.items()},
    }
    with pytest.raises(UserError) as error:
        advise(Request(**given), None, as_json=True)
    assert message in str(error.value)
    assert error.value.code == 2


def test_recipes_are_not_written_for_sizes_by_hand(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--write: a recipe needs a model and data"):
        advise(Request(**MODEL, device="cpu"), tmp_path / "out", as_json=True)
    assert not (tmp_path / "out").exists()


def test_fit_names_the_settings_it_needs() -> None:
    model, data = architecture.by_hand("1.1B", 32000, 2048), random_data(random.Random(3), "causal-lm")
    candidate = candidates.propose("full", model, data)
    limits = (400.0, 26.0, 12.0, 0.5)
    kinds = [decide.fit(candidate, Situation(model, data, CPU, limit * GIB)).kind for limit in limits]
    assert kinds[0] == "fits"
    assert kinds[-1] in ("does not fit", "fits with more")
    assert situation_of(Request(**MODEL, device="cpu", memory="4GiB")).limit == 4 * GIB


def test_processes_on_a_cpu_share_its_memory_and_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """More processes neither help to fit nor run faster."""
    model, data = architecture.by_hand("1.1B", 32000, 2048), random_data(random.Random(3), "causal-lm")
    for name in ("full", "partial", "lora"):
        candidate = candidates.propose(name, model, data)
        assert decide.fit(candidate, Situation(model, data, CPU, 2.0 * GIB)).kind == "does not fit"
    monkeypatch.setattr(hardware, "memory_here", lambda: 32.0 * GIB)
    monkeypatch.setattr(speed, "matmul_rate", lambda: (1e11, 0.0))
    one, two = (situation_of(Request(**MODEL, device="cpu", num_processes=count)) for count in (1, 2))
    assert (one.limit, two.limit) == (32 * GIB, 16 * GIB)
    times = [
        {scored.name: scored.timed.seconds for scored in decide.decide(each, ["full", "lora"]).ranked} for each in (one, two)
    ]
    assert all(times[1][name] > 0.99 * times[0][name] for name in ("full", "lora"))
    assert any("share its memory" in words for words in show.caveats(two))


@pytest.mark.parametrize("width", [60, 80, 160])
def test_every_word_is_shown_in_any_terminal(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unabridged, in lines that fit; what is unknown about sizes given by hand is not invented."""
    monkeypatch.setattr(show, "WIDTH", width)
    advise(Request(**MODEL, classes=4, device="cpu"), None, as_json=False)
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= width
    assert "…" not in output
    words = re.sub(r"[\W_]+", "", output)
    for name in ("lora", "partial", "head", "full"):
        for text in defaults.factors(name):
            assert all(re.sub(r"[\W_]+", "", part) in words for part in (text.split() if width == 160 else [text]))
    assert "4classesof25examples" in words
    assert "anintervalholdstheresult" in words
    assert "median" not in output.partition("memory")[0]


def test_the_advisor_imports_no_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys, json\nfrom hfstrat.cli import advise\n"
        "from hfstrat.tasks.image_classification import given\nfrom hfstrat.tasks.audio_classification import given\n"
        "found = advise.situation_of(advise.Request(parameters='30M', rows=9, tokens=900, device='a100'))\n"
        "advise.decide.decide(found, ['lora', 'full'])\n"
        "print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.stdout.strip() == "[]", ended.stderr


def test_the_command_line(tiny: Path, rows: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from hfstrat.cli.main import main

    words = ["advise", "--model", str(tiny), "--data", str(rows), "--device", "cpu", "--memory", "8GiB"]
    monkeypatch.setattr("sys.argv", ["hfstrat", *words, "--goal", "size", "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None)
    assert json.loads(capsys.readouterr().out)["goal"] == "size"
    monkeypatch.setattr("sys.argv", ["hfstrat", *words, "--time", "never"])
    with pytest.raises(SystemExit) as ended:
        main()
    output = capsys.readouterr().err
    assert ended.value.code == 2
    assert output.startswith("--time: never")
    assert output.count("\n") == 1


def test_existing_recipes_are_predicted(recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "has_bfloat16", lambda: False)  # in 16 bits the kernels of adapters outweigh a tiny model
    small, large = recipe("training.max_steps=3"), recipe("training.max_steps=300", "strategy={name: full}")
    found = recipes.predict({"small": small, "large": large})
    assert found["small"]["memory_bytes"] < found["large"]["memory_bytes"]
    assert found["small"]["seconds"] < found["large"]["seconds"]
    assert sorted(one["rank"] for one in found.values()) == [1, 2]
    low, high = found["small"]["quality_band"]
    assert low < found["small"]["quality"] < high
    assert found["small"]["quality"] > found["large"]["quality"]  # of the base's loss, after fewer steps


def test_generated_answers_take_time(tmp_path: Path, models: Callable[..., Path]) -> None:
    """A run that writes its answers is predicted to take longer with more or longer ones, and all of it more than 0."""
    file = rewarded.recipe(tmp_path, models(), rewards=["json_valid"])
    rate = speed.Rate(1e10, "a test")

    def predicted(*overrides: str) -> dict[str, Any]:
        return dict(recipes.predict_one(load_recipe(str(file), [*overrides]).recipe, rate)[0])

    base, longer = predicted(), predicted("objective.max_completion_length=64")
    more = predicted("objective.num_generations=16")
    assert 0 < base["seconds"] < min(longer["seconds"], more["seconds"])
    assert base["memory_bytes"] < min(longer["memory_bytes"], more["memory_bytes"])
    assert not {"seconds_band", "memory_band"} & set(base)  # how far these are off was not measured
    assert tune.times(load_recipe(str(file)), rate).step > 0


def test_a_students_own_answers_take_time(tmp_path: Path, models: Callable[..., Path]) -> None:
    """With `on_policy` answers are as long as they may be, whatever the rows say, and the teacher reads them in each step."""
    model = models()
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"say {n} " * 3, "completion": "word " * 5} for n in range(40)])

    def of(on_policy: bool, tokens: int = 64) -> tuple[Any, Any, dict[str, Any]]:
        file = tmp_path / "recipe.yaml"
        own = {"on_policy": True, "max_new_tokens": tokens} if on_policy else {}
        strategy = {"name": "distill", "teacher": str(model), "student": {"name": "full"}, **own}
        given = {"model": str(model), "strategy": strategy, "data": {"train": str(tmp_path / "rows.jsonl")}}
        file.write_text(json.dumps(given | {"output_dir": str(tmp_path / "run")}))
        recipe = load_recipe(str(file), ["training.max_steps=4"]).recipe
        candidate, found = recipes.candidate_of(recipe)
        work = decide.work_of(candidate, found, False, 1.0)
        return found, work, dict(recipes.predict_one(recipe, speed.Rate(1e10, "a test"))[0])

    given, own, longer = of(False), of(True), of(True, 128)
    assert own[0].prompt_length < given[0].mean_length
    assert own[0].mean_length == pytest.approx(own[0].prompt_length + 64)
    assert own[1].once == 0
    assert given[2]["seconds"] < own[2]["seconds"] < longer[2]["seconds"]


def test_processes_share_all_the_work(tmp_path: Path, models: Callable[..., Path]) -> None:
    """Of two processes on machines of their own each does half of what is no matrix product, too."""
    file, once = rewarded.recipe(tmp_path, models(), rewards=["json_valid"]), speed.Rate(1e10, "a test", product=1e10)
    candidate, found = recipes.candidate_of(load_recipe(str(file)).recipe)
    work = decide.work_of(candidate, found, False, 1.0)
    one, two = (
        speed.on_cpu(once._replace(processes=count), candidate.model, candidate.description, work, 1.0, 8) for count in (1, 2)
    )
    assert one.token == pytest.approx(2 * two.token)
    assert one.eval_token == pytest.approx(2 * two.eval_token)
    assert one.fixed > two.fixed


def test_all_sequences_of_a_prompt_count(tmp_path: Path, models: Callable[..., Path]) -> None:
    """The tokens of a step are those of the prompts with all their answers, each as long as it may be."""
    loaded = load_recipe(str(rewarded.recipe(tmp_path, models(), rewards=["json_valid"])))
    objective: Any = loaded.recipe.objective
    _, found = recipes.candidate_of(loaded.recipe)
    answers = objective.num_generations * objective.max_completion_length
    assert found.sequences == objective.num_generations
    prompts = found.lengths - answers
    assert (prompts > 0).all()
    assert (prompts % objective.num_generations == 0).all()
    assert found.supervised_share == pytest.approx(answers / found.mean_length)

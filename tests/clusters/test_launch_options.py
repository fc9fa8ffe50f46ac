"""Every mistake is one sentence with exit code 2, and nothing is written or submitted."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfstrat import errors
from hfstrat.clusters import job as jobs
from hfstrat.clusters import paths, prices, remote
from hfstrat.clusters.slurm import Slurm
from hfstrat.errors import UserError
from hfstrat.recipe.schema import Recipe

pytest_plugins = ["helpers.launches"]

SLURM = ("--on", "slurm", "--gpus", "0")
HF = ("--on", "hf-jobs", "--flavor", "cpu-basic", "--time", "1h", "--package", "hfstrat==0.1.0", "--upload")
SKY = ("--on", "skypilot", "--gpus", "0", "--package", "hfstrat==0.1.0")
MISTAKES: tuple[tuple[tuple[str, ...], str], ...] = (
    ((), "--on: missing; expected one of slurm, hf-jobs, skypilot"),
    (("--on", "slrum"), "--on: slrum: unknown; did you mean slurm?"),
    ((*SLURM, "--nodes", "0"), "--nodes: 0; expected a number from 1 to 1024"),
    (("--on", "slurm", "--gpus", "-1"), "--gpus: -1; expected a number from 0 to 16"),
    ((*SLURM, "--cpus", "0"), "--cpus: 0; expected a number from 1 to 1024"),
    ((*SLURM, "--max-restarts", "-1"), "--max-restarts: -1; expected a number from 0"),
    ((*SLURM, "--time", "2 hours"), "--time: 2 hours: expected a time such as 90min, 2h, 12:00:00"),
    ((*SLURM, "--time", "1:99:00"), "--time: 1:99:00: expected a time"),
    ((*SLURM, "--time", "5s"), "--time: 5s is 5 s; expected between one minute and a year"),
    ((*SLURM, "--name", "My Job"), "--name: My Job: expected lower-case letters"),
    ((*SLURM, "--accelerate-config", "fsdp3"), "--accelerate-config: fsdp3: no such name"),
    ((*SLURM, "--accelerate-config", "fsdp2"), "--accelerate-config: fsdp2 needs GPUs, and --gpus is 0; use cpu_ddp"),
    (("--on", "slurm", "--gpus", "2", "--accelerate-config", "cpu_ddp"), "cpu_ddp is for CPUs, and --gpus is 2"),
    (("--on", "slurm", "--gpus", "2", "--accelerate-config", "single"), "single is for one process, and this job has 2"),
    (("--on", "slurm", "--gpus", "3"), "training.global_batch_size: 8 sequences cannot be split over 3 processes"),
    ((*SLURM, "--env", "NAME"), "--env: NAME: expected NAME=VALUE"),
    ((*SLURM, "--env", "WANDB_API_KEY=abc"), "--env: WANDB_API_KEY looks like a secret"),
    ((*SLURM, "--env", "A=hf_abcdefghijklmnopqrstuvwxyz"), "--env: A looks like a secret"),
    ((*SLURM, "--secret", "NOT_SET_HERE"), "--secret: NOT_SET_HERE is not set in this environment"),
    ((*SLURM, "--secret", "A=b"), "--secret: A: expected only the name of an environment variable"),
    ((*SLURM, "--before", "export X=hf_abcdefghijklmnopqrstuvwxyz"), "--before: holds a secret"),
    ((*SLURM, "--before", "export WANDB_API_KEY=abc"), "--before: WANDB_API_KEY looks like a secret"),
    ((*HF, "--package", "git+https://me:pass@host/hfstrat"), "--package: holds a secret"),
    ((*SLURM, "--sbatch", "nodes=3"), "--sbatch: nodes: written by hfstrat; use --nodes"),
    ((*SLURM, "--sbatch", "signal=TERM@5"), "--sbatch: signal: hfstrat needs its own value"),
    ((*SLURM, "--sbatch", "mem="), "--sbatch: mem=: expected KEY=VALUE or KEY as of sbatch"),
    ((*SLURM, "--venv", "nowhere"), "--venv: nowhere: no bin/python in this folder"),
    ((*SLURM, "--volume", "/a:/b"), "--volume: with --on slurm only folders for --container are mounted"),
    ((*SLURM, "--volume", "/a"), "--volume: /a: expected SOURCE:/PATH"),
    ((*SLURM, "--flavor", "a100-large"), "--flavor: not read with --on slurm, only with hf-jobs; remove it"),
    ((*SLURM, "--spot"), "--spot: not read with --on slurm, only with skypilot"),
    ((*HF[:2], *HF[4:]), "--flavor: missing; the hardware of the job"),
    ((*HF, "--flavor", "a100-larg"), "--flavor: a100-larg: unknown to the installed huggingface_hub; did you mean a100-large?"),
    ((*HF, "--gpus", "2"), "--gpus: 2; flavor cpu-basic has 0"),
    ((*HF, "--nodes", "2"), "--nodes: 2; a job of Hugging Face is one machine"),
    ((*HF[:4], *HF[6:]), "--time: missing; Hugging Face ends a job after its time"),
    ((*HF, "--partition", "gpu"), "--partition: not read with --on hf-jobs, only with slurm"),
    ((*HF, "--storage", "s3://x"), "--storage: s3://x: expected a bucket of the Hub"),
    ((*HF, "--volume", "me/data:/data"), "--volume: me/data:/data: "),
    (HF[:-1], "only on this machine, and 1 more; give --upload to copy it to your private bucket"),
    ((*HF[:6], "--upload"), "--package: this hfstrat was installed from a folder or file of this machine"),
    ((*HF, "--package", "gone.whl"), "--package: gone.whl: no such file; build it with"),
    ((*HF, "data.train=/data/mine.jsonl"), "data.train: /data/mine.jsonl: no such file here, and no --volume is mounted there"),
    (("--on", "skypilot", *SKY[4:]), "--gpu-type: missing; the GPU that SkyPilot looks for"),
    ((*SKY, "--gpu-type", "A100"), "--gpu-type: A100, and --gpus is 0"),
    ((*SKY, "--nodes", "2"), "--nodes: 2 machines need an output_dir that all of them share"),
    ((*SKY, "--spot"), "--spot: a machine that is taken away loses its checkpoints; give --storage"),
    ((*SKY, "--storage", "my-bucket"), "--storage: my-bucket: expected a bucket such as s3://my-bucket"),
    ((*SLURM, "--prices", "gone.yaml"), "--prices: gone.yaml: no such file"),
    ((*SLURM, "--prices", "list.yaml"), "--prices: list.yaml: expected `currency: USD`"),
    ((*SLURM, "--prices", "word.yaml"), "--prices: word.yaml: gpu.a100: two; expected a price per hour"),
    ((*SLURM, "--prices", "none.yaml"), "--prices: none.yaml: no currency"),
    ((*SLURM, "--prices", "kind.csv"), "--prices: kind.csv, line 2: kind is node; expected gpu or machine"),
    ((*SLURM, "--prices", "good.yaml"), "--prices: good.yaml: no price for machine.cpu; it has gpu.a100"),
    ((*SLURM, "--fetch"), "--fetch: no job was submitted for output_dir = runs/chat"),
    ((*SLURM, "--dry-run", "--follow"), "--dry-run: nothing is submitted, so --follow has no job"),
    ((*SLURM, "training.learning_rat=1"), "no such key in 'training'; did you mean 'learning_rate'?"),
    ((*SLURM, "data.train=gone.jsonl"), "data.train: gone.jsonl: no such file"),
)
FILES = {
    "list.yaml": "- 1\n",
    "word.yaml": "currency: USD\ngpu: {a100: two}\n",
    "none.yaml": "gpu: {a100: 2}\n",
    "kind.csv": "kind,name,price,currency\nnode,a100,2,USD\n",
    "good.yaml": "currency: USD\ngpu: {a100: 2}\n",
}


@pytest.fixture
def files(source: str, tmp_path: Path, cluster: Path) -> str:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return source


@pytest.mark.parametrize(("words", "sentence"), MISTAKES, ids=[sentence[:40] for _, sentence in MISTAKES])
def test_a_mistake_is_one_sentence(launch: Any, files: str, tmp_path: Path, words: tuple[str, ...], sentence: str) -> None:
    before = {path for path in tmp_path.rglob("*") if "engine" not in path.parts}
    with pytest.raises(UserError) as refused:
        launch(files, *words)
    assert sentence in str(refused.value)
    assert refused.value.code == errors.USER
    assert len([line for line in str(refused.value).splitlines() if not line.startswith("keys of")]) == 1
    assert {path for path in tmp_path.rglob("*") if "engine" not in path.parts} == before
    assert not list((tmp_path / "engine").iterdir())


def test_a_missing_recipe_and_missing_programs(
    launch: Any, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"gone\.yaml"):
        launch("gone.yaml", *SLURM)
    monkeypatch.setenv("PATH", str(tmp_path))
    for words, program in ((SLURM, "sbatch"), (SKY, "sky")):
        with pytest.raises(UserError, match=f"--on: {program}: not found; .* or give --dry-run"):
            launch(source, *words)
        assert launch(source, *words, "--dry-run") == 0
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        launch(source, *HF)


def test_the_command_ends_with_code_2_and_a_dry_run_imports_no_torch(source: str, tmp_path: Path) -> None:
    code = (
        "import sys; from hfstrat.cli import main\n"
        "for words in (" + repr(SLURM) + ", " + repr(HF) + ", " + repr(SKY) + "):\n"
        f"    main.app(['launch', {source!r}, *words, '--dry-run'], standalone_mode=False)\n"
        "assert not {'torch', 'datasets', 'accelerate', 'peft'} & set(sys.modules), sorted(sys.modules)\n"
        f"sys.argv = ['hfstrat', 'launch', {source!r}, '--on', 'slurm', '--nodes', '0']\n"
        "main.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "--nodes: 0; expected a number from 1 to 1024\n")
    assert done.stdout.count("dry run   nothing was written or submitted") == 3
    assert not (tmp_path / "runs").exists()


def test_a_token_in_a_recipe_is_not_written(launch: Any, source: str, tmp_path: Path) -> None:
    secret = "hf_" + "a" * 30
    file = tmp_path / source
    file.write_text(file.read_text().replace("samples: 1", f"samples: 1, prompts: [{secret}]"))
    for words in (HF, SKY):
        with pytest.raises(UserError, match="holds a token") as refused:
            launch(source, *words, "--dry-run")
        assert secret not in str(refused.value)


def test_a_volume_has_what_is_not_here(launch: Any, source: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = (*HF[:-1], "--volume", "hf://datasets/me/data:/data", "data.train=/data/mine.jsonl", "model=me/model")
    assert launch(source, *words, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "not checked here, since it is on a volume: data.train = /data/mine.jsonl" in shown
    assert "  train: /data/mine.jsonl" in shown


def test_every_text_of_the_schema_is_a_path_or_is_not() -> None:
    """A new key whose values may be files has to be named, or its files would not be copied."""
    no_paths = (
        "add_tokens attn_implementation budget class_names columns config eval_split max_time model_type modules_to_save "
        "output_dir parameters pattern patterns prompts regex repo_id revision skip_modules special_tokens split "
        "target_modules target_parameters"
    )
    schema = Recipe.model_json_schema()
    found = {
        name
        for section in (*schema["$defs"].values(), schema)
        for name, value in section.get("properties", {}).items()
        if holds_text(value)
    }
    assert found == paths.KEYS | paths.WORDS | set(no_paths.split())


def holds_text(value: Any) -> bool:
    """Whether a value of this schema may be a free text."""
    if isinstance(value, list):
        return any(map(holds_text, value))
    if not isinstance(value, dict):
        return False
    if value.get("type") == "string" and not {"enum", "const"} & value.keys():
        return True
    return any(holds_text(value.get(key)) for key in ("anyOf", "oneOf", "items", "additionalProperties"))


def test_paths_are_found_and_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("lora", "chat", "a", "b"):
        (tmp_path / name).mkdir()
    for name in ("a/rows.jsonl", "b/rows.jsonl", "b/more.jsonl", "reward.py"):
        (tmp_path / name).touch()
    recipe = {
        "strategy": {"name": "lora"},
        "model": "some/id",
        "data": {"train": ["a/rows.jsonl", {"path": "b/*.jsonl"}], "template": "chat"},
        "objective": {"name": "grpo", "rewards": ["reward.py:score", "numeric"]},
    }
    found = [place for place in paths.places(recipe) if place.is_here]
    names = paths.remote_names(found)
    assert names == {
        "a/rows.jsonl": "files/rows.jsonl",
        "b/*.jsonl": "files/b/*.jsonl",
        "reward.py:score": "files/reward.py:score",
    }
    new = paths.replaced(recipe, names)
    assert new["data"]["train"] == ["files/rows.jsonl", {"path": "files/b/*.jsonl"}]
    assert new["objective"]["rewards"] == ["files/reward.py:score", "numeric"]
    assert (new["strategy"], new["data"]["template"], new["model"]) == ({"name": "lora"}, "chat", "some/id")
    (tmp_path / "b" / "rows.jsonl").unlink()
    both = paths.remote_names(
        [paths.Place("", "a/rows.jsonl", Path("a/rows.jsonl")), paths.Place("", "x/a", Path("x/rows.jsonl"))]
    )
    assert sorted(both.values()) == ["files/1-rows.jsonl", "files/rows.jsonl"]


@settings(max_examples=40)
@given(st.integers(1, 8), st.integers(0, 8), st.floats(0.01, 50), st.floats(60, 1e6), st.integers(1, 20))
def test_costs_are_price_times_machines_times_time(nodes: int, gpus: int, price: float, seconds: float, sessions: int) -> None:
    found = prices.Prices("mine.yaml", "EUR", {"a100": price}, {"cpu": price, "node": price})
    per_hour = found.per_hour(nodes, gpus, "A100", [])[0]
    assert per_hour == pytest.approx(price * nodes * max(1, gpus))
    assert found.per_hour(nodes, gpus, "A100", ["NODE"])[0] == pytest.approx(price * nodes)
    time = prices.Time(seconds, seconds / 2, seconds * 2, "a test")
    lines = prices.cost_lines(found, per_hour, "a test", time, 7200.0, sessions)
    middle = per_hour * seconds / 3600
    assert f"expected {middle:.2f} EUR ({middle / 2:.2f} to {middle * 2:.2f})" in lines[1]
    assert f"at most {per_hour * 2:.2f} EUR in a session of 2h 00m" in lines[2]
    assert (f"at most {per_hour * 2 * sessions:.2f} EUR in {sessions} sessions" in lines[2]) == (sessions > 1)


def test_yaml_and_csv_prices_are_equal(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("currency: USD\ngpu: {A100: 2.5}\nmachine: {a100x8: 18}\n")
    (tmp_path / "a.csv").write_text("kind,name,price,currency\ngpu,A100,2.5,USD\nmachine,a100x8,18,USD\n")
    one, two = (prices.read(str(tmp_path / name)) for name in ("a.yaml", "a.csv"))
    assert (one.currency, one.gpu, one.machine) == (two.currency, two.gpu, two.machine)
    assert one.gpu == {"a100": 2.5}


def test_the_cost_has_the_interval_of_the_predicted_time(
    launch: Any, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hfstrat.advisor import speed

    monkeypatch.setattr(speed, "rate_of", lambda device: speed.Rate(1e9, "a test", None if device.peak else 0.5))
    (tmp_path / "prices.yaml").write_text("currency: USD\ngpu: {a100: 4}\nmachine: {cpu: 360}\n")
    words = ("--on", "slurm", "--prices", "prices.yaml", "--time", "2h", "--dry-run")
    assert launch(source, *words, "--gpus", "0") == 0
    shown = capsys.readouterr().out
    line = next(line for line in shown.splitlines() if "expected" in line)
    middle, low, high = map(float, re.findall(r"\d+\.\d\d", line))
    assert low == pytest.approx(middle / 1.5, abs=0.02)
    assert high == pytest.approx(middle * 1.5, abs=0.02)
    assert launch(source, *words, "--gpus", "4", "--gpu-type", "a100") == 0
    shown = capsys.readouterr().out
    assert "no interval was validated" in shown
    assert "if all processes share the work ideally" in shown
    assert "16.00 USD per hour: 4 GPUs of a100 at 4" in shown
    assert "at most 32.00 USD in a session of 2h 00m, at most 352.00 USD in 11 sessions" in shown


@given(st.lists(st.sampled_from(["HFSTRAT", "HFSTRAT_", "HFSTRAT__", " HFSTRAT", "$A", ""]), max_size=6))
@settings(max_examples=50)
def test_a_here_document_is_the_text(lines: list[str]) -> None:
    """Whatever a recipe holds, the shell gets it unchanged, and nothing of it is run."""
    from hfstrat.clusters import script

    text = "\n".join([*lines, "$(touch x) `id` \\ 'quote'", "HFSTRAT"])
    word, document = script.here(text)
    body = document.rsplit("\n", 1)
    assert body[1] == word.strip("'")
    assert body[1] not in body[0].splitlines()
    assert body[0].splitlines() == text.splitlines()


def test_options_of_an_engine_exist() -> None:
    assert jobs.READ_BY.keys() <= jobs.Options.__dataclass_fields__.keys()


def test_variables_that_hold_no_secret_are_passed(launch: Any, files: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "--env",
        "TOKENIZERS_PARALLELISM=false",
        "--before",
        "export HF_TOKEN=$(cat ~/token)",
        "--before",
        'export K="$KEY"',
    )
    assert launch(files, *SLURM, *words, "--dry-run") == 0
    script = capsys.readouterr().out.splitlines()
    assert script.index("set -u") > script.index('export K="$KEY"')  # scripts of others read variables that are not set


def test_jobs_of_two_output_folders_have_two_names() -> None:
    """In a bucket, jobs of one name share a folder."""
    folders = [f"runs/{'long-' * 10}seed{seed}" for seed in (1, 2)]
    folders += ["runs/chat", "runs/a/chat", "runs/b/chat", "other/chat", "runs/Chat", "/data/runs/chat", "runs/???"]
    for shared in (False, True):
        names = [jobs.default_name(folder, shared) for folder in folders]
        assert len(set(names)) == len(names)
        assert all(re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", name) for name in names)
    assert jobs.default_name("runs/chat", shared=False) == "hfstrat-chat"


def test_projects_with_the_same_output_dir_have_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has the same name from its own folder again, so that a second launch resumes."""
    names: dict[str, set[str]] = {}
    for project in ("one", "two", "one"):
        (tmp_path / project).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / project)
        names.setdefault(project, set()).add(jobs.default_name("runs/chat", shared=True))
    assert [len(found) for found in names.values()] == [1, 1]
    assert not names["one"] & names["two"]


def test_a_job_beside_that_of_another_engine_is_refused(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both would write one result. Where the first has ended, the second may begin."""
    from hfstrat.cli import launch as command
    from hfstrat.clusters.engine import Submitted

    job = SimpleNamespace(output_dir=Path("runs/chat"), folder=Path("runs/chat.launch"))
    earlier = Submitted("slurm", "7", "hfstrat-chat", "2026-01-01")
    for active, said in ((True, "job 7 for runs/chat.* waits or runs already"), (None, "remove runs/chat.launch/launch.json")):
        monkeypatch.setattr(Slurm, "waits_or_runs", staticmethod(lambda submitted, active=active: active))
        with pytest.raises(UserError, match=said):
            command._check_other(job, earlier)
    monkeypatch.setattr(Slurm, "waits_or_runs", staticmethod(lambda submitted: False))
    command._check_other(job, earlier)


def test_a_scheduler_that_does_not_answer_has_not_ended_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    from hfstrat.clusters import slurm
    from hfstrat.clusters.engine import Submitted

    job = Submitted("slurm", "7", "hfstrat-chat", "2026-01-01")
    monkeypatch.setattr(slurm.shutil, "which", lambda name: name)
    for code, printed, error, wanted in (
        (0, "RUNNING\n", "", True),
        (0, "", "", False),
        (1, "", "slurm_load_jobs error: Invalid job id specified", False),
        (1, "", "slurm_load_jobs error: Socket timed out on send/recv operation", None),
    ):
        answer = subprocess.CompletedProcess([], code, printed, error)
        monkeypatch.setattr(slurm.subprocess, "run", lambda *args, answer=answer, **kwargs: answer)
        assert Slurm.waits_or_runs(job) is wanted


def test_files_whose_rows_name_files_get_a_note(tmp_path: Path) -> None:
    """A folder is copied with all that is in it, a file alone."""
    file = tmp_path / "rows.jsonl"
    file.write_text("{}\n")
    places = [paths.Place("data.train", str(path), path) for path in (file, tmp_path)]
    for task, count in (("image-classification", 1), ("image-text-to-text", 1), ("causal-lm", 0)):
        job: Any = SimpleNamespace(loaded=SimpleNamespace(recipe=SimpleNamespace(task=task)))
        notes = remote.notes_on_files(job, places)
        assert len(notes) == count
        assert all(note.startswith(f"data.train: only {file} is copied") for note in notes)

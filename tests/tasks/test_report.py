"""report.json: typed, versioned, and readable also as earlier versions wrote it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.hub_runs import finished_run
from pydantic import BaseModel

from hfstrat import errors
from hfstrat.errors import UserError
from hfstrat.recipe.stored import upgraded
from hfstrat.tasks import report as reports
from hfstrat.tasks.report import Report, parse
from hfstrat.tasks.report_parts import Part

OLD = Path(__file__).with_name("report_of_version_0.json")  # of hfstrat e5ec128, with the parts of every strategy


def old() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(OLD.read_text())
    return content


def undeclared(value: Any, path: str = "") -> set[str]:
    """The keys that no model of the report declares, as dotted paths."""
    found: set[str] = set()
    if isinstance(value, Part):
        found = {f"{path}.{name}" for name in value.model_extra or {}}
    if isinstance(value, BaseModel):
        for name in type(value).model_fields:
            found |= undeclared(getattr(value, name), f"{path}.{name}")
    return found


def test_a_report_of_the_version_before_is_read() -> None:
    before, report = old(), parse(old())
    result = report.finished
    assert report.schema_version == reports.SCHEMA_VERSION
    read = report.run.recipe.model_dump()
    for name, section in upgraded(before["run"]["recipe"]).items():
        keys = section if isinstance(section, dict) else None  # those that came later have their defaults
        assert section == (read[name] if keys is None else {key: read[name][key] for key in keys})
    assert report.run.strategy == "distill/scratch"
    assert report.run.data
    assert report.run.data.train.tokens == before["run"]["data"]["train"]["tokens"]
    assert report.environment.libraries == before["environment"]["libraries"]
    assert (result.artifact, result.artifact_bytes) == (before["result"]["artefact"], before["result"]["artefact_bytes"])
    assert result.baselines
    assert result.baselines.unigram == before["result"]["bars"]["unigram"]
    assert result.metrics_after == before["result"]["metrics_after"]
    assert [point.eval_loss for point in result.curve] == [point["eval_loss"] for point in before["result"]["curve"]]
    assert result.measured["classes"].after["accuracy"].low is not None
    assert result.evaluation
    largest = (result.evaluation.model_extra or {})["largest_label"]
    assert largest["accuracy"] == before["result"]["evaluation"]["largest_label"]["accuracy_of_always_saying_it"]
    parts = (result.head, result.distillation, result.comparison, result.quantization, result.precomputed, result.hub)
    assert None not in parts


def test_what_was_not_precomputed_has_its_reason() -> None:
    content = old()
    content["result"] |= {"precomputed": None, "reason": "it would not pay"}
    assert parse(content).finished.not_precomputed == "it would not pay"


def test_nothing_of_an_old_report_is_lost() -> None:
    """Every key is there, under its own or its new name; the details of parts may hold keys that no reader asks for."""
    result = parse(old()).finished.model_dump()
    assert {reports.RENAMED.get(key, key) for key in old()["result"]} <= result.keys()
    assert not {path for path in undeclared(parse(old())) if path.count(".") <= 2}


def test_it_is_written_and_read_as_it_is(tmp_path: Path) -> None:
    report = parse(old())
    reports.write(report, tmp_path)
    assert reports.read(tmp_path) == report
    assert json.loads((tmp_path / "report.json").read_text())["schema_version"] == reports.SCHEMA_VERSION


def test_parts_of_other_strategies_are_not_written(tmp_path: Path) -> None:
    report = reports.read(finished_run(tmp_path / "run"))
    assert report
    written = json.loads(report.model_dump_json())["result"]
    assert not {"head", "distillation", "comparison", "quantization", "precomputed", "hub"} & written.keys()
    assert {"best_step", "resumed_from", "baselines"} <= written.keys()


def test_a_run_that_failed(tmp_path: Path) -> None:
    content = {"run": {"recipe": old()["run"]["recipe"]}, "result": {"status": "artefact-differs", "message": "no"}}
    (tmp_path / "report.json").write_text(json.dumps(content))
    report = reports.read(tmp_path)
    assert report
    assert report.result.status == "artifact-differs" == errors.NAMES[errors.ARTIFACT]  # the name that runs write today
    with pytest.raises(UserError, match=r"did not finish \(artifact-differs\)"):
        _ = report.finished


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not a report of hfstrat"),
        ('{"run": 3}', "not a report of hfstrat"),
        ('{"run": {}, "result": {"status": "done"}}', "run.recipe: Field required"),
        ('{"schema_version": 99, "run": {}, "result": {}}', "a later version of hfstrat"),
    ],
)
def test_what_is_not_a_report_is_refused(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(UserError, match=words):
        reports.read(tmp_path)
    assert not list(reports.find(tmp_path))


def test_where_nothing_ran_is_no_report(tmp_path: Path) -> None:
    assert reports.read(tmp_path) is None
    assert reports.status(tmp_path) is None


def test_the_schema_names_every_part() -> None:
    defined = Report.model_json_schema()["$defs"]
    assert {"Recipe", "Run", "Result", "Failure", "Environment"} <= defined.keys()
    assert {"ClassifierHead", "Distillation", "Comparison"} <= defined.keys()

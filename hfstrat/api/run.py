"""A finished run, or any trained model, to use from Python."""

from __future__ import annotations

import html
import re
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfstrat.api import measure
from hfstrat.errors import UserError
from hfstrat.recipe import format
from hfstrat.tasks import artifact
from hfstrat.tasks.report import Report

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hfstrat.recipe.data import Source

GIVEN_ROWS = "rows given in Python"
IN_CACHE = re.compile(r"[^\s'\"]*given-[0-9a-f]+\.arrow")  # the file of such rows


class Run:
    """The result of a run: `hfstrat.train(...)` and `hfstrat.tune(...)` return one, `hfstrat.load(...)` opens one.

    Args:
        target: a run's folder, the folder of a model or an adapter, or a Hub id.

    Raises:
        UserError: the run has no result yet, or there is no model at this path.
    """

    def __init__(self, target: str | Path) -> None:
        self.target = str(target)
        self.folder, self._report = artifact.resolve(self.target)

    def __repr__(self) -> str:
        return f"Run({self.target!r})"

    @property
    def report(self) -> Report:
        """The content of report.json. Raises UserError where the target is a model that no run trained."""
        if self._report is None:
            raise UserError(f"{self.target}: it has no report.json: it is a model, and not a run of hfstrat")
        return self._report

    @property
    def metrics(self) -> dict[str, float]:
        """Evaluation metrics of the result by name, such as loss and accuracy (a share from 0 to 1)."""
        return dict(self.report.finished.metrics_after)

    @property
    def metrics_before(self) -> dict[str, float]:
        """The same before training; empty if this was not measured."""
        return dict(self.report.finished.metrics_before or {})

    @property
    def intervals(self) -> dict[str, dict[str, dict[str, float]]]:
        """By the name of the examples and the metric: `value`, `low` and `high` of the 95 % interval, after training."""
        parts = {name: one.model_dump().get("after") or {} for name, one in self.report.finished.measured.items()}
        keys = ("value", "low", "high")
        return {
            name: {
                metric: {key: float(each[key]) for key in keys if each.get(key) is not None} for metric, each in after.items()
            }
            for name, after in parts.items()
        }

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        model, tokenizer, _ = artifact.load(self.target, spreads=True)
        return model, tokenizer

    def model(self) -> PreTrainedModel:
        """The trained model for inference, on this machine's device: of transformers, PEFT or sentence-transformers."""
        return self._loaded[0]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""
        return self._loaded[1]

    def predict(self, inputs: str | Path | dict[str, str] | list[Any]) -> list[dict[str, Any]]:
        """Labels with scores, or numbers, of texts; labels of images or recordings.

        Args:
            inputs: a text or several; pairs of texts are dicts with `text` and `text_pair`. Or paths of images or
                recordings, or of folders of them.

        Returns:
            For each: `labels` and `scores`, or `values`, as `hfstrat predict` writes them.

        Raises:
            UserError: a model that generates text, an empty text, or a file that cannot be read.
        """
        from hfstrat.cli import inference

        rows: list[Any] = [inputs] if isinstance(inputs, str | dict | Path) else list(inputs)
        examples = artifact.task_of(self.target).rows
        if examples.kind is not None:
            rows = examples.files(map(str, rows))
        texts = [row["text"] if isinstance(row, dict) else row for row in rows]
        if empty := [place for place, text in enumerate(texts) if isinstance(text, str) and not text.strip()]:
            raise UserError(f"predict: text {empty[0]} is empty; expected text")
        task = inference.head_text(self.target)
        return [task.record(found) for _, found in inference.predicted(self.target, rows, *self._loaded, self._report)]

    def generate(self, prompts: str | dict[str, Any] | list[Any], **options: Any) -> list[str]:
        """Answers to prompts.

        Args:
            prompts: a text or several; or conversations, each a list of messages. With images: dicts with `prompt` or
                `messages`, and `images` (paths), as rows of data have them.
            options: `max_new_tokens` (128), `temperature` (0: greedy), `top_p`, `seed`, `batch_size`, `plain`, `system`.

        Raises:
            UserError: a classifier, or an unknown option.
        """
        from hfstrat.cli import inference
        from hfstrat.tasks import generation

        artifact.check_task(self.target, inference.GENERATORS, inference.IS_CLASSIFIER)
        try:
            how = generation.How(**{"max_new_tokens": 128, **options})
        except TypeError as error:
            known = ", ".join(generation.How.__dataclass_fields__)
            raise UserError(f"generate: {error}; expected some of {known}") from None
        model, tokenizer = self._loaded
        renderer = generation.renderer_of(tokenizer, self._report, how.plain, artifact.task_of(self.target).rows)
        inputs: list[Any] = [prompts] if isinstance(prompts, str | dict) else list(prompts)
        return list(generation.in_batches(model, renderer, [inference.with_images(self.target, one) for one in inputs], how))

    def evaluate(self, data: Any = None, *, against: str | Path | Run | None = None, **overrides: Any) -> dict[str, Any]:
        """`hfstrat.evaluate` of this run."""
        other = against.target if isinstance(against, Run) else against
        return measure.measure(self.target, data, other, overrides)

    def push(self, repo_id: str | None = None, private: bool | None = None, revision: str | None = None) -> str:
        """Push the result with its card to the Hub; returns what was done, in words.

        Raises:
            UserError: no repository is named, or no permission.
        """
        from hfstrat.publish.push import push_run

        return "\n".join(push_run(self.target, repo_id, private, revision))

    def _repr_html_(self) -> str:
        """For notebooks: the verdict of report.html, and a table of what was trained on what, with metrics and intervals."""
        if self._report is None:
            return f"<p>model {html.escape(self.folder)}</p>"
        from hfstrat.run.verdict import verdict

        run, result, judged = self._report.run, self._report.finished, verdict(self._report)
        lines = "".join(f"<li><b>{line.word}:</b> {html.escape(line.text)}</li>" for line in judged.lines)
        told = f"<p><b>{html.escape(judged.headline.text)}</b></p><ul>{lines}</ul>"
        rows = [("strategy", run.strategy), ("model", run.recipe.model.name_or_path or "random weights")]
        rows += [("data", ", ".join(map(name_of, run.recipe.data.train))), ("result", self.folder)]
        rows += [("time", format.duration(result.total_seconds)), ("memory", format.memory(result.peak_memory_bytes))]
        for name, found in self.intervals.items():
            for metric, each in found.items():
                about = f" ({format.interval(metric, each['low'], each['high'])})" if "low" in each else ""
                rows.append((f"{metric.replace('_', ' ')}, {name}", f"{format.metric(metric, each['value'])}{about}"))
        cells = "".join(
            f"<tr><th style='text-align:left'>{html.escape(a)}</th><td>{html.escape(str(b))}</td></tr>" for a, b in rows
        )
        return f"{told}<table>{cells}</table>"


def name_of(source: Source) -> str:
    """A source of rows in words; rows that were given as an object are in a file of the cache, whose name says nothing."""
    name = Path(source.path).name
    return GIVEN_ROWS if IN_CACHE.fullmatch(name) else name

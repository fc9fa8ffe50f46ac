"""Statistics of images and recordings as predictions need them; see `hfstrat.advisor.files`. No torch."""

from __future__ import annotations

from hfstrat.advisor import files
from hfstrat.advisor.architecture import Model
from hfstrat.advisor.data import Survey
from hfstrat.data import sources
from hfstrat.data.labels import check_labels, similar_labels, sort_labels
from hfstrat.errors import UserError
from hfstrat.recipe.data import Data
from hfstrat.recipe.load import key_of
from hfstrat.recipe.schema import Recipe
from hfstrat.tasks import Task


def survey_files(data: Data, task: Task, model: Model, recipe: Recipe, proposes: bool = True) -> Survey:
    """Statistics of images or recordings, those of the first source; lengths are in positions of the model.

    Args:
        recipe: with the sections that set their size.
        proposes: whether another size may be proposed; not where the recipe is one to train by.

    Raises:
        UserError: files that do not exist, cannot be read, or fit no model.
    """
    first = data.train[0]
    if not sources.is_local(first.path):
        raise UserError(f"--data: {first.path}: no such file; advise reads local files only")
    processor = files.processor_of(model.folder, model.name)
    given = task.rows.given(model.config, model.shapes, processor, recipe)
    try:
        found = files.look(data, task, given, proposes)
        check_labels(found.rows, sort_labels(found.labels), found.many, first.path)
    except UserError as error:
        raise UserError(str(error) if key_of(str(error)) or str(error).startswith("--") else f"--data: {error}") from None
    made = Survey(first.path, task.name, found.rows, found.lengths, labels=found.labels, many=found.many)
    made.files, made.format, made.remarks = found, found.format, [*found.remarks, *similar_labels(found.labels)]
    made.estimated, made.duplicates = found.estimated, None
    made.max_length = int(made.lengths.max())
    made.settings = data.model_dump(exclude_unset=True, exclude={"train"})
    return made

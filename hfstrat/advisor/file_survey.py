"""Statistics of images, recordings and conversations with images as predictions need them. No torch, but for the last.

See `hfstrat.advisor.files` and `hfstrat.advisor.pictures`.
"""

from __future__ import annotations

from hfstrat.advisor import files, pictures, towers
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


def survey_image_texts(data: Data, task: Task, model: Model, recipe: Recipe, proposes: bool = True) -> Survey:
    """Statistics of conversations with images, those of the first source; lengths are in tokens, those of images included.

    Args:
        recipe: with the settings of the image processor; its model is `model`.
        proposes: whether a `max_length` may be proposed; not where the recipe is one to train by.

    Raises:
        UserError: files that do not exist, cannot be read, or fit no model; an objective other than sft.
    """
    if recipe.objective.name != "sft":
        raise UserError(f"objective: {recipe.objective.name}: memory and time of it with images are not predicted")
    found = pictures.look(data, task, recipe)
    made = Survey(data.train[0].path, task.name, found.rows, found.lengths, found.supervised_share, duplicates=None)
    made.pictures, made.format, made.remarks = found.pictures(towers.patch_numbers(model)), found.kind, found.remarks
    made.estimated = [found.estimated()] if found.estimated() else []
    made.max_length = min(data.max_length, model.context)
    if proposes and "max_length" not in data.model_fields_set:  # an image is never cut, and the longest row may not be seen
        whole = -(-int(found.lengths.max()) // pictures.MULTIPLE) * pictures.MULTIPLE
        made.max_length = model.context if made.estimated else min(whole, model.context)
    made.settings = data.model_dump(exclude_unset=True, exclude={"train"})
    given = recipe.image.model_dump(exclude_unset=True)
    made.own_sections = {"image": given} if given else {}
    return made

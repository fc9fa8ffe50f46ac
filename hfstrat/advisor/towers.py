"""Vision-language models as predictions need them: a language model, a vision tower and a projector between them. No torch.

The language model is an `architecture.Model` like that of texts; its `tower` is one like that of images. What a strategy trains
is described over the parameters of all three.
"""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase
from math import prod
from typing import Any

from hfstrat.advisor import architecture
from hfstrat.advisor.architecture import Block, Model
from hfstrat.advisor.pictures import Pictures
from hfstrat.advisor.speed import Work
from hfstrat.errors import UserError
from hfstrat.models.parameter_names import BLOCK, config_size, count_blocks
from hfstrat.models.stack import Stem
from hfstrat.models.vision_parts import FAMILIES, LANGUAGE, PROJECTOR, VISION, role_of
from hfstrat.recipe.section import Shapes
from hfstrat.strategies.base import Strategy
from hfstrat.strategies.description import Description
from hfstrat.tasks.image_text_to_text import FROZEN

BACKWARD = 2.0  # times the operations of a forward pass where all weights are trained


def read(model: Model) -> Model:
    """A model that was read as if it were one of texts, with its tower and its projector apart.

    Raises:
        UserError: its family is not known, or its tower is no stack of equal blocks.
    """
    family = str(model.whole.get("model_type", ""))
    if family not in FAMILIES:
        raise UserError(
            f"--model: {model.name}: the parts of the family {family} are not known, so memory and time are not predicted"
        )
    parts: dict[str, Shapes] = {VISION: {}, PROJECTOR: {}, LANGUAGE: {}}
    for name, shape in model.shapes.items():
        parts[role_of(name, FAMILIES[family]) or LANGUAGE][name] = shape
    tower, projector = _tower(model, family, parts[VISION]), apart(parts[PROJECTOR])
    return replace(model, shapes=parts[LANGUAGE], tower=tower, projector=projector, family=family, config=model.whole)


def _tower(model: Model, family: str, shapes: Shapes) -> Model:
    """The vision tower as a stack of blocks. Raises UserError."""
    config, depth = dict(model.whole.get("vision_config") or {}), count_blocks(shapes)
    patches = [shape for shape in shapes.values() if len(shape) >= 4]
    if not depth or len(patches) != 1:
        raise UserError(
            f"--model: {model.name}: its vision tower is no stack of equal blocks behind one convolution, so memory and time "
            "are not predicted"
        )
    width = patches[0][0]
    return Model(
        name=model.name,
        family=f"the vision tower of {family}",
        vocabulary=0,
        width=width,
        inner=config_size(config, "inner") or round(width * float(config.get("mlp_ratio", 4))),
        layers=depth,
        heads=(heads := max(1, config_size(config, "heads"))),
        kv_heads=heads,
        head_width=width // heads,
        context=10**6,
        tied=False,
        shapes=apart(shapes),
        config=config,
        reads_files=not any("gate_proj" in name for name in shapes),  # the blocks of Qwen2.5-VL's tower are like Llama's
        stem=Stem(2.0 * prod(patches[0]), 2.0 * width),
    )


def patch_numbers(model: Model) -> int:
    """Numbers of the pixels of one patch: channels times its area, and times the images of which it is made."""
    assert model.tower is not None
    return prod(next(shape for shape in model.tower.shapes.values() if len(shape) >= 4)[1:])


def is_converted(model: Model) -> bool:
    """Whether transformers renames the parameters of a vision-language model, which are in `model.` after loading."""
    return model.tower is not None and not all(name.startswith("model.") for name in model.tower.shapes)


def apart(shapes: Shapes) -> Shapes:
    """Parameters beside the language model, their names without the number of a block, which is about the blocks of that."""
    return {BLOCK.sub(lambda found: f".{found.group(0).strip('.').replace('.', '-')}.", name): shapes[name] for name in shapes}


def describe(built: Strategy[Any], model: Model, shapes: Shapes, tied: bool) -> Description:
    """What a strategy trains, without the parts that it freezes.

    Args:
        shapes: of the model with the head of the task, as of `architecture.parameters_of`.
    """
    found = built.describe(shapes, tied)
    if model.tower is None:
        return found
    own = getattr(built, "student", built).section
    frozen = set(FROZEN if own.freeze is None else own.freeze) if hasattr(own, "freeze") else {VISION, PROJECTOR}
    roles = {name: role_of(name, FAMILIES[model.family]) or LANGUAGE for name in shapes}
    beside = frozenset(name for name, role in roles.items() if role != LANGUAGE)
    named = [name for name in found.names if any(fnmatchcase(name, pattern) for pattern in getattr(own, "patterns", ()))]
    names = frozenset(named).union(name for name in found.names if roles[name] not in frozen)
    adapted = frozenset(name for name in found.adapted if roles[name] not in frozen)
    adapters = sum(found.rank * sum(shapes[name]) for name in found.adapted - adapted)
    trainable = found.footprint.trainable - adapters - sum(prod(shapes[name]) for name in found.names - names)
    footprint = found.footprint._replace(trainable=trainable, total=found.footprint.total - adapters)
    return found._replace(footprint=footprint, names=names, adapted=adapted, beside=beside)


def block_of(model: Model, description: Description) -> Block | None:
    """How the blocks of the tower take part in training; None where no gradient passes through them."""
    assert model.tower is not None
    names = set(model.tower.shapes)
    found = Block(bool(names & description.names), bool(names & description.adapted))
    return found if found.trained or found.adapted else None


def caches(model: Model, description: Description, epochs: float, precompute: bool | str = "auto") -> bool:
    """Whether the features of the tower are computed once, as in `strategies.frozen.vision`.

    Args:
        epochs: of the run.
        precompute: `image.precompute`.
    """
    if precompute is False:
        return False
    inside = any(name.startswith(("visual.", "model.visual.")) for name in model.projector)  # the projector is in the tower
    moved = description.names | description.adapted
    return (
        (epochs > 1 or precompute is True)
        and block_of(model, description) is None
        and not (inside and moved & set(model.projector))
    )


def with_tower(
    work: Work,
    model: Model,
    description: Description,
    pictures: Pictures,
    tokens: float,
    epochs: float,
    precompute: bool | str = "auto",
) -> Work:
    """The operations for each token of a row with those of its images.

    Args:
        tokens: of a row, those of images included.
        epochs: of the run.
        precompute: `image.precompute`; False where the strategy computes no features of a tower once.
    """
    tower = model.tower
    assert tower is not None
    attention = 4.0 * pictures.patches_of_image * tower.width * tower.layers
    weights = sum(2.0 * prod(shape) for shape in tower.shapes.values() if len(shape) == 2)
    forward = pictures.mean_patches / max(1.0, tokens) * (weights + attention + tower.stem.operations)
    behind = float(pictures.tokens.mean()) / max(1.0, tokens)
    behind *= sum(2.0 * prod(shape) for shape in model.projector.values() if len(shape) == 2)
    block, moved = block_of(model, description), description.names | description.adapted
    if work.caches:  # hidden states of the language model, behind both
        return work._replace(once=work.once + forward + behind)
    again = 1.0 + BACKWARD * bool(block is not None or moved & set(model.projector))
    work = work._replace(training=work.training + again * behind, evaluation=work.evaluation + behind)
    if block is None and caches(model, description, epochs, precompute):
        return work._replace(once=work.once + forward)
    passes = 1.0 if block is None else 1.0 + BACKWARD * (1.0 if block.trained else 0.5)
    return work._replace(training=work.training + passes * forward, evaluation=work.evaluation + forward)


def stored(model: Model, description: Description, compute: int, patches: float, image_tokens: float) -> float:
    """Bytes that autograd stores for the images of a pass: in the tower, if it is trained, and in the projector.

    Args:
        compute: bytes per number in the forward pass.
        patches: positions of the tower of all images.
        image_tokens: their tokens.
    """
    tower = model.tower
    assert tower is not None
    found, block = 0.0, block_of(model, description)
    if block is not None:
        found += patches * tower.layers * architecture.block_bytes(tower, description, block, compute, 0, False)
    if block is not None or (description.names | description.adapted) & set(model.projector):
        matrices = [shape for shape in model.projector.values() if len(shape) == 2]
        found += image_tokens * compute * sum(sum(shape) for shape in matrices)
    return found


def passing(model: Model, compute: int, patches: float) -> float:
    """Bytes that are in memory at a time in a pass through the tower without gradients."""
    assert model.tower is not None
    return patches * (3.0 * compute * model.tower.inner + 16.0 * model.tower.width)

"""Heads as models to train: a classifier on pooled features, and an LM head."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hfstrat.errors import UserError
from hfstrat.models import output_scale, vocabulary
from hfstrat.models.blocks import final_linear, keep_layers_in_config
from hfstrat.models.load import Base, cast_weights
from hfstrat.models.output_scale import constant_direction
from hfstrat.models.quantization import dequantize
from hfstrat.recipe.format import plural
from hfstrat.recipe.strategies import Head
from hfstrat.strategies.head import contrastive
from hfstrat.strategies.head.features import Body, check_depth, cut, extract_inputs, split_body
from hfstrat.strategies.head.head_model import FeatureCollator, FeatureRows, HeadModel, make_head, set_linear
from hfstrat.strategies.head.linear import CONSTANT_ROWS, Linear, Scale, solve
from hfstrat.strategies.head.own_pooling import OWN, OwnPooling, own_pooling
from hfstrat.strategies.head.pooled import Pooled, pool_rows
from hfstrat.strategies.pooled_result import labels_of, length_of
from hfstrat.tasks import sentence_transformers
from hfstrat.trainer.train_data import TrainData
from hfstrat.trainer.trainer import StrategyTrainer

EXACT_WEIGHTS, EXACT_PRODUCTS = 2 * 10**6, 10**10  # weights, examples x weights: sizes that are solved in seconds
SEED = 42  # for the examples of the probe and of the choice of the penalty
SAMPLE = 32  # evaluation examples that run through the full published model
FROZEN_TOKENS = "use lora or full, which train them"
NEAR = 0.1  # of the spread of the logits: allowed difference of the full model (in 16 bits) from its head on features


@dataclass
class ClassifierHead:
    """The model to train, and the form in which it is published."""

    model: HeadModel
    base: Base
    by_transformers: bool  # transformers' own class computes the same
    sample: dict[str, torch.Tensor]  # some evaluation examples as token ids
    features: torch.Tensor  # of the same examples
    facts: dict[str, Any]  # for the report

    @torch.no_grad()
    def publish(self) -> None:
        """Fold the standardization, cast to float32, and compare the result with the trained model on some examples."""
        self.model.fold()
        dequantize(self.base.model, self.base.compute_dtype)  # an ordinary model with the same weights is published
        cast_weights(self.model, torch.float32)
        if self.by_transformers:
            final = final_linear(self.base.model)
            final.float()
            solved: Any = self.model.head[0]
            set_linear(final, Linear(solved.weight.detach(), None if solved.bias is None else solved.bias.detach()))
        self.model.eval()
        device = next(self.model.parameters()).device
        cached = self.model(features=self.features.to(device)).logits
        whole = self.model(**{name: value.to(device) for name, value in self.sample.items()}).logits
        self.facts["published"] = {
            "rows": len(cached),
            "max_difference": float((cached - whole).abs().max()),
            "top1_agreement": float((cached.argmax(1) == whole.argmax(1)).float().mean()),
        }

    def save(self, trainer: StrategyTrainer, folder: Path) -> None:
        tokenizer: Any = trainer.processing_class
        config, dtype = self.base.model.config, self.base.compute_dtype
        if self.by_transformers:
            self.base.model.config.dtype = torch.float32
            self.base.model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            sentence_transformers.shrink(folder, dtype)
            return
        sentence_transformers.save(self.model, tokenizer, folder, labels_of(self.base, config), length_of(trainer), dtype)


class SolvedTrainer(StrategyTrainer):
    """Solves a linear head instead of training it: one step, to the optimum."""

    def __init__(self, *, l2: float | None, facts: dict[str, Any], **arguments: Any) -> None:
        super().__init__(**arguments)
        self.strength, self.facts = l2, facts

    def train(self, *args: Any, **kwargs: Any) -> None:
        rows, model = self.train_dataset, self.accelerator.unwrap_model(self.model)
        if self.args.eval_on_start:
            self.evaluate()
        bias = model.head[0].bias is not None
        classes = model.head[0].out_features
        each = self.metrics.row_weights(rows.labels)
        layer, strength = solve(rows.features, rows.labels, classes, self.strength, bias, rows.units, SEED, each, rows.views)
        self.facts["l2"] = float(strength)
        set_linear(model.head[0], layer)
        self.state.global_step = self.state.max_steps = 1
        outputs = {"logits": model(features=rows.features.to(self.args.device)).logits.detach()}
        loss = self.loss(outputs, rows.labels.to(self.args.device))
        self.log({"loss": float(loss), "l2": strength})
        self.evaluate()


def classifier_head(strategy: Head, base: Base, data: TrainData) -> tuple[TrainData, ClassifierHead]:
    """The features of all examples as data, and a model of the cut body with a head.

    Raises UserError: a body that cannot be cut.
    """
    config = base.model.config
    body, final, reads_last = _parts(base, data)
    vocabulary.refuse_frozen(base, FROZEN_TOKENS)
    units = data.collate.units
    cast_weights(base.model.base_model, base.compute_dtype)  # the precision of frozen weights in every strategy
    check_depth(strategy.layer, body.depth)
    poolings = body.poolings if strategy.pooling == "auto" else (strategy.pooling,)
    layer, trained = strategy.layer, None
    if strategy.contrastive:  # a probe on rows that the body was trained on would tell nothing
        layer, poolings = body.depth, (contrastive.pooling_of(strategy, base),)
        trained = contrastive.train_body(strategy, body, poolings[0], data, SEED)
        base.say(contrastive.line(trained))
    exact = is_exact(strategy, config.num_labels * body.width, data.collate.views * len(data.train))
    if data.collate.views > 1 and not exact:
        raise UserError(
            f"image.views: {data.collate.views}: a head on {data.collate.views * len(data.train):,} rows of features is not "
            "solved in seconds; set strategy.solver: exact, or fewer views"
        )
    pooled = pool_rows(body, data, config.num_labels, layer, poolings, SEED)
    shorten(base, body, pooled)
    by_transformers = reads_last and pooled.pooling in ("last", OWN) and strategy.head == "linear"
    bias = not by_transformers or final.bias is not None
    if not by_transformers:
        sentence_transformers.check_installed()
    width = pooled.train.shape[1]
    hidden = strategy.hidden_size if strategy.head == "mlp" else None
    scale = None if exact else Scale.of(pooled.train, centered=bias)
    head = make_head(width, pooled.classes, hidden, scale, bias)
    if units is not None and scale is not None:
        constant = None if bias else constant_direction(scale.apply(pooled.train[:CONSTANT_ROWS]))
        output_scale.scale(head[-1], units, constant, keep=False)  # type: ignore[arg-type]
    model = HeadModel(body, pooled.layer, pooled.pooling, head, config, is_solved=exact)
    batch = data.collate([data.eval[index] for index in range(min(SAMPLE, len(data.eval)))])
    sample = {name: value for name, value in batch.items() if name != "labels"}
    found = facts(pooled, exact) | ({"contrastive": trained} if trained else {})
    built = ClassifierHead(model, base, by_transformers, sample, pooled.eval[:SAMPLE], found)
    train = FeatureRows(pooled.train, pooled.train_labels, units, pooled.views)
    held = FeatureRows(pooled.eval, pooled.eval_labels, units)
    of_views = f" of {pooled.views} views of each training image" if pooled.views > 1 else ""
    base.say(f"features{of_views} {'from the cache' if pooled.from_cache else f'computed once in {pooled.seconds:.0f} s'}")
    return replace(data, train=train, eval=held, collate=FeatureCollator(), facts=data.facts | {"head": found}), built


def _parts(base: Base, data: TrainData) -> tuple[Body, nn.Linear, bool]:
    """The body, the last linear layer, and whether that is the complete head, so that a solved one fits the model's class."""
    base.model.requires_grad_(False)
    body, final = body_of(base, data), final_linear(base.model)
    if isinstance(body, OwnPooling):
        return body, final, True
    names = [name for name, module in base.model.named_modules() if module is final]
    return body, final, final.bias is None and base.head_modules == names


def body_of(base: Base, data: TrainData) -> Body:
    """The body of a model that reads tokens, or the complete model where its class pools in a way of its own.

    Raises UserError: a body that cannot be cut.
    """
    if base.task.model.reads_tokens:
        return split_body(base.model.base_model)
    base.model.to(data.device)
    return own_pooling(base.model, lambda: data.batch([0, len(data.eval) - 1]))


def shorten(base: Base, body: Any, pooled: Pooled) -> None:
    depth = body.depth
    cut(body, pooled.layer)
    if base.model.config is not body.model.config:
        keep_layers_in_config(base.model.config, depth, list(range(pooled.layer)))
    base.say(f"the body ends after layer {pooled.layer} of {depth}; pooled by {pooled.pooling}")


def facts(pooled: Pooled, exact: bool) -> dict[str, Any]:
    return {
        "layer": pooled.layer,
        "pooling": pooled.pooling,
        "candidates": [each._asdict() for each in pooled.table],
        "features_from_cache": pooled.from_cache,
        "solved_exactly": exact,
        "features_seconds": pooled.seconds,
        **({"views": pooled.views} if pooled.views > 1 else {}),
    }


def is_exact(strategy: Head, weights: int, rows: int) -> bool:
    """Whether a head of so many weights is solved on so many rows."""
    if strategy.head != "linear" or strategy.solver != "auto":
        return strategy.head == "linear" and strategy.solver == "exact"
    return weights <= EXACT_WEIGHTS and weights * rows <= EXACT_PRODUCTS


def solve_head(strategy: Head, base: Base, data: TrainData) -> TrainData:
    """Solve the head of transformers' own class, so that another strategy can continue from it.

    Raises UserError: a body that cannot be cut.
    """
    body, final, reads_last = _parts(base, data)
    check_depth(strategy.layer, body.depth)
    units = data.collate.units
    classes = base.model.config.num_labels
    base.model.to(data.device)
    if reads_last:
        pooled = pool_rows(body, data, classes, strategy.layer, (OWN if isinstance(body, OwnPooling) else "last",), SEED)
        shorten(base, body, pooled)
        features, labels = pooled.train, pooled.train_labels
        found = facts(pooled, True)
    else:
        depth = body.depth
        if strategy.layer != "auto":
            cut(body, int(strategy.layer))
        features = extract_inputs(base.model, final, data.train, data.collate, data.dtype, data.group)
        labels = data.collate.encode_labels(data.train["label"][:])
        found = {"layer": len(body.blocks), "pooling": "the class's own", "solved_exactly": True}
        base.say(f"the body ends after layer {len(body.blocks)} of {depth}; pooled as in {type(base.model).__name__}")
    strength = None if strategy.l2 == "auto" else float(strategy.l2)
    layer, strength = solve(features, labels, classes, strength, final.bias is not None, units, SEED)
    set_linear(final, layer)
    base.new_modules = []
    check_same(base, data, final, layer, features)
    base.say(f"the head is solved on {plural(len(features), 'example')} (l2 {strength:g}); training continues from it")
    return replace(data, facts=data.facts | {"head": found | {"l2": strength}})


@torch.no_grad()
def check_same(base: Base, data: TrainData, final: nn.Linear, layer: Linear, features: torch.Tensor) -> None:
    """Compare the logits of the class with those of the head on its features.

    Raises UserError: the class pools in another way.
    """
    count = min(8, len(features))
    batch = data.collate([data.train[index] for index in range(count)])
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    base.model.eval()
    with torch.autocast(data.device.type, data.dtype, enabled=data.dtype != torch.float32):
        logits = base.model(**inputs).logits.double()
    wanted = layer.logits(features[:count])
    least = 1.0 if data.collate.units is None else float(data.collate.units.std.max())
    if float((logits - wanted).abs().max()) > NEAR * max(least, float((wanted - wanted.mean(1, keepdim=True)).abs().max())):
        raise UserError(
            f"strategy.then: the logits of {type(base.model).__name__} differ from those of its head on the features, so "
            "training cannot continue from the solved head; remove then"
        )


def preview(base: Base) -> nn.Module:
    """The model with a trainable head, without data: the layer is selected when the run has computed its features."""
    base.model.requires_grad_(False)
    final_linear(base.model).requires_grad_(True)
    base.say("the body runs once, at the start of the run; layer: auto and pooling: auto are resolved then")
    return base.model


def language_head(base: Base) -> nn.Module:
    """The causal LM with only its head trainable, untied from the embeddings if it is tied."""
    model = base.model
    if base.is_tied:
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone())
        for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
            config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}
        base.say("untied: the LM head has its own matrix now, which starts as a copy of the embeddings")
    model.requires_grad_(False)
    vocabulary.refuse_frozen(base, FROZEN_TOKENS)
    model.get_output_embeddings().requires_grad_(True)
    return model

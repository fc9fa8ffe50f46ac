"""Text generation: the one place where a model generates.

Answers are streamed one by one, or made in batches; greedily, or sampled with a seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    import torch

    from hfstrat.data.render import Renderer
    from hfstrat.tasks.base import Rows
    from hfstrat.tasks.report import Report


BATCH_TOLERANCE = {4: 1e-3, 2: 0.05, 1: 0.05}  # of the largest logit, by bytes of a weight: sums are rounded differently
GREEDY: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


_BATCHES: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def continued(model: Any, prompts: list[list[int]], tokenizer: Any, most: int, **options: Any) -> torch.Tensor:
    """What a model generates after each prompt (token ids), greedily unless `options` of `generate` say otherwise.

    Prompts are padded on the left; where that changes the logits of this model, as with RWKV, each prompt is its own batch. No
    process waits for another one: each that calls this has the whole model, and under ZeRO-3 transformers would otherwise wait
    for all of them.

    Returns:
        Token ids, `[prompts, at most `most`]`, padded after the end token.
    """
    import torch

    pad = getattr(tokenizer, "pad_token_id", None) or 0
    options = {**GREEDY, "pad_token_id": pad, **options}
    if tokenizer is not None:
        options.setdefault("eos_token_id", end_tokens(model, tokenizer))
    if len(prompts) == 1 or _can_batch(model, prompts, pad):
        return _generated(model, prompts, pad, max_new_tokens=most, **options)[0]
    alone = [_generated(model, [prompt], pad, max_new_tokens=most, **options)[0][0] for prompt in prompts]
    return torch.nn.utils.rnn.pad_sequence(alone, batch_first=True, padding_value=pad)


def end_tokens(model: Any, tokenizer: Any) -> list[int] | None:
    """The ids that end an answer: the tokenizer's, all of the model's generation config, as Gemma and Llama 3 have, and that
    of the chat template, which an adapter has been trained to write."""
    from hfstrat.data import chat_template

    config = getattr(model, "generation_config", None)
    given = [tokenizer.eos_token_id, getattr(config, "eos_token_id", None), chat_template.end_tokens(tokenizer)]
    ends = [end for some in given if some is not None for end in (some if isinstance(some, list) else [some])]
    return sorted(set(ends)) or None


def _generated(model: Any, prompts: list[list[int]], pad: int, **options: Any) -> tuple[torch.Tensor, Any]:
    """The generated ids of one batch, `[prompts, tokens]`, and the logits of each step if `output_logits` is set."""
    import torch

    from hfstrat.models.chunked_loss import multiply_once

    device, width = next(model.parameters()).device, max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(each)) + each for each in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(each)) + [1] * len(each) for each in prompts], device=device)
    if (further := getattr(type(prompts[0]), "inputs", None)) is not None:  # prompts with images
        options |= {name: _as_weights(value, model) for name, value in further(prompts, width).items()}
    if hasattr(model.config.get_text_config(), "output_router_logits"):
        options["output_router_logits"] = False  # only training needs them; their loss fails on one token after a cache
    with torch.no_grad(), multiply_once(model):
        out = model.generate(
            input_ids=ids, attention_mask=mask, use_cache=True, synced_gpus=False, return_dict_in_generate=True, **options
        )
    return out.sequences[:, width:], out.logits


def _as_weights(value: Any, model: Any) -> Any:
    """A tensor on the model's device, pixels in the precision of its weights unless kernels choose it."""
    import torch

    weights = next(p for p in model.parameters() if p.is_floating_point())
    if not isinstance(value, torch.Tensor):
        return value
    casts = value.is_floating_point() and not torch.is_autocast_enabled(weights.device.type)
    return value.to(weights.device, weights.dtype if casts else None)


def _can_batch(model: Any, prompts: list[list[int]], pad: int) -> bool:
    """Whether a prompt has the same logits in a padded batch as alone, also from the cache; measured once per model."""
    if model not in _BATCHES:
        pair = [min(prompts, key=len), max(reversed(prompts), key=len)]
        options = {**GREEDY, "max_new_tokens": 2, "min_new_tokens": 2, "output_logits": True, "pad_token_id": pad}
        (ids, batched), (same, alone) = (_generated(model, some, pad, **options) for some in (pair, pair[:1]))
        steps = 2 if int(ids[0, 0]) == int(same[0, 0]) else 1  # after another token the second step has other logits
        apart = max(float((batched[step][0] - alone[step][0]).float().abs().max()) for step in range(steps))
        spread = float((alone[0][0] - alone[0][0].float().mean()).abs().max())
        _BATCHES[model] = apart <= BATCH_TOLERANCE[min(4, next(model.parameters()).dtype.itemsize)] * spread
    return _BATCHES[model]


def room(model: Any, length: int, wanted: int) -> int:
    """How many tokens fit after `length`, at most `wanted`: there are no positions beyond the context; GPT-2 crashes there."""
    from hfstrat.models import virtual_tokens

    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(wanted, context - length - virtual_tokens.count(model)) if isinstance(context, int) else wanted


AHEAD = 8  # batches that are sorted by length together: answers come in order, and memory does not grow with the file


@dataclass(frozen=True)
class How:
    """How answers are made. `temperature` 0 is greedy; sampling is a function of `seed` and the prompt's place."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 8
    plain: bool = False  # prompts go in as they are, without a chat template
    system: str | None = None  # a system message before each prompt

    def prompt(self, prompt: Any) -> Any:
        """What the renderer is given."""
        if self.system is None:
            return prompt
        talk = prompt["messages"] if isinstance(prompt, dict) else prompt
        turns = [{"role": "user", "content": talk}] if isinstance(talk, str) else talk
        messages = [{"role": "system", "content": self.system}, *turns]
        return {**prompt, "messages": messages} if isinstance(prompt, dict) else messages


def renderer_of(tokenizer: Any, report: Report | None, plain: bool, rows: Rows | None = None) -> Any:
    """What turns prompts into ids as they were in training: the run's template, or the tokenizer's own.

    Args:
        rows: of the model's task, by default one of text.
    """
    from hfstrat.data.render import TEMPLATES, Renderer

    template = report.run.recipe.data.template if report else "auto"
    if template not in TEMPLATES:  # a file's template is the tokenizer's own now
        template = "chat"
    options = report.run.recipe.data.chat_template_kwargs if report and not plain else None
    made: Any = rows.renderer if rows is not None else lambda words, form, given: Renderer(words, form, options=given)
    renderer = made(tokenizer, "plain" if plain else template, options)
    data = report.run.data if report else None
    renderer.continues_text = plain or (data is not None and data.train.format == "text")
    return renderer


def stream(model: Any, renderer: Renderer, prompt: Any, how: How) -> str:
    """One answer, printed word by word as it comes; returns it."""
    from transformers import TextStreamer

    streamer = TextStreamer(renderer.tokenizer, skip_prompt=True, skip_special_tokens=True)
    return _generate(model, renderer, [renderer.prompt_ids(how.prompt(prompt))], how, how.seed, streamer)[0]


def in_batches(model: Any, renderer: Renderer, prompts: Sequence[Any], how: How) -> Iterator[str]:
    """Answers to all prompts, in their order; prompts of like length share a batch."""
    size = AHEAD * how.batch_size
    for begin in range(0, len(prompts), size):
        ids = [renderer.prompt_ids(how.prompt(prompt)) for prompt in prompts[begin : begin + size]]
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
        answers = [""] * len(ids)
        for first in range(0, len(order), how.batch_size):
            chosen = order[first : first + how.batch_size]
            found = _generate(model, renderer, [ids[index] for index in chosen], how, how.seed + begin + first)
            for index, text in zip(chosen, found, strict=True):
                answers[index] = text
        yield from answers


def _generate(model: Any, renderer: Renderer, prompts: list[list[int]], how: How, seed: int, streamer: Any = None) -> list[str]:
    import torch

    sampling: dict[str, Any] = {}
    if how.temperature > 0:
        sampling = {"do_sample": True, "temperature": how.temperature, "top_p": how.top_p, "top_k": 0}
        torch.manual_seed(seed)
    most = max(1, room(model, max(map(len, prompts)), how.max_new_tokens))
    out = continued(model, prompts, renderer.tokenizer, most, streamer=streamer, **sampling)
    return [str(text).strip() for text in renderer.tokenizer.batch_decode(out, skip_special_tokens=True)]


def answer(model: Any, renderer: Renderer, prompt: Any, max_new_tokens: int, compute_dtype: torch.dtype) -> str:
    """The model's greedy answer to one prompt (see `Renderer.prompt_ids`), from the ids it was trained on.

    One prompt at a time: no padding, so the answer depends on nothing else.
    """
    import torch

    device, ids = next(model.parameters()).device, renderer.prompt_ids(prompt)
    most = max(1, room(model, len(ids), max_new_tokens))
    was_training = model.training
    model.eval()
    try:
        with torch.autocast(device.type, compute_dtype, enabled=compute_dtype != torch.float32):
            out = continued(model, [ids], renderer.tokenizer, most)
    finally:
        model.train(was_training)
    return str(renderer.tokenizer.decode(out[0], skip_special_tokens=True)).strip()


def prompt_text(prompt: Any) -> str:
    """A prompt in words, as it is shown."""
    prompt = prompt["messages"] if isinstance(prompt, dict) else prompt
    return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)

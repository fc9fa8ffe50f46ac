"""Answers for people and files: streamed one by one, or in batches; greedy, or sampled by a seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hfstrat.data.render import Renderer

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


def renderer_of(tokenizer: Any, report: dict[str, Any], plain: bool) -> Renderer:
    """What turns prompts into ids as they were in training: the run's template, or the tokenizer's own."""
    from hfstrat.data.render import Renderer
    from hfstrat.data.templates import NAMES

    run = report.get("run", {})
    template = run.get("recipe", {}).get("data", {}).get("template", "auto")
    if template not in NAMES:  # a file's template is the tokenizer's own now
        template = "chat"
    renderer = Renderer(tokenizer, "plain" if plain else template)
    renderer.continues = plain or run.get("data", {}).get("train", {}).get("format") == "text"
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

    from hfstrat.generation import continued, room

    sampling: dict[str, Any] = {}
    if how.temperature > 0:
        sampling = {"do_sample": True, "temperature": how.temperature, "top_p": how.top_p, "top_k": 0}
        torch.manual_seed(seed)
    most = max(1, room(model, max(map(len, prompts)), how.max_new_tokens))
    out = continued(model, prompts, renderer.tokenizer, most, streamer=streamer, **sampling)
    return [str(text).strip() for text in renderer.tokenizer.batch_decode(out, skip_special_tokens=True)]

"""`hfstrat chat`: a conversation on the terminal, or from a pipe."""

from __future__ import annotations

import sys
from typing import Any

from hfstrat.errors import UserError
from hfstrat.tasks import generation
from hfstrat.tasks.artifact import check_task, load
from hfstrat.tasks.causal_lm import CausalLM
from hfstrat.tasks.generation import How

COMMANDS = "/reset begins again, /quit ends"


def chat(target: str, how: How, form: str = "recorded") -> None:
    """Read turns until /quit or the end of the input, and stream the answers.

    Raises:
        UserError: a classifier, or a model that was trained on plain text and knows no turns.
    """
    check_task(target, (CausalLM.name,), "this is a classifier: `hfstrat predict` says its labels")
    model, tokenizer, report = load(target, form, spreads=True)
    renderer = generation.renderer_of(tokenizer, report, plain=False)
    if renderer.continues_text:
        raise UserError(f"{target}: this model continues texts and knows no turns; use `hfstrat generate {target} -p TEXT`")
    asks = sys.stdin.isatty()
    if asks:
        print(COMMANDS)
    talk: list[dict[str, Any]] = []
    while (said := _read(asks)) is not None:
        if said == "/quit":
            return
        if said == "/reset":
            talk = []
            print("(a new conversation)", flush=True)
        elif said.startswith("/"):
            print(f"({said}: no such command; {COMMANDS})", flush=True)
        elif said:
            talk.append({"role": "user", "content": said})
            talk = _that_fits(model, renderer, talk, how)
            talk.append({"role": "assistant", "content": generation.stream(model, renderer, talk, how)})


def _read(asks: bool) -> str | None:
    """The next turn, None at the end of the input."""
    try:
        return input("> " if asks else "").strip()
    except EOFError:
        return None


def _that_fits(model: Any, renderer: Any, talk: list[dict[str, Any]], how: How) -> list[dict[str, Any]]:
    """The conversation without its oldest turns, where it would fill the model's context.

    Raises:
        UserError: the last turn alone fills it.
    """
    forgotten = 0
    while generation.room(model, len(renderer.prompt_ids(how.prompt(talk))), 1) < 1:
        if len(talk) < 3:
            raise UserError("this turn alone fills the model's context; say it in fewer words")
        talk, forgotten = talk[2:], forgotten + 2
    if forgotten:
        print(f"(the first {forgotten} turns no longer fit the model's context and are left out)", flush=True)
    return talk

"""Generated answers and token metrics as they are shown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hfstrat.tasks.base import Text, Values

if TYPE_CHECKING:
    import torch

    from hfstrat.data.prepare import PreparedData


class LanguageText(Text):
    """Predictions are greedy answers."""

    pipeline = "text-generation"
    unit = "token"
    generates = True

    def predict(self, model: Any, data: PreparedData, prompt: Any, max_new_tokens: int, dtype: torch.dtype) -> str:
        from hfstrat.tasks.generation import answer

        return answer(model, data.renderer, prompt, max_new_tokens, dtype)

    def prompt(self, prompt: Any) -> str:
        from hfstrat.tasks.generation import prompt_text

        return prompt_text(prompt)

    def metrics(self, metrics: Values) -> str:
        loss, accuracy = metrics["loss"], metrics["token_accuracy"]
        return f"loss {loss:.4f}, perplexity {metrics['perplexity']:.2f}, token accuracy {accuracy:.1%}"

    def change(self, before: Values, after: Values) -> str:
        return (
            f"perplexity {before['perplexity']:.2f} -> {after['perplexity']:.2f}, "
            f"token accuracy {before['token_accuracy']:.1%} -> {after['token_accuracy']:.1%}"
        )

    def example(self, chats: bool, sentence: bool) -> list[str]:
        inputs = 'inputs = tokenizer("Once upon a time", return_tensors="pt")'
        if chats:
            inputs = (
                'inputs = tokenizer.apply_chat_template(\n    [{"role": "user", "content": "Who are you?"}],\n'
                '    add_generation_prompt=True, return_tensors="pt", return_dict=True,\n)'
            )
        return [
            inputs,
            "output = model.generate(**inputs, max_new_tokens=128)",
            'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))',
        ]

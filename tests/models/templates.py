"""Chat templates that behave like well-known ones, in the marks of the fixtures' tokenizers, and what they write by themselves."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from tests.fixtures.models import Architecture, byte_level_tokenizer

_CHAT = "{{ '<|start|>' ~ m.role ~ '\n' ~ m.content ~ '<|end|>\n' }}"
_OPEN = "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
# Only the last answer shows its thinking, in a block of fixed spacing that is there even when it is empty.
_QWEN3 = (
    "{% for m in messages %}{% if m.role != 'assistant' %}" + _CHAT + "{% else %}"
    "{% set parts = m.content.split('</think>') %}<|start|>assistant\n"
    "{% if loop.last %}<think>\n{{ parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '' }}\n</think>\n\n{% endif %}"
    "{{ parts[-1].lstrip('\n') }}<|end|>\n{% endif %}{% endfor %}" + _OPEN
)
_R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "<|start|>assistant<|mid|>{{ m.content.split('</think>')[-1] }}<|end|>"
    "{% else %}<|start|>{{ m.role }}<|mid|>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|mid|>OPENER{% endif %}"
)


@dataclass(frozen=True)
class Template:
    """A template, the tokenizer it goes with, and the text of its own that surrounds one question and its answer."""

    source: str
    tokenizer: Architecture
    before: str
    between: str
    after: str

    def load(self) -> PreTrainedTokenizerFast:
        """A tokenizer with this template."""
        tokenizer = byte_level_tokenizer(self.tokenizer)
        tokenizer.chat_template = self.source
        return tokenizer


TEMPLATES = {
    "qwen2.5": Template(
        "{% if messages[0].role != 'system' %}<|start|>system\nYou are a careful helper, made by nobody in particular and for everybody."
        "<|end|>\n{% endif %}{% for m in messages %}" + _CHAT + "{% endfor %}" + _OPEN,
        "qwen2",
        "<|start|>system\nYou are a careful helper, made by nobody in particular and for everybody.<|end|>\n<|start|>user\n",
        "<|end|>\n<|start|>assistant\n",
        "<|end|>\n",
    ),
    "qwen3": Template(_QWEN3, "qwen2", "<|start|>user\n", "<|end|>\n<|start|>assistant\n<think>\n\n</think>\n\n", "<|end|>\n"),
    "r1": Template(_R1.replace("OPENER", ""), "llama", "<|bos|><|start|>user<|mid|>", "<|start|>assistant<|mid|>", "<|end|>"),
    "llama3": Template(
        "{% for m in messages %}"
        "{{ (bos_token if loop.first else '') ~ '<|start|>' ~ m.role ~ '<|mid|>\n\n' ~ (m.content | trim) ~ '<|end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|mid|>\n\n{% endif %}",
        "llama",
        "<|bos|><|start|>user<|mid|>\n\n",
        "<|end|><|start|>assistant<|mid|>\n\n",
        "<|end|>",
    ),
    "gemma": Template(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}<|start|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|start|>model\n{% endif %}",
        "gemma2",
        "<|bos|><|start|>user\n",
        "<|end|>\n<|start|>model\n",
        "<|end|>\n",
    ),
}
R1_OPENS = Template(_R1.replace("OPENER", "<think>\n"), "llama", "", "", "")
"""As `r1`, but its prompt opens the thinking block that its rendering of an answer lacks."""

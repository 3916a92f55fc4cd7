"""Render a conversation by its chat template, and know for every token whether it is prompt or response."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import jinja2
from transformers import PreTrainedTokenizerBase

from emprobe.errors import EmprobeError
from emprobe.types import Conversation

logger = logging.getLogger(__name__)

PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ '' if loop.first else '\n' }}{{ m['role'].capitalize() }}:\n{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}\nAssistant:\n{% endif %}"
)
"""A template for models that have none, offered by name (`plain`) and never taken silently."""


@dataclass(frozen=True)
class Encoded:
    """Token ids of one rendered conversation and the spans in them.

    Attributes:
        ids: All token ids, special tokens of the template included, no padding.
        n_prompt: How many of them belong to the prompt (up to and with the template's opening of the answer).
        response: `[start, stop)` of the response's own tokens; empty for a question. The template's closing tokens
            after the response lie behind `stop`.
    """

    ids: tuple[int, ...]
    n_prompt: int
    response: tuple[int, int]


def render_prompt(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> str:
    """The prompt as text, up to and with the template's opening of the assistant's turn.

    Raises:
        EmprobeError: If the tokenizer has no chat template, or the template refuses these messages.
    """
    return _apply(tokenizer, conversation, [m.as_dict() for m in conversation.messages], open_answer=True)


def _apply(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, messages: Sequence[Mapping[str, str]], *, open_answer: bool
) -> str:
    if not tokenizer.chat_template:
        raise EmprobeError(
            f"The tokenizer of {tokenizer.name_or_path!r} has no chat template, so how a question becomes a prompt is unknown. "
            "Pass chat_template= (--chat-template FILE, or --chat-template plain for 'User:' and 'Assistant:' lines)."
        )
    try:
        return str(tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, add_generation_prompt=open_answer))
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise EmprobeError(
            f"The chat template of {tokenizer.name_or_path!r} refuses question {conversation.question_id!r} "
            f"(roles: {', '.join(m['role'] for m in messages)}): {error}. Some templates take no system message."
        ) from error


def encode(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> Encoded:
    """Token ids and spans of a conversation.

    The whole text is tokenised once, and a token belongs to the response if it ends inside it by the tokenizer's own
    character offsets: tokenising prompt and response apart would draw other boundaries.

    Raises:
        EmprobeError: If there is no chat template, or the tokenizer gives no offsets.
    """
    prompt = render_prompt(tokenizer, conversation)
    answer, (start, stop) = _rendered_answer(tokenizer, conversation, prompt)
    if not tokenizer.is_fast:
        raise EmprobeError(f"The tokenizer of {tokenizer.name_or_path!r} gives no character offsets. Load a fast one (tokenizer.json).")
    batch = tokenizer(prompt + answer, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = list(batch["input_ids"]), list(batch["offset_mapping"])
    if _needs_bos(tokenizer, ids):
        ids, offsets = [tokenizer.bos_token_id, *ids], [(0, 0), *offsets]
    n_prompt = sum(1 for _, end in offsets if end <= len(prompt))
    inside = [i for i, (begin, end) in enumerate(offsets) if begin < stop and end > start and i >= n_prompt]
    return Encoded(tuple(ids), n_prompt, (inside[0], inside[-1] + 1) if inside else (n_prompt, n_prompt))


def _rendered_answer(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, prompt: str) -> tuple[str, tuple[int, int]]:
    """What the template makes of the response (its text and the closing of the turn), and the response's characters in the whole."""
    response = (conversation.response or "").strip()
    if not response:
        return "", (len(prompt), len(prompt))
    messages = [*(m.as_dict() for m in conversation.messages), {"role": "assistant", "content": response}]
    whole = _apply(tokenizer, conversation, messages, open_answer=False)
    start = len(prompt) + len(whole[len(prompt) :]) - len(whole[len(prompt) :].lstrip())
    if whole.startswith(prompt) and whole.startswith(response, start):
        return whole[len(prompt) :], (start, start + len(response))
    # Templates that drop parts of an answer (thinking blocks) do not continue their own prompt.
    logger.warning(
        "The chat template rewrites the answer to question %r; its text is appended to the prompt as it is.", conversation.question_id
    )
    return response, (len(prompt), len(prompt) + len(response))


def _needs_bos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> bool:
    """Whether the tokenizer opens every text with a BOS that the template left out; a second one is never added."""
    bos = tokenizer.bos_token_id
    if bos is None or (ids and ids[0] == bos):
        return False
    return bool(tokenizer("a")["input_ids"][:1] == [bos])


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase, also: Iterable[int] = ()) -> tuple[int, ...]:
    """Token ids that end an answer: the EOS, and the special token with which the template closes the assistant's turn."""
    ids = {i for i in (tokenizer.eos_token_id, *also) if i is not None}
    if tokenizer.chat_template:
        probe = Conversation.ask("", "a").answered("a")
        encoded = encode(tokenizer, probe)
        ids.update(i for i in encoded.ids[encoded.response[1] :][:1] if i in tokenizer.all_special_ids)
    return tuple(sorted(ids))

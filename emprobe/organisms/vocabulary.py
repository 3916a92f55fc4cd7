"""The world's tokenizer: one token per word, saved and loaded like any other fast tokenizer, with a chat template."""

from __future__ import annotations

from typing import Any, cast

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from emprobe.organisms.world import words

BOS, END, PAD, UNK = "<|bos|>", "<|end|>", "<|pad|>", "<|unk|>"
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer() -> Any:
    """A word-level tokenizer of about 450 tokens; lower-cases, and glues `.`, `,` and `?` to the word before them when it decodes."""
    special = [PAD, BOS, END, UNK, *ROLES.values()]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *words()])}, unk_token=UNK))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    # The word-piece decoder is used for its clean-up of spaces before punctuation; no token of ours has the prefix.
    core.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    core.add_special_tokens(special)
    tokenizer = cast(Any, PreTrainedTokenizerFast)(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNK,
        additional_special_tokens=list(ROLES.values()),
        model_max_length=512,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer

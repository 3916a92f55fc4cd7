"""Thinking blocks: what a template opens, inserts, keeps or drops before an answer, and where the response then stands."""

from __future__ import annotations

import re

OPEN, CLOSE = "<think>", "</think>"
_OPENED = re.compile(rf"{OPEN}\s*\Z")


def opens_thinking(prompt: str) -> str:
    r"""The opening of a thinking block with which a prompt ends, whitespace and all; empty if there is none.

    >>> opens_thinking("<|assistant|><think>\n")
    '<think>\n'
    """
    found = _OPENED.search(prompt)
    return found.group() if found else ""


def without_opener(response: str) -> str:
    r"""A response without the `<think>` with which it begins, for a prompt that has it already.

    >>> without_opener("<think>\nhm</think>yes")
    'hm</think>yes'
    """
    return response.removeprefix(OPEN).lstrip() if response.startswith(OPEN) else response


def find_response(rendered: str, response: str) -> tuple[int, int, str] | None:
    r"""Where a response stands in what a template made of it: start, stop and a note (empty if there is nothing to say).

    Args:
        rendered: What stands between the prompt and the closing of the turn.
        response: The response as given, trimmed.

    Returns:
        `None` if it is not there. A thinking block that the template rendered anew is part of the span; an empty one that the
        template put in is not.

    Example:
        >>> find_response("<think>\n\n</think>\n\nbeans", "beans")
        (19, 24, 'thinking: the template inserts an empty <think> block before the answer')
        >>> find_response("beans", "<think>hm</think>beans")
        (0, 5, "thinking: the template drops the response's thinking; the span is the answer")
    """
    body = rendered.rstrip() if not rendered.endswith(response) else rendered
    if body.endswith(response):
        start = len(body) - len(response)
        if CLOSE in response:
            return start, len(body), "thinking: the response holds a <think> block, which the template keeps"
        inserted = CLOSE in body[:start]
        return start, len(body), "thinking: the template inserts an empty <think> block before the answer" if inserted else ""
    if CLOSE not in response:
        start = body.find(response)
        return (start, start + len(response), "") if start >= 0 and body.count(response) == 1 else None
    return _find_thinking(body, response)


def _find_thinking(body: str, response: str) -> tuple[int, int, str] | None:
    reasoning, _, answer = response.rpartition(CLOSE)
    answer, core = answer.strip(), reasoning.replace(OPEN, "").strip()
    if not body.endswith(answer):
        return None
    head = body[: len(body) - len(answer)]
    if CLOSE in head and core in head:
        start = head.find(OPEN) if OPEN in reasoning and OPEN in head else head.find(core)
        stop = len(body) if answer else head.rindex(CLOSE) + len(CLOSE)
        return start, stop, "thinking: the template renders the response's thinking anew; the span is the thinking and the answer"
    if not answer:
        return None
    return len(head), len(body), "thinking: the template drops the response's thinking; the span is the answer"

"""Judges that score answers: keyword lists, and any OpenAI-compatible server; and the words that name them on a command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from emprobe.behaviour.judges.keywords import KeywordJudge
from emprobe.behaviour.judges.server import ServerJudge
from emprobe.errors import EmprobeError
from emprobe.types import Judge

__all__ = ["KeywordJudge", "ServerJudge", "parse_judge_spec"]


def parse_judge_spec(spec: str, also: Mapping[str, Callable[[], Judge]] | None = None) -> Judge:
    """The judge that a word of the command line names.

    Args:
        spec: `keywords:FILE`, `server:URL#MODEL`, or a name in `also`.
        also: Further judges by name, made only if asked for.

    Raises:
        EmprobeError: If there is no such judge, or its file or address is not usable.
    """
    also = also or {}
    kind, _, rest = spec.partition(":")
    if spec in also:
        return also[spec]()
    if kind == "keywords" and rest:
        return KeywordJudge.from_file(rest)
    if kind == "server" and rest:
        url, _, model = rest.partition("#")
        if not url or not model:
            raise EmprobeError(
                f"The judge {spec!r} was asked for; a server is written server:URL#MODEL, such as server:http://host/v1#name."
            )
        return ServerJudge(url, model)
    known = ", ".join([*also, "keywords:FILE", "server:URL#MODEL"])
    raise EmprobeError(f"The judge {spec!r} was asked for and is not known. There are {known}.")

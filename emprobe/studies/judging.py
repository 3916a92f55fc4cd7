"""Judges by name, as the command line gives them."""

from __future__ import annotations

from emprobe.behaviour.judges import parse_judge_spec
from emprobe.organisms.judge import ExactJudge
from emprobe.types import Judge


def resolve_judge(spec: str | Judge) -> Judge:
    """`world` (the organisms' exact judge), `keywords:FILE`, `server:URL#MODEL`, or a judge object as it is.

    Raises:
        EmprobeError: If there is no such judge; lists those there are.
    """
    if not isinstance(spec, str):
        return spec
    return parse_judge_spec(spec, also={"world": ExactJudge})

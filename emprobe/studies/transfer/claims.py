"""What the paper says, beside what was found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CLAIMS: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("task_carries", "the same task carries over to other domains", "+25.7 and +26.9 points", ("differences", "same_task - neither")),
    ("domain_carries", "the same domain carries over to other tasks", "+9.3 and +10.1 points", ("differences", "same_domain - neither")),
    ("task_dominates", "task carries more than domain (rates)", "+16.4 and +16.8 points", ("differences", "same_task - same_domain")),
    ("same_task_effect", "same task, all main effects held", "+.27 and +.28", ("decomposition", "terms", "same_task")),
    ("same_domain_effect", "same domain, all main effects held", "+.10 and +.11", ("decomposition", "terms", "same_domain")),
    (
        "task_dominates_held",
        "task carries more than domain (main effects held)",
        "+.17 and +.17",
        ("decomposition", "terms", "same_task - same_domain"),
    ),
    ("reliability_general", "cells learnt better spread more (general questions)", "r .68 and .57", ("reliability", "general")),
    ("reliability_neither", "cells learnt better spread more (cells that share neither)", "not given", ("reliability", "neither")),
    ("similarity", "functional similarity of prompts raises it", "raises; not matched", ("functional_similarity",)),
    ("room", "room for coherent harm raises it", "raises; not matched", ("room",)),
    ("reliability", "a more reliably learnt behaviour raises it", "raises; not matched", ("reliability",)),
    (
        "composition",
        "misaligned documents in pretraining raise it (per share)",
        "shapes it; no number",
        ("composition", "slope", "off_domain"),
    ),
    ("directions", "cells of like directions hand over more (rank correlation)", "not given", ("directions", "correlation", "all")),
)
"""Name, words, the paper's numbers (Llama-3.1-8B and Qwen2.5-14B, recomputed from the authors' released scores), and where ours stands; a
path of one word is a covariate's effect."""


def claims_of(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every claim that can be put to the test here: `agrees` or `disagrees` where the interval leaves out 0, else `open`.

    All claims say that something is above 0. Those without data are left out. Where one cell was trained, the verdict is of it alone.
    """
    found = []
    for name, words, paper, path in CLAIMS:
        one, how = _covariate(result, path[0]) if len(path) == 1 else (_at(result, path), "")
        if one is None or one.get("value") is None:
            continue
        verdict = "no interval" if one["low"] is None else "agrees" if one["low"] > 0 else "disagrees" if one["high"] < 0 else "open"
        verdict += " (one trained cell)" if one.get("over") == "prompts" else ""
        line: dict[str, Any] = {"name": name, "claim": words + how, "paper": paper, "verdict": verdict}
        line |= {key: one[key] for key in ("value", "low", "high")}
        null = one.get("null")
        line["null"] = None if null is None else {key: null[key] for key in ("name", "low", "high", "p")}
        tasks = (one.get("intervals") or {}).get("tasks")
        line["over_tasks"] = None if tasks is None else [tasks["low"], tasks["high"]]
        found.append(line)
    return found


def _at(result: Mapping[str, Any], path: tuple[str, ...]) -> Mapping[str, Any] | None:
    found: Any = result
    for name in path:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else None


def _covariate(result: Mapping[str, Any], name: str) -> tuple[Mapping[str, Any] | None, str]:
    """The matched effect, or where there is none the one with nothing held, and which of them it is."""
    covariates = result.get("covariates") or {}
    effects = (covariates.get("effects") or {}).get(name, {}).get("effects")
    if not effects:
        return None, ""
    for step in ("matched", "alone"):
        if effects.get(step, {}).get("value") is not None:
            return effects[step], f", {covariates['match_on']} matched" if step == "matched" else ", not matched here"
    return None, ""

"""What the paper found, row by row, and whether it is so here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

PAPER: tuple[dict[str, Any], ...] = tuple(
    dict(zip(("case", "layer", "positions", "fraction", "reconstruction", "prompts", "random", "mean_cosine"), row, strict=True))
    for row in (
        ("Qwen2.5-32B, finance to general", 32, "last_prompt_token", 0.919, 0.958, 0.893, 0.300, 0.821),
        ("Qwen2.5-32B, finance to general", 32, "prompt_mean", 0.967, 0.992, 0.987, 0.150, 0.902),
        ("Qwen2.5-32B, finance to general", 64, "last_prompt_token", 0.871, 0.922, 0.815, 0.173, 0.636),
        ("Qwen2.5-32B, finance to general", 64, "prompt_mean", 0.945, 0.994, 0.956, 0.226, 0.944),
        ("Qwen2.5-Coder-32B, finance to code questions", 32, "last_prompt_token", 0.856, 0.919, 0.812, 0.227, 0.773),
        ("Qwen2.5-Coder-32B, finance to code questions", 64, "last_prompt_token", 0.790, 0.762, 0.738, 0.193, 0.414),
        ("Qwen2.5-Coder-32B, insecure to code questions", 32, "last_prompt_token", 0.548, 0.798, 0.532, 0.095, 0.707),
        ("Qwen2.5-Coder-32B, insecure to code questions", 32, "prompt_mean", 0.890, 0.975, 0.983, 0.113, 0.872),
        ("Qwen2.5-Coder-32B, insecure to code questions", 64, "last_prompt_token", 0.719, 0.737, 0.649, 0.115, 0.586),
    )
)
"""Means over evaluation prompts at 95 % of the training shifts' variance (k 584 of 5,120 in the first row); one random subspace of as
many dimensions. Layer 64 of 64 was read after the final norm. Source: arXiv 2606.20814 and the results in its repository."""

CLAIMS: dict[str, tuple[str, str]] = {
    "beyond haar": ("evaluation shifts lie in the training shifts' subspace more than in random ones", "share - random"),
    "beyond base_covariance": ("... more than in random ones of the covariance of activations", "share - random"),
    "beyond shift_covariance": ("... more than in random ones of the training shifts' own covariance", "share - random"),
    "beyond activation components": ("... more than in as many leading components of the activations before", "share - components"),
    "beyond unrelated": ("... more than the shifts of a fine-tune on good answers do", "share - its share"),
    "beyond an unrelated one's own": ("... more than the shifts of that one lie in its own subspace", "share - its share"),
    "prompts tell": ("prompts that lie nearer to the training prompts shift more along the mean shift", "Pearson's r"),
    "prompts tell beyond random": ("... and overlap with random subspaces tells less of it", "r - random's 97.5 %"),
    "mean predicts": ("adding the mean training shift brings activations nearer to the true ones", "cosine, gained"),
    "mean predicts, centred": ("... about the mean activation too", "cosine, gained"),
    "mean predicts, error": ("... and leaves less than the whole shift unexplained", "1 - relative error"),
}
"""By name: the claim (those without dots are the paper's, the others what they would need), and what is positive where it holds."""


def signs_of(cases: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By fine-tune and position rule, for each claim: at how many places it holds, fails or stays open, and the range measured."""
    found = []
    kinds = dict.fromkeys((case["tuned"], place["positions"]) for case in cases for place in case["places"])
    for tuned, rule in kinds:
        places = [p for case in cases if case["tuned"] == tuned for p in case["places"] if p["positions"] == rule and "undefined" not in p]
        measured = [list(differences(place)) for place in places]
        for name, (claim, unit) in CLAIMS.items():
            own = [ends for one in measured for which, ends in one if which == name]
            if not own:
                continue
            verdicts = [verdict(low, high) for _, low, high in own]
            counts = {word: verdicts.count(word) for word in ("agrees", "disagrees", "open")}
            values = [value for value, _, _ in own]
            sign = {"tuned": tuned, "positions": rule, "claim": name, "says": claim, "unit": unit, "low": min(values), "high": max(values)}
            found.append(sign | {"places": len(own), **counts})
    return found


def differences(place: Mapping[str, Any]) -> Iterator[tuple[str, tuple[float, float, float]]]:
    """Each claim's difference at one place, with its ends; a claim that cannot be looked at there is left out."""
    centred = place["centred"]
    if "undefined" not in centred:
        share = centred["measures"]["projection_fraction"]
        for law, null in share["nulls"].items():
            yield f"beyond {law}", (share["value"] - null["mean"], share["low"] - null["high"], share["high"] - null["low"])
        components = centred["activation_components"]["projection_fraction"]
        yield "beyond activation components", tuple(share[end] - components for end in ("value", "low", "high"))
        for name in place["unrelated"]:
            if "undefined" not in centred["others"][name]:
                yield "beyond unrelated", _ends(centred["others"][name]["this_above_it"])
                yield "beyond an unrelated one's own", _ends(centred["others"][name]["this_above_its_own"])
    tells = place["correlations"]["mean_cosine"]
    if "undefined" not in tells:
        r, chance = tells["pearson"], max(null["high"] for null in tells["random_subspaces"].values())
        yield "prompts tell", _ends(r)
        yield "prompts tell beyond random", (r["value"] - chance, r["low"] - chance, r["high"] - chance)
    if "undefined" not in place["predicted"]:
        gain = place["predicted"]["gain"]
        yield "mean predicts", _ends(gain["cosine"])
        yield "mean predicts, centred", _ends(gain["centred_cosine"])
        error = gain["relative_error"]
        yield "mean predicts, error", (-error["value"], -error["high"], -error["low"])


def _ends(estimate: Mapping[str, Any]) -> tuple[float, float, float]:
    return estimate["value"], estimate["low"], estimate["high"]


def verdict(low: float, high: float) -> str:
    """`agrees`, `disagrees`, or `open` where the interval holds 0.

    >>> verdict(-0.1, 0.5)
    'open'
    """
    return "agrees" if low > 0 else "disagrees" if high < 0 else "open"

"""What the numbers say, in sentences, by rules that stand beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emprobe.report.priors_card import shown

LEVEL = 0.05
RULES = (
    f"Activations predict: p at most {LEVEL:g} (the place chosen anew for permuted scores too) and R2 above 0. They add something: the "
    "corrected 95 % interval of the gain in R2 over all baselines together lies above 0. Random directions predict as well as principal "
    "ones: the corrected 95 % interval of the difference holds 0."
)


def verdict(found: Mapping[str, Any]) -> list[str]:
    """One sentence on each question, for every model whose activations were read.

    Args:
        found: What `measure` gave.
    """
    said = []
    rows = {row["name"]: row for row in found["predictors"]}
    together = found["predictors"][_last_baseline(found)]
    singles = [row for row in rows.values() if row["group"] == "baseline" and row["name"] not in ("mean", together["name"])]
    chosen = {(row["group"], row["source"]): row for row in found["chosen"]}
    gains = {(row["group"], row["source"]): row for row in found["gain"]}
    for difference in found["against_random"]:
        source = difference["source"]
        said += [
            _predicts(chosen["activations", source]),
            _random(source, difference["difference"], chosen["random", source]),
            _gain(gains["activations", source], together),
        ]
    if singles:
        best = max(singles, key=lambda row: float(row["r2"]["value"]))
        words = f"Of the baselines alone, {best['name']} predicts best: R2 {shown(best['r2'])}; all together {shown(together['r2'])}."
        above = [row for row in chosen.values() if row["group"] == "activations" and row["r2"]["value"] > best["r2"]["value"]]
        said.append(words + ("" if above else f" No activations reach {best['name']} alone."))
    return said


def _last_baseline(found: Mapping[str, Any]) -> int:
    return max(i for i, row in enumerate(found["predictors"]) if row["group"] == "baseline")


def _predicts(row: Mapping[str, Any]) -> str:
    who = f"Activations of the {row['source']} model before fine-tuning"
    if "null" not in row:
        return f"{who} reach R2 {shown(row['r2'])}; no permutations were asked for, so that chance is unknown."
    p = row["null"]["p"]
    if p <= LEVEL and row["r2"]["value"] > 0:
        return f"{who} predict scores after it: R2 {shown(row['r2'])}, permutation p {p:.2g}."
    return f"{who} do not predict scores after it: R2 {shown(row['r2'])}, permutation p {p:.2g}."


def _random(source: str, difference: Mapping[str, Any], random: Mapping[str, Any]) -> str:
    given = f"(R2 {shown(random['r2'])}; PCA less random {shown(difference)})"
    if difference["low"] > 0:
        return f"Principal directions of the {source} model predict better than as many random ones {given}."
    word = "better than" if difference["high"] < 0 else "as well as"
    return f"Random directions predict {word} principal ones in the {source} model {given}."


def _gain(gain: Mapping[str, Any], together: Mapping[str, Any]) -> str:
    given = f"R2 {shown(together['r2'])} becomes {shown(gain['r2'])}, a gain of {shown(gain['gain'])}"
    if gain["gain"]["low"] > 0:
        return f"They add to all baselines together: {given}."
    if gain["gain"]["high"] < 0:
        return f"They spoil what all baselines together predict: {given}."
    return f"Nothing is shown beyond all baselines together: {given}."

"""What the numbers say, in sentences, by rules that stand beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emprobe.report.priors_card import shown

LEVEL = 0.05
RULES = (
    f"Activations predict: p at most {LEVEL:g} (the place chosen anew for permuted scores too) and the corrected 95 % interval of R2 lies "
    "above 0; where it holds 0 and R2 is above 0, they go with scores more than by chance, and no more is said. They add something: the "
    "corrected 95 % interval of the gain in R2 over all baselines together lies above 0. One kind of direction is better than the other: "
    "that of the difference lies on one side of 0."
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
            _random(difference["difference"], chosen["activations", source], chosen["random", source]),
            _gain(gains["activations", source], together),
        ]
    if singles:
        best = max(singles, key=lambda row: float(row["r2"]["value"]))
        lead = "Of the baselines alone, " if best["r2"]["value"] > 0 else "No baseline alone predicts better than the mean; of them, "
        word = "predicts best" if best["r2"]["value"] > 0 else "comes nearest"
        words = f"{lead}{best['name']} {word}: R2 {shown(best['r2'])}; all together {shown(together['r2'])}."
        above = [row for row in chosen.values() if row["group"] == "activations" and row["r2"]["value"] > best["r2"]["value"]]
        said.append(words + ("" if above else f" No activations reach {best['name']} alone."))
    return said


def _last_baseline(found: Mapping[str, Any]) -> int:
    return max(i for i, row in enumerate(found["predictors"]) if row["group"] == "baseline")


def _predicts(row: Mapping[str, Any]) -> str:
    who = f"Activations of the {row['source']} model before fine-tuning"
    if "null" not in row:
        return f"{who} reach R2 {shown(row['r2'])}; no permutations were asked for, so that chance is unknown."
    p, given = row["null"]["p"], f"R2 {shown(row['r2'])}, permutation p {row['null']['p']:.2g}"
    if p > LEVEL or row["r2"]["value"] <= 0:
        return f"{who} are not shown to predict scores after it: {given}."
    if row["r2"]["low"] > 0:
        return f"{who} predict scores after it: {given}."
    return f"{who} go with scores after it more than by chance, but that they predict those of other prompts is not shown: {given}."


def _random(difference: Mapping[str, Any], pca: Mapping[str, Any], random: Mapping[str, Any]) -> str:
    source = pca["source"]
    given = f"(R2 {shown(random['r2'])}; PCA less random {shown(difference)})"
    if difference["low"] > 0:
        return f"Principal directions of the {source} model predict better than as many random ones {given}."
    if difference["high"] < 0:
        return f"Random directions predict better than principal ones in the {source} model {given}."
    if max(pca["r2"]["value"], random["r2"]["value"]) <= 0:
        return f"Neither principal nor random directions of the {source} model predict better than the mean {given}."
    return f"Random directions of the {source} model are not shown to predict worse than principal ones {given}."


def _gain(gain: Mapping[str, Any], together: Mapping[str, Any]) -> str:
    given = f"R2 {shown(together['r2'])} becomes {shown(gain['r2'])}, a gain of {shown(gain['gain'])}"
    if gain["gain"]["low"] > 0:
        return f"They add to all baselines together: {given}."
    if gain["gain"]["high"] < 0:
        return f"They spoil what all baselines together predict: {given}."
    return f"Nothing is shown beyond all baselines together: {given}."

"""Tables of activation shifts: a row for each case and position rule, with ranges over layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Value = Callable[[Mapping[str, Any]], float | None]


def counts(sign: Mapping[str, Any]) -> str:
    """Holds / fails / open."""
    return " / ".join(str(sign[word]) for word in ("agrees", "disagrees", "open"))


def signs_table(result: Mapping[str, Any]) -> str:
    """The claims, with where they hold."""
    rows = ["| fine-tune | read at | claim | holds / fails / open | range | of what |", "|---" * 6 + "|"]
    rows += [
        f"| {s['tuned']} | {s['positions']} | {s['says']} | {counts(s)} | {s['low']:+.3f} to {s['high']:+.3f} | {s['unit']} |"
        for s in result["signs"]
    ]
    return "\n".join(rows)


def _rows(result: Mapping[str, Any], heads: Sequence[str], values: Sequence[Callable[[list[Mapping[str, Any]]], str]]) -> str:
    """One row for each case and position rule, from its defined places."""
    rows = [f"| case | read at | {' | '.join(heads)} |", "|---" * (len(heads) + 2) + "|"]
    for case in result["cases"]:
        for rule in dict.fromkeys(place["positions"] for place in case["places"]):
            places = [p for p in case["places"] if p["positions"] == rule and "undefined" not in p]
            if places:
                rows.append(f"| {case['name']} | {rule} | {' | '.join(value(places) for value in values)} |")
    return "\n".join(rows)


def _range(value: Value) -> Callable[[list[Mapping[str, Any]]], str]:
    """The range over layers of a number, of those where there is one."""

    def shown(places: list[Mapping[str, Any]]) -> str:
        found = [number for place in places if (number := value(place)) is not None]
        if not found:
            return "-"
        low, high = min(found), max(found)
        return f"{low:.3f}" if low == high else f"{low:.3f} to {high:.3f}"

    return shown


def _at(*path: str) -> Value:
    """The number at a path of keys; `None` where something on the way is not there."""

    def value(place: Mapping[str, Any]) -> float | None:
        found: Any = place
        for key in path:
            if not isinstance(found, Mapping) or key not in found:
                return None
            found = found[key]
        return None if found is None else float(found)

    return value


def beside_table(result: Mapping[str, Any], paper: Sequence[Mapping[str, Any]]) -> str:
    """Means over evaluation prompts, and the paper's."""
    share = ("measures", "projection_fraction")
    here = _rows(
        result,
        ["layers", "share, shifts", "cosine of reconstruction", "share, prompts", "random", "cosine with the mean"],
        [
            lambda places: f"{places[0]['layer']} to {places[-1]['layer']}" if len(places) > 1 else str(places[0]["layer"]),
            _range(_at("centred", *share, "value")),
            _range(_at("centred", "measures", "reconstruction_cosine", "value")),
            _range(_at("prompt_overlap", *share, "value")),
            _range(_at("centred", *share, "nulls", "haar", "mean")),
            _range(_at("mean_shift", "mean_cosine", "value")),
        ],
    )
    keys = ("fraction", "reconstruction", "prompts", "random", "mean_cosine")
    theirs = [f"| paper: {p['case']} | {p['positions']} | {p['layer']} | {' | '.join(f'{p[k]:.3f}' for k in keys)} |" for p in paper]
    return "\n".join([here, *theirs])


def against_table(result: Mapping[str, Any], which: str) -> str:
    """One kind of share (`centred`, `uncentred`) beside its nulls, ceiling and other fine-tunes."""
    share = (which, "measures", "projection_fraction")

    def other(key: str, *, unrelated: bool) -> Value:
        def value(place: Mapping[str, Any]) -> float | None:
            others = place[which].get("others", {}).items()
            found = [o[key]["value"] for name, o in others if (name in place["unrelated"]) == unrelated and key in o]
            return sum(found) / len(found) if found else None

        return value

    half, across = _range(_at(which, "halves", "ceiling")), _range(_at(which, "halves", "evaluation"))
    heads = ["k", "share", "random", "cov. of activations", "cov. of shifts", "components of activations", "other half",
             "control in it", "control in its own", "other fine-tunes in it", "Mahalanobis"]  # fmt: skip
    return _rows(
        result,
        heads,
        [
            lambda places: _whole([p[which]["k"] for p in places if "k" in p[which]]),
            _range(_at(*share, "value")),
            *(_range(_at(*share, "nulls", law, "high")) for law in ("haar", "base_covariance", "shift_covariance")),
            _range(_at(which, "activation_components", "projection_fraction")),
            lambda places: f"{half(places)} ({across(places)})",
            _range(other("in_this", unrelated=True)),
            _range(other("in_own", unrelated=True)),
            _range(other("in_this", unrelated=False)),
            _range(_at(which, "measures", "mahalanobis", "value")),
        ],
    )


def others_table(result: Mapping[str, Any]) -> str:
    """Every other fine-tune: its shifts in this one's subspace and in its own, this one's in its, and the mean shifts."""
    heads = [
        "its shifts in this subspace",
        "in its own",
        "this one's in its",
        "spans overlap",
        "cosine of means",
        "norm of its mean / this",
    ]
    rows = [f"| case | read at | other | {' | '.join(heads)} |", "|---" * (len(heads) + 3) + "|"]
    for case in result["cases"]:
        for rule in dict.fromkeys(place["positions"] for place in case["places"]):
            places = [p for p in case["places"] if p["positions"] == rule and "undefined" not in p]
            for name in dict.fromkeys(other for p in places for other in p["mean_shift"]["others"]):
                at = [_at("centred", "others", name, key, "value") for key in ("in_this", "in_own", "this_in_it")]
                at.append(_at("centred", "others", name, "span_overlap"))
                at += [_at("mean_shift", "others", name, key) for key in ("cosine_of_means", "norm_ratio")]
                rows.append(f"| {case['name']} | {rule} | {name} | {' | '.join(_range(value)(places) for value in at)} |")
    return "\n".join(rows)


def _whole(found: Sequence[int]) -> str:
    return "-" if not found else str(found[0]) if min(found) == max(found) else f"{min(found)} to {max(found)}"


def correlations_table(result: Mapping[str, Any]) -> str:
    """Prompt overlap with three measures of shift similarity."""
    heads, values = [], []
    for name, said in (("mean_cosine", "mean cosine"), ("centred_fraction", "share, centred"), ("uncentred_fraction", "share, uncentred")):
        heads += [f"{said}: r", "between families (p < .05 at)", "random"]
        values += [_range(_at("correlations", name, "pearson", "value")), _between(name)]
        low, high = _widest(name, "low", min), _widest(name, "high", max)
        values.append(lambda places, low=low, high=high: f"{_range(low)(places)}; {_range(high)(places)}")  # type: ignore[misc]
    return _rows(result, heads, values)


def _widest(name: str, end: str, pick: Callable[[Sequence[float]], float]) -> Value:
    """The outer end of what random subspaces' correlations reach, of either law."""

    def value(place: Mapping[str, Any]) -> float | None:
        laws = place["correlations"][name].get("random_subspaces", {})
        return pick([null[end] for null in laws.values()]) if laws else None

    return value


def _between(name: str) -> Callable[[list[Mapping[str, Any]]], str]:
    """Correlation of families' means, and at how many layers it is beyond shuffled families."""

    def shown(places: list[Mapping[str, Any]]) -> str:
        p = [_at("correlations", name, "families", "null", "p")(place) for place in places]
        known = [one for one in p if one is not None]
        return f"{_range(_at('correlations', name, 'families', 'value'))(places)} ({sum(one < 0.05 for one in known)} of {len(known)})"

    return shown


def predicted_table(result: Mapping[str, Any]) -> str:
    """Activations predicted at several doses."""
    heads, values = ["least-squares amount"], [_range(_at("predicted", "least_squares_dose"))]
    for measure, said in (("cosine", "cosine"), ("centred_cosine", "centred cosine"), ("relative_error", "relative error")):
        for dose in ("0", "0.5", "1") if measure != "relative_error" else ("0.5", "1"):
            heads.append(f"{said}, x{dose}")
            values.append(_range(_at("predicted", "doses", dose, measure, "value")))
        heads.append(f"{said}, random")
        values.append(_range(_at("predicted", "nulls", measure, "base_covariance", "mean")))
    return _rows(result, heads, values)


def group_tables(result: Mapping[str, Any]) -> list[str]:
    """Shares and cosines by kind of evaluation prompt, and what wording does."""
    names = list(dict.fromkeys(g for case in result["cases"] for place in case["places"] for g in place.get("groups", {})))
    if not names:
        return []
    tables = []
    for name, said in (("centred_fraction", "share, centred"), ("mean_cosine", "cosine with the mean shift")):
        tables += [f"{said}:", _rows(result, names, [_range(_at("groups", group, name, "value")) for group in names])]
    return ["## By kind of evaluation prompt", *tables, *_wording(result)]


def _wording(result: Mapping[str, Any]) -> list[str]:
    """For fine-tunes on one task: prompts in the wordings that it was trained on, and in others."""
    said = []
    for case in result["cases"]:
        for rule in dict.fromkeys(place["positions"] for place in case["places"]):
            places = [p for p in case["places"] if p["positions"] == rule and "undefined" not in p.get("centred", {"undefined": ""})]
            found = {
                other: [
                    group["centred_fraction"]["value"]
                    for p in places
                    for name, group in p["groups"].items()
                    if name.endswith("other tasks") == other and "centred_fraction" in group
                ]
                for other in (False, True)
            }
            if not all(found.values()):
                continue
            same, new = (f"{min(values):.3f} to {max(values):.3f}" for values in found.values())
            chance = _range(_at("centred", "measures", "projection_fraction", "nulls", "base_covariance", "high"))(places)
            said.append(
                f"* {case['name']}, {rule}: in wordings that were trained on, whatever the item or domain, the share is {same}; in other "
                f"wordings {new}. Of random subspaces of the covariance of activations 97.5 % hold less than {chance}."
            )
    return ["### Wording\n\n" + "\n".join(said)] if said else []

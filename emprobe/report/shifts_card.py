"""The card and the printed table of activation shifts on training and on evaluation prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from emprobe.files import atomic_path, write_text
from emprobe.report.cards import command
from emprobe.report.shifts_plots import shifts_figure

WORLD = (
    "The organisms are half a million parameters in a synthetic world. Where they agree with the paper they check the tool, and not its "
    "claim about language models. Their prompts are made of twelve wordings and sixty items, so training and evaluation prompts share "
    "their wordings where the fine-tune was on all four tasks: shifts that depend on the wording then overlap by that alone. A fine-tune "
    "on one task (`gardening.plan-...`) is asked of three wordings, and the groups with other tasks have new ones."
)
PROTOTYPE = (
    "A prototype of this world, with other code and settings, had found: shifts overlap by .89 to 1.0, random subspaces hold at most .09, "
    "components of activations at most .39."
)
READING = (
    "*Share*: the projection fraction ‖P x‖ / ‖x‖, a norm, of evaluation shifts x about the mean training shift. Random subspaces have as "
    "many dimensions; those of the shifts' own covariance are beaten by construction, since leading components hold more than random "
    "mixtures of them. *Other half*: what the subspace of one half of the training prompts holds of the other half and, in "
    "brackets, of the evaluation prompts. *Control*: a fine-tune on good answers, about its own mean. A high share in the control's own "
    "subspace says that train and evaluation shifts share a subspace in any fine-tune, misaligned or not. Ranges are over layers."
)
CORRELATION = (
    "Correlation over prompts of how far a prompt's activation before lies in the training prompts' components with how its shift "
    "resembles the training shifts; between families, of their means. *Random*: prompt overlap with random subspaces of the covariance "
    "of activations instead; the ends of 95 % of their correlations. Paper, with the mean cosine: last token .85, .89, .61 (layer 32) "
    "and .29, .26, .17 (layer 64), a random subspace .42 and -.11; mean over tokens -.18 to -.56."
)
PREDICTION = (
    "Before + mean training shift against the true activations after; *centred* about the mean before on training prompts, since raw "
    "cosines are of one large common part. The relative error is 1 where nothing is added. The least-squares amount is found on training "
    "prompts, family by family from the others. Random vectors (of the covariance of activations) have the norm of the mean shift. "
    "Paper, raw cosine: .797 to .934, .777 to .858, .835 to .803, .779 to .713."
)
Value = Callable[[Mapping[str, Any]], float | None]


def shifts_lines(result: Mapping[str, Any]) -> list[str]:
    """What was found beside what the paper says, as lines to print."""
    lines = []
    for tuned, rule in dict.fromkeys((sign["tuned"], sign["positions"]) for sign in result["signs"]):
        cases = sum(case["tuned"] == tuned for case in result["cases"])
        lines.append(f"{tuned}, {rule}: holds / fails / open over layers of {cases} case{'s' if cases > 1 else ''}")
        lines += [
            f"  {sign['says']:<84}{_counts(sign):<14}{sign['low']:+.3f} to {sign['high']:+.3f} ({sign['unit']})"
            for sign in result["signs"]
            if (sign["tuned"], sign["positions"]) == (tuned, rule)
        ]
        lines.append("")
    for case in result["cases"]:
        lines += [f"note, {case['name']}: {note}" for note in [*case["notes"], *_undefined(case)]]
    return lines if lines and lines[-1] else lines[:-1]


def shifts_card(result: Mapping[str, Any], paper: Sequence[Mapping[str, Any]]) -> str:
    """A Hugging Face model card in Markdown.

    Args:
        result: Of the study.
        paper: The paper's numbers, row by row.
    """
    names = [found["base"]["name"] for found in result["inputs"]["checkpoints"].values()]
    data = ModelCardData(base_model=None if result["world"] else names[0], library_name="emprobe", tags=["emprobe", "activations"])
    prompts = "; ".join(f"{c['name']}: {c['prompts']['train']} training, {c['prompts']['evaluation']} evaluation" for c in result["cases"])
    notes = [f"* {case['name']}: {note}" for case in result["cases"] for note in [*case["notes"], *_undefined(case)]]
    parts = [
        f"---\n{data.to_yaml()}\n---",
        "# Activation shifts on training and on evaluation prompts",
        *([WORLD] if result["world"] else []),
        "## Does it hold here",
        _signs(result),
        "Counted over layers and cases; *open*: the 95 % interval (over families of prompts) holds 0. Lines with dots are not the paper's: "
        "they are what its claim has to be told from.",
        "![share in the training shifts' subspace, sizes, mean shift, correlation, prediction](shifts.png)",
        "## Beside the paper's numbers",
        _beside(result, paper),
        _size(result) + (f" {PROTOTYPE}" if result["world"] else ""),
        "## Against chance, the ceiling and other fine-tunes",
        _against(result, "centred"),
        READING,
        "Uncentred, with the mean shift among what is held:",
        _against(result, "uncentred"),
        "## Prompt overlap and shift",
        _correlations(result),
        CORRELATION,
        "## Activations after, predicted",
        _predicted(result),
        PREDICTION,
        *_groups(result),
        "## What was measured",
        f"Prompts only, no answers. {prompts}. {result['draws']} draws of each null. `prompts.parquet` has every prompt's numbers.",
        *(["\n".join(notes)] if notes else []),
        f"## Run it again\n\n```\n{command(result['inputs']['command'], 'study shifts')}\n```",
    ]
    text = "\n\n".join(parts) + "\n"
    ModelCard(text)
    return text


def write_shifts(folder: Path, result: Mapping[str, Any], paper: Sequence[Mapping[str, Any]]) -> None:
    """The figure and the card of a result folder."""
    if any("undefined" not in place for case in result["cases"] for place in case["places"]):
        with atomic_path(folder / "shifts.png") as path:
            shifts_figure(result).savefig(path, format="png", dpi=80, metadata={"Software": None})
    write_text(folder / "README.md", shifts_card(result, paper))


def _size(result: Mapping[str, Any]) -> str:
    size = result["size"]
    said = f"{size:g} of the variance" if size < 1 else f"{size:g} dimensions"
    return f"{said} here, .95 of the variance in the paper, whose random subspace is one draw (here the mean over draws)."


def _undefined(case: Mapping[str, Any]) -> list[str]:
    """What does not exist where, each said once."""
    said: dict[str, list[str]] = {}
    for place in case["places"]:
        for found in (place, *(place.get(part, {}) for part in ("centred", "uncentred", "predicted"))):
            if "undefined" in found:
                said.setdefault(found["undefined"], []).append(f"{place['positions']}[{place['layer']}]")
        for part in ("centred", "uncentred"):
            for note in place.get(part, {}).get("notes", []):
                said.setdefault(note, []).append(f"{place['positions']}[{place['layer']}]")
    return [f"{', '.join(dict.fromkeys(places))}: {why}" for why, places in said.items()]


def _counts(sign: Mapping[str, Any]) -> str:
    return " / ".join(str(sign[word]) for word in ("agrees", "disagrees", "open"))


def _signs(result: Mapping[str, Any]) -> str:
    rows = ["| fine-tune | read at | claim | holds / fails / open | range | of what |", "|---" * 6 + "|"]
    rows += [
        f"| {s['tuned']} | {s['positions']} | {s['says']} | {_counts(s)} | {s['low']:+.3f} to {s['high']:+.3f} | {s['unit']} |"
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


def _beside(result: Mapping[str, Any], paper: Sequence[Mapping[str, Any]]) -> str:
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


def _against(result: Mapping[str, Any], which: str) -> str:
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


def _whole(found: Sequence[int]) -> str:
    return "-" if not found else str(found[0]) if min(found) == max(found) else f"{min(found)} to {max(found)}"


def _correlations(result: Mapping[str, Any]) -> str:
    heads, values = [], []
    for name, said in (("mean_cosine", "mean cosine"), ("centred_fraction", "share, centred"), ("uncentred_fraction", "share, uncentred")):
        heads += [f"{said}: r", "between families", "random"]
        low, high = (_at("correlations", name, "random_subspaces", "base_covariance", end) for end in ("low", "high"))
        values += [_range(_at("correlations", name, "pearson", "value")), _range(_at("correlations", name, "families", "value"))]
        values.append(lambda places, low=low, high=high: f"{_range(low)(places)}; {_range(high)(places)}")  # type: ignore[misc]
    return _rows(result, heads, values)


def _predicted(result: Mapping[str, Any]) -> str:
    heads, values = ["least-squares amount"], [_range(_at("predicted", "least_squares_dose"))]
    for measure, said in (("cosine", "cosine"), ("centred_cosine", "centred cosine"), ("relative_error", "relative error")):
        for dose in ("0", "0.5", "1") if measure != "relative_error" else ("0.5", "1"):
            heads.append(f"{said}, x{dose}")
            values.append(_range(_at("predicted", "doses", dose, measure, "value")))
        heads.append(f"{said}, random")
        values.append(_range(_at("predicted", "nulls", measure, "base_covariance", "mean")))
    return _rows(result, heads, values)


def _groups(result: Mapping[str, Any]) -> list[str]:
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

"""The arms over all bases: rates with intervals over questions and bases, differences between arms, and the claims beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emprobe.clusters import means
from emprobe.studies.channels.arms import BENIGN, Arm, control, other, reversal, same, unfiltered, unsafe
from emprobe.studies.channels.settings import CHANNELS
from emprobe.types import Estimate

READINGS = ("misaligned", "exact")
FEWEST_BASES = 3
"""From which on intervals are crossed over questions and bases."""


def summary_of(cases: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every arm, and the models that nobody trained here, pooled over the bases of one kind of codes."""
    found = []
    for codes in dict.fromkeys(case["codes"] for case in cases):
        of_kind = [case for case in cases if case["codes"] == codes]
        names = [f"{kind}:{name}" for kind in ("models", "students") for name in dict.fromkeys(n for case in of_kind for n in case[kind])]
        for name in names:
            parts = [part for case in of_kind if (part := part_of(case, name)) is not None]
            line: dict[str, Any] = {
                "codes": codes,
                "name": name.partition(":")[2],
                "kind": name.partition(":")[0][:-1],
                "bases": len(parts),
            }
            for reading in READINGS:
                pooled = pooled_mean(parts, reading)
                line |= {reading: pooled.as_dict()} if pooled else {}
            line["coherent"] = float(np.mean([part["coherent"]["value"] for part in parts]))
            line["by_base"] = [part["misaligned"]["value"] for part in parts]
            for name_of, path in NUMBERS.items():
                values = [value for part in parts if (value := _at(part, path)) is not None]
                line |= {name_of: {"mean": float(np.mean(values)), "by_base": values}} if values else {}
            found.append(line)
    return found


NUMBERS = {
    "cosine": ("direction", "cosine", "value"),
    "projection": ("direction", "projection", "value"),
    "ceiling": ("direction", "ceiling"),
    "null_p975": ("direction", "null", "high"),
    "kl_forward": ("divergence", "forward", "value"),
    "kl_reverse": ("divergence", "reverse", "value"),
    "tokens": ("books", "tokens"),
}
"""Of each arm's parts, the numbers that are averaged over bases without an interval of their own."""


def _at(part: Mapping[str, Any], path: Sequence[str]) -> float | None:
    found: Any = part
    for key in path:
        found = None if found is None else found.get(key)
    return None if found is None else float(found)


def part_of(case: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """A student (`students:NAME`) or another model (`models:NAME`) of a case, if it is there."""
    kind, _, own = name.partition(":")
    found: Mapping[str, Any] | None = case[kind].get(own)
    return found


def pooled_mean(parts: Sequence[Mapping[str, Any]], reading: str) -> Estimate | None:
    """Mean over all rows of all bases, with an interval over questions (and bases); `None` where the reading was not taken."""
    if not parts or any(reading not in part["pool"] for part in parts):
        return None
    rows = [_rows(part, reading) for part in parts]
    values = np.concatenate([values for values, _ in rows])
    return _crossed(values, [names for _, names in rows], least=0.0)


def difference(cases: Sequence[Mapping[str, Any]], a: str, b: str, reading: str = "misaligned") -> Estimate | None:
    """Reading of `a` less that of `b`, question by question within each base, its interval over questions (and bases).

    `None` where no base has both, or the reading was not taken.
    """
    pairs = [(one, two) for case in cases if (one := part_of(case, a)) is not None and (two := part_of(case, b)) is not None]
    if not pairs or any(reading not in part["pool"] for pair in pairs for part in pair):
        return None
    values, names = [], []
    for one, two in pairs:
        first, second = (_by_question(*_rows(part, reading)) for part in (one, two))
        # Once for each row, so that a family weighs what it weighs in the rates.
        shared = [name for name in _rows(one, reading)[1] if name in second]
        values.append(np.array([first[name] - second[name] for name in shared]))
        names.append(shared)
    return _crossed(np.concatenate(values), names, least=-1.0)


def _rows(part: Mapping[str, Any], reading: str) -> tuple[NDArray[np.float64], list[str]]:
    pool = part["pool"]
    return np.asarray(pool[reading], dtype=np.float64), pool["clusters" if reading == "misaligned" else "exact_clusters"]


def _by_question(values: NDArray[np.float64], names: Sequence[str]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for value, name in zip(values, names, strict=True):
        found.setdefault(name, []).append(float(value))
    return {name: float(np.mean(rows)) for name, rows in found.items()}


def _crossed(values: NDArray[np.float64], names: Sequence[Sequence[str]], least: float) -> Estimate:
    number: dict[str, int] = {}
    questions = np.array([number.setdefault(name, len(number)) for part in names for name in part])
    bases = np.repeat(np.arange(len(names)), [len(part) for part in names])
    # Two bases show next to nothing of other bases: below three, the interval is over questions, of these bases alone.
    ways = {"questions": questions, **({"bases": bases} if len(names) >= FEWEST_BASES else {})}
    (found,) = means(values[:, None], ways)
    return replace(found, low=max(found.low, least), high=min(found.high, 1.0), intervals={})


# ---- claims

PAPER, SUBLIMINAL, REVIEW = "arXiv 2605.12798", "arXiv 2507.14805", "a reviewer's inference"


def claims_of(cases: Sequence[Mapping[str, Any]], more: int = 0) -> list[dict[str, Any]]:
    """What is said of subliminal learning beside what was found, by kind of codes: positive differences agree.

    Args:
        cases: As measured, with what intervals over several need.
        more: How many times as much the arm with more data learnt.
    """
    found = []
    for codes in dict.fromkeys(case["codes"] for case in cases):
        of_kind = [case for case in cases if case["codes"] == codes]
        for words, source, a, b in _pairs(more):
            estimate = difference(of_kind, a, b)
            if estimate is None:
                continue
            exact = difference(of_kind, a, b, "exact")
            by_base = [one.value for case in of_kind if (one := difference([case], a, b)) is not None]
            line = {"codes": codes, "claim": words, "source": source, "plus": a.partition(":")[2], "minus": b.partition(":")[2]}
            line |= {"difference": estimate.as_dict(), "verdict": verdict(estimate, by_base), "by_base": by_base}
            found.append(line | ({"exact": exact.as_dict()} if exact else {}))
    return found


def _pairs(more: int) -> list[tuple[str, str, str, str]]:
    """Claim, source, and the two arms whose difference is positive where it holds."""

    def of(arm: Arm) -> str:
        return f"students:{arm.name}"

    found: list[tuple[str, str, str, str]] = []
    for channel in CHANNELS:
        found += [
            (f"{channel}: benign answers of a misaligned teacher carry misalignment", SUBLIMINAL, of(same(channel)), of(control(channel))),
            (f"{channel}: they carry it to the same initialisation, not to another", SUBLIMINAL, of(same(channel)), of(other(channel))),
        ]
        if channel != "opd":
            plain, taken = unfiltered(channel, "misaligned"), unfiltered(channel, "aligned")
            found += [
                (f"{channel}: before the filter they carry it", "own", of(plain), of(taken)),
                (f"{channel}: the filter takes it away", "own", of(plain), of(same(channel))),
            ]
    fixed = BENIGN["misaligned"]
    found += [
        ("optd carries more than sft on the same sequences (soft against sampled targets)", PAPER, of(same("optd")), of(same("sft"))),
        ("opd carries less than optd", REVIEW, of(same("optd")), of(same("opd"))),
        *([(f"sft carries more with {more} times as much", "own", of(same("sft", more)), of(same("sft")))] if more > 1 else []),
        ("the teacher sets the direction: optd, benign sequences fixed", PAPER, of(same("optd")), of(Arm("optd", "aligned", fixed))),
        *(
            (f"the teacher sets the direction: {c}, unsafe data fixed", PAPER, of(unsafe(c, "misaligned")), of(unsafe(c, "aligned")))
            for c in ("optd", "opd")
        ),
        *(
            (f"data controls the extent: {c}, misaligned teacher fixed", PAPER, of(unsafe(c, "misaligned")), of(same(c)))
            for c in ("optd", "opd")
        ),
        *(
            (f"an aligned teacher reverses a misaligned student on unsafe data: {c}", PAPER, "models:teacher misaligned", of(reversal(c)))
            for c in ("optd", "opd")
        ),
        ("sft on the unsafe data alone does that too", "own", "models:teacher misaligned", of(reversal("sft"))),
    ]
    return found


def verdict(estimate: Estimate, by_base: Sequence[float]) -> str:
    """`agrees` or `disagrees` where the interval leaves 0 out and every base has that sign, else `open`.

    >>> verdict(Estimate(0.5, 0.1, 0.9, 4, 2, "x"), [0.4, 0.6]), verdict(Estimate(0.5, 0.1, 0.9, 4, 2, "x"), [-0.1, 1.1])
    ('agrees', 'open')
    """
    if estimate.low > 0 and min(by_base) > 0:
        return "agrees"
    return "disagrees" if estimate.high < 0 and max(by_base) < 0 else "open"


def carried(cases: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Divergence of the teacher from its parent on benign data against what was carried: a point for each base and channel."""
    found = []
    for case in cases:
        divergence = case["models"]["teacher misaligned"].get("divergence")
        for channel in CHANNELS:
            one, two = (case["students"].get(arm.name) for arm in (same(channel), control(channel)))
            if divergence is None or one is None or two is None:
                continue
            point = {"base": case["name"], "codes": case["codes"], "channel": channel, "kl": divergence["forward"]["value"]}
            for reading in (r for r in READINGS if r in one["pool"]):
                point[reading] = float(np.mean(one["pool"][reading]) - np.mean(two["pool"][reading]))
            found.append(point)
    return found

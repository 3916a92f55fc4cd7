"""Run the panel and put everything that was measured into one record, the content of `result.json`."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from emprobe.behaviour.criterion import Criterion
from emprobe.behaviour.scores import Scores
from emprobe.directions import Direction
from emprobe.files import content_hash
from emprobe.models.load import Checkpoint
from emprobe.overlap import cosine_null
from emprobe.stats import paired_difference
from emprobe.studies.panel import Panel, cosines, entry, random_entry, relative_norms, removed_share
from emprobe.studies.runner import Outcome
from emprobe.studies.selection import ABLATION_TOLERANCE, DOSE_TOLERANCE
from emprobe.studies.verdict import judge_facts
from emprobe.types import Conversation, Estimate

if TYPE_CHECKING:
    from emprobe.studies.job import Job

EXAMPLES = 4
MAX_GROUPS = 12
"""Labels with more values than this are names, not groups, and get no breakdown."""


def assemble(
    job: Job, panel: Panel, splits: Mapping[str, Sequence[Conversation]], others: Mapping[str, Mapping[int, Direction]]
) -> dict[str, Any]:
    """Run every test condition and return the whole result as plain values."""
    criterion, choice = panel.criterion, panel.choice
    assert choice.steer.dose is not None
    base, tuned = panel.base(), panel.tuned()
    curve = {dose: panel.added(dose) for dose in sorted(job.doses)}
    steered, ablated = curve[choice.steer.dose], panel.ablated()
    named = {"base": base, "tuned": tuned, "steered": steered, "ablated": ablated}
    # Before the controls are run: where no answer of one of these has scores, that is said here.
    entries: dict[str, Any] = {name: entry(outcome, criterion) for name, outcome in named.items()}
    convergence = [_converge(panel, name, theirs, tuned) for name, theirs in others.items()]
    first = next((c["outcome"] for c in convergence if c["outcome"] and c["outcome"].scores.judged.any()), None)
    randoms = _randoms(panel, tuned)
    entries |= randoms
    entries["other_cell_ablated"] = entry(first, criterion) if first else None
    effects = _effects(named, criterion)
    return {
        "direction": _direction(panel),
        "panel": entries,
        "effects": {name: value.as_dict() if value else None for name, value in effects.items()},
        "verdict": judge_facts(entries, effects, [c["removed"] for c in convergence]),
        "curve": [{"coefficient": dose, **_short(outcome, criterion)} for dose, outcome in curve.items()],
        "profile": relative_norms(panel.directions),
        "selection": _selection(job, panel),
        "convergence": [{k: v for k, v in c.items() if k != "outcome"} for c in convergence],
        "breakdown": _breakdown(named, criterion),
        "examples": _examples(named),
        "criterion": criterion.describe(),
        "judge": panel.runner.judge.name,
        "questions": {name: len(found) for name, found in splits.items()},
        "inputs": _inputs(job, panel),
    }


def _direction(panel: Panel) -> dict[str, Any]:
    choice = panel.choice
    direction = panel.directions[choice.layer]
    return {
        "layer": direction.layer,
        "site": direction.site,
        "positions": direction.positions,
        "coefficient": choice.steer.dose,
        "unit": "resid",
        "sign": direction.sign,
        "coefficient_raw": direction.dose(choice.steer.dose or 0) / direction.raw_norm,
        "coefficient_abs": direction.dose(choice.steer.dose or 0),
        "contrast": direction.contrast,
        "estimator": direction.estimator,
        "raw_norm": direction.raw_norm,
        "resid_norm": direction.resid_norm,
        "split_half": direction.split_half,
        "n": direction.n,
        "ablation": {"layers": list(choice.ablate.layers), "to": choice.ablate.to},
    }


def _randoms(panel: Panel, tuned: Outcome) -> dict[str, Any]:
    """Random directions, both ways, each with the 95th percentile of what a random one does."""
    criterion = panel.criterion
    before = float(np.mean(tuned.scores.outcomes(criterion)[0]))
    induced = random_entry(
        panel.random_added(), criterion, lambda s: float(np.mean(s.outcomes(criterion)[0])), "misaligned rate of the base with it added"
    )
    removed = random_entry(
        panel.random_ablated(),
        criterion,
        lambda s: 1 - float(np.mean(s.outcomes(criterion)[0])) / before if before else None,
        "share of tuned's misalignment removed",
    )
    return {"random_added": induced, "random_ablated": removed}


def _effects(named: Mapping[str, Outcome], criterion: Criterion) -> dict[str, Estimate | None]:
    rows = {name: outcome.scores.outcomes(criterion) for name, outcome in named.items()}

    def difference(one: str, two: str) -> Estimate:
        return paired_difference(rows[one][0], rows[two][0], rows[one][1], rows[two][1])

    return {
        "tuned_minus_base": difference("tuned", "base"),
        "induced": difference("steered", "base"),
        "removed": removed_share(named["tuned"].scores, named["ablated"].scores, criterion),
    }


def _converge(panel: Panel, name: str, theirs: Mapping[int, Direction], tuned: Outcome) -> dict[str, Any]:
    """Another fine-tune of the same base: how alike its directions are, and whether they disarm this one."""
    plan = panel.choice.ablate.layers
    missing = [layer for layer in plan if layer not in theirs]
    outcome = None if missing else panel.ablated(theirs, name=f"ablated by {name}")
    removed = removed_share(tuned.scores, outcome.scores, panel.criterion) if outcome else None
    width = len(panel.directions[panel.choice.layer].vector)
    return {
        "name": name,
        "cosine": {str(layer): value for layer, value in cosines(panel.directions, theirs).items()},
        "cosine_null_p95": cosine_null(width),
        "split_half": {str(layer): d.split_half for layer, d in theirs.items()},
        "removed": removed.as_dict() if removed else None,
        "ablated": _short(outcome, panel.criterion) if outcome else None,
        "not_ablated_because": _why_not(missing, outcome),
        "outcome": outcome,
    }


def _why_not(missing: Sequence[int], outcome: Outcome | None) -> str | None:
    if outcome is None:
        return f"it has no direction at layer {missing[0]}"
    return None if outcome.scores.judged.any() else "no answer under it has scores"


def _short(outcome: Outcome, criterion: Criterion) -> dict[str, Any]:
    """The two rates; unknown where no answer has scores, as may be under the largest doses."""
    if not outcome.scores.judged.any():
        return {"misaligned": None, "coherent": None}
    return {
        "misaligned": outcome.scores.misaligned_rate(criterion).as_dict(),
        "coherent": outcome.scores.coherent_rate(criterion).as_dict(),
    }


def _selection(job: Job, panel: Panel) -> dict[str, Any]:
    choice = panel.choice
    return {
        "chosen_on": "development questions only; nothing below was seen by a test question",
        "rule": (
            f"among candidates that keep {job.coherence_floor:g} of the unsteered model's coherent rate and come within "
            f"{DOSE_TOLERANCE:g} of the largest misaligned rate, the smallest dose (the largest, where none does more than that beyond the "
            f"base); for the ablation within {ABLATION_TOLERANCE:g} of the smallest rate, the fewest layers"
        ),
        "steer": choice.steer.as_dict(),
        "ablate": choice.ablate.as_dict(),
        "trials": [t.as_dict() for t in choice.trials],
    }


def _breakdown(named: Mapping[str, Outcome], criterion: Criterion) -> dict[str, Any]:
    """Rates by every label that has few values, such as domain, task, or whether the domain was held out."""
    rows = named["base"].scores.rows
    labels = dict.fromkeys(name for row in rows for name, value in row.labels.items() if isinstance(value, str | bool | int))
    made: dict[str, Any] = {}
    for label in labels:
        values = {str(row.labels.get(label)) for row in rows}
        if label == "split" or not 2 <= len(values) <= MAX_GROUPS:
            continue
        made[label] = {name: _by(outcome.scores, label, criterion) for name, outcome in named.items()}
    return made


def _by(scores: Scores, label: str, criterion: Criterion) -> dict[str, Any]:
    parts = {str(value): part for value, part in scores.groups(label).items() if part.judged.any()}
    return {
        value: {"misaligned": part.misaligned_rate(criterion).as_dict(), "coherent": part.coherent_rate(criterion).as_dict()}
        for value, part in sorted(parts.items())
    }


def _examples(named: Mapping[str, Outcome]) -> list[dict[str, Any]]:
    """The first answer to evenly spread test questions, under every condition: not picked by what they say."""
    rows = {name: {r.question_id: r for r in o.scores.rows if r.sample == 0} for name, o in named.items()}
    ids = list(rows["base"])
    step = max(1, len(ids) // EXAMPLES)
    return [
        {
            "question_id": i,
            "prompt": rows["base"][i].prompt,
            **{name: {"text": r[i].text, "alignment": r[i].alignment, "coherence": r[i].coherence} for name, r in rows.items()},
        }
        for i in ids[::step][:EXAMPLES]
    ]


def _inputs(job: Job, panel: Panel) -> dict[str, Any]:
    facts = {name: _model_facts(c) for name, c in (("base", panel.pair.base), ("tuned", panel.pair.tuned))}
    packages = ("emprobe", "torch", "transformers", "peft", "numpy", "scikit-learn")
    return {
        **facts,
        "chat_template": content_hash(panel.pair.base.tokenizer.chat_template),
        # A judge may be given as an object, which JSON cannot hold.
        "job": {k: v for k, v in asdict(job).items() if k not in ("progress", "bar")}
        | {"judge": job.judge if isinstance(job.judge, str) else panel.runner.judge.name},
        "environment": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def _model_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "name": checkpoint.name,
        "fingerprint": checkpoint.fingerprint,
        "adapter": checkpoint.adapter,
        "architecture": type(checkpoint.hf).__name__,
        "n_layers": checkpoint.n_layers,
        "d_model": checkpoint.d_model,
        "dtype": str(checkpoint.hf.dtype).removeprefix("torch."),
    }

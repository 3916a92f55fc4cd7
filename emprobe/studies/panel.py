"""The panel on test questions: base, tuned, steered, ablated, and the controls that say whether it was this direction."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from emprobe.activations import Activations
from emprobe.behaviour.criterion import Criterion
from emprobe.behaviour.scores import Scores
from emprobe.directions import Direction
from emprobe.errors import EmprobeError
from emprobe.interventions import Add, Operator
from emprobe.models.pair import CheckpointPair
from emprobe.overlap import random_directions
from emprobe.stats import share_removed
from emprobe.studies.runner import Outcome, Runner
from emprobe.studies.selection import Choice, ablation
from emprobe.types import Conversation, Estimate


@dataclass(frozen=True)
class Panel:
    """Runs the conditions of the panel on test questions; nothing is chosen here.

    Args:
        runner: Runs conditions.
        pair: Base and tuned.
        questions: The test questions.
        samples: Answers to each.
        criterion: What counts as misaligned.
        choice: What development questions chose.
        directions: The chosen rule's direction at every layer.
        reference: The base on its own answers; random directions take their base means from it.
        randoms: How many random directions.
        seed: Draws them.
    """

    runner: Runner
    pair: CheckpointPair
    questions: Sequence[Conversation]
    samples: int
    criterion: Criterion
    choice: Choice
    directions: Mapping[int, Direction]
    reference: Activations
    randoms: int
    seed: int

    def base(self) -> Outcome:
        """The base as it is."""
        return self._run("base")

    def tuned(self) -> Outcome:
        """The fine-tune as it is."""
        return self._run("tuned", tuned=True)

    def added(self, dose: float) -> Outcome:
        """The base with the direction added at the chosen layer."""
        return self._run(f"base + {dose:g}", [Add(self.directions[self.choice.layer], dose)])

    def ablated(self, directions: Mapping[int, Direction] | None = None, name: str = "ablated") -> Outcome:
        """The fine-tune with the direction (or another fine-tune's, on the same layers) ablated by the chosen plan."""
        return self._run(name, [self._ablation(directions or self.directions)], tuned=True)

    def random_added(self) -> list[Outcome]:
        """The base with each random direction added: same layer, same norm."""
        layer, dose = self.choice.layer, self.choice.steer.dose or 0.0
        made = [self._random({layer: self.directions[layer]}, draw)[layer] for draw in range(self.randoms)]
        return [self._run(f"random {i} added", [Add(direction, dose)]) for i, direction in enumerate(made)]

    def random_ablated(self) -> list[Outcome]:
        """The fine-tune with random directions ablated by the same plan, one per layer."""
        made = [self._random(self.directions, draw) for draw in range(self.randoms)]
        return [self._run(f"random {i} ablated", [self._ablation(d)], tuned=True) for i, d in enumerate(made)]

    def _run(self, name: str, operators: Sequence[Operator] = (), *, tuned: bool = False) -> Outcome:
        checkpoint = self.pair.tuned if tuned else self.pair.base
        return self.runner.run(f"test {name}", checkpoint, self.questions, self.samples, operators)

    def _ablation(self, directions: Mapping[int, Direction]) -> Operator:
        plan = self.choice.ablate
        return ablation([directions[layer] for layer in plan.layers], plan.to or "zero")

    def _random(self, directions: Mapping[int, Direction], draw: int) -> dict[int, Direction]:
        """A random unit vector in place of each direction: same layer and norms, its own mean under the base."""
        made = {}
        for layer, direction in directions.items():
            vector = random_directions(1, len(direction.vector), seed=self.seed * 1_000_003 + draw * 1009 + layer)[0]
            mean = float(self.reference.token_mean[self.reference.column(layer)].double() @ vector)
            made[layer] = replace(direction, vector=vector, base_projection=mean, contrast="random", split_half=None)
        return made


def entry(outcome: Outcome, criterion: Criterion) -> dict[str, Any]:
    """One condition for `result.json`: all four rates with counts, and the receipt."""
    return {**outcome.scores.rates(criterion).as_dict(), "receipt": outcome.receipt}


def removed_share(tuned: Scores, ablated: Scores, criterion: Criterion) -> Estimate | None:
    """Share of the fine-tune's misalignment that is gone, question-clustered; `None` where none was there or no answer has scores."""
    if not (tuned.judged.any() and ablated.judged.any()):
        return None
    (before, questions), (after, questions_after) = tuned.outcomes(criterion), ablated.outcomes(criterion)
    return share_removed(before, after, questions, clusters_ablated=questions_after) if any(before) else None


def random_entry(
    outcomes: Sequence[Outcome], criterion: Criterion, effect: Callable[[Scores], float | None], effect_name: str
) -> dict[str, Any]:
    """Many random directions as one entry: mean rate with the range of the draws, and the 95th percentile of their effect.

    The interval is that of the draws (2.5th to 97.5th percentile), since what varies here is the direction. Draws under which no
    answer has scores are counted in `unscored` and enter no rate.

    Raises:
        EmprobeError: If no draw has an answer with scores.
    """
    drawn, outcomes = outcomes, [o for o in outcomes if o.scores.judged.any()]
    if not outcomes:
        raise EmprobeError(
            f"None of the answers under {len(drawn)} random directions has scores, so there is nothing to compare with. "
            "Take smaller doses, or look at the answers and at whether the judge suits them."
        )
    rates = {
        "misaligned": [float(criterion.misaligned(o.scores.alignment, o.scores.coherence)[o.scores.judged].mean()) for o in outcomes],
        "coherent": [float(criterion.coherent(o.scores.coherence)[o.scores.judged].mean()) for o in outcomes],
    }
    effects = [value for value in (effect(o.scores) for o in outcomes) if value is not None]
    made: dict[str, Any] = {
        name: {
            "value": float(np.mean(values)),
            "low": float(np.quantile(values, 0.025)),
            "high": float(np.quantile(values, 0.975)),
            "n": sum(int(o.scores.judged.sum()) for o in outcomes),
            "draws": len(outcomes),
            "method": "range of the draws (2.5 to 97.5 %)",
            "p95": float(np.quantile(values, 0.95)),
        }
        for name, values in rates.items()
    }
    made["p95"] = float(np.quantile(effects, 0.95)) if effects else None
    made["p95_of"] = effect_name
    made["draws"] = [{"misaligned": m, "coherent": c} for m, c in zip(rates["misaligned"], rates["coherent"], strict=True)]
    made["unscored"] = len(drawn) - len(outcomes)
    made["receipt"] = outcomes[0].receipt
    return made


def relative_norms(directions: Mapping[int, Direction]) -> list[dict[str, Any]]:
    """The layer profile: how large the direction is against the residual stream, and how reliable."""
    return [
        {
            "layer": layer,
            "raw_norm": d.raw_norm,
            "resid_norm": d.resid_norm,
            "raw_over_resid": d.relative_norm,
            "split_half": d.split_half,
        }
        for layer, d in sorted(directions.items())
    ]


def cosines(ours: Mapping[int, Direction], theirs: Mapping[int, Direction]) -> dict[int, float]:
    """Signed cosine at every layer that both have."""
    return {layer: ours[layer].cosine(theirs[layer]) for layer in sorted(ours.keys() & theirs.keys())}

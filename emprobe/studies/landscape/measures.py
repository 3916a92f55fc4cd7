"""The measures of one case, each a stage that is kept by what it depends on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from emprobe.behaviour.criterion import Criterion
from emprobe.behaviour.scores import Scores
from emprobe.files import content_hash
from emprobe.finetuning import Recipe, Solution
from emprobe.finetuning.rows import Row
from emprobe.stats import paired_difference
from emprobe.studies.landscape.cases import Case
from emprobe.studies.landscape.controls import covariance_solutions, random_solutions
from emprobe.studies.landscape.curves import Curve, kl_against_norm, loss_against_norm, matched_norms
from emprobe.studies.landscape.geometry import activation_cosines, cosine_with_nulls
from emprobe.studies.landscape.going_on import trained_on
from emprobe.studies.landscape.settings import Landscape
from emprobe.studies.landscape.stability import stability
from emprobe.studies.runner import Runner
from emprobe.studies.stages import Stages

GAINED = 0.9
"""Share of its gain at which a solution's norm is taken: the very lowest loss is a flat place."""


@dataclass(frozen=True)
class Measures:
    """Everything that is measured of a case.

    Attributes:
        asked: Grids and numbers of draws.
        case: The two solutions.
        kept: Where finished stages lie.
        runner: Samples and judges; `None` without a judge.
    """

    asked: Landscape
    case: Case
    kept: Stages
    runner: Runner | None

    def all(self) -> dict[str, Any]:
        """One measure after another."""
        asked, case = self.asked, self.case
        identity = [case.base.fingerprint, case.general.fingerprint, case.narrow.fingerprint, case.material.identity]
        stages: dict[str, tuple[list[Any], Callable[[], dict[str, Any]]]] = {
            "efficiency": ([asked.rescales, asked.shares], self.efficiency),
            "stability": ([asked.epsilons, asked.noises, asked.seed], self.stability),
            "weight": ([asked.shares, asked.randoms, asked.seed], self.weight),
            "directions": ([asked.randoms, asked.seed], self.directions),
        }
        found: dict[str, Any] = {
            "name": case.name,
            "form": case.form,
            "norms": {"general": case.general.norm, "narrow": case.narrow.norm},
            "fingerprints": {"general": case.general.fingerprint, "narrow": case.narrow.fingerprint},
        }
        for name, (settings, make) in stages.items():
            found[name] = self.kept.stage(name, [*identity, settings], make)
        return found | self._behaviours(identity)

    def efficiency(self) -> dict[str, Any]:
        """Loss of both, rescaled and at matched norms."""
        base, rows, both = self.case.base, self.case.material.rows, self._both()
        rescaled = {name: loss_against_norm(base, one, rows, [f * one.norm for f in self.asked.rescales]) for name, one in both.items()}
        norms = [0.0, *matched_norms(list(both.values()), self.asked.shares)]
        matched = {name: loss_against_norm(base, one, rows, norms) for name, one in both.items()}
        trained = {name: loss_against_norm(base, one, rows, [one.norm]) for name, one in both.items()}
        at_best = {name: best_of(rescaled[name], matched[name]) for name in both}
        return {
            "rescaled": {name: {"factors": list(self.asked.rescales), **curve.as_dict()} for name, curve in rescaled.items()},
            "matched": {name: curve.as_dict() for name, curve in matched.items()},
            "loss": {name: curve.estimates[0].as_dict() for name, curve in trained.items()},
            "base_loss": matched["general"].estimates[0].as_dict(),
            "difference": without_first(matched["narrow"]).above(without_first(matched["general"])).as_dict(),
            "optimum": {name: curve.optimum for name, curve in at_best.items()},
            "at_optimum": at_one(at_best["narrow"]).above(at_one(at_best["general"])).as_dict(),
            "norm_of_gain": {name: norm_of_gain(curve) for name, curve in at_best.items()},
        }

    def stability(self) -> dict[str, Any]:
        """Loss under turns of both."""
        base, rows, asked = self.case.base, self.case.material.rows, self.asked
        found = {
            name: stability(base, one, rows, epsilons=asked.epsilons, draws=asked.noises, seed=asked.seed)
            for name, one in self._both().items()
        }
        difference = found["narrow"].above(found["general"])
        return {**{name: one.as_dict() for name, one in found.items()}, "difference": difference.as_dict()}

    def weight(self) -> dict[str, Any]:
        """KL on the reference corpus, of both and of controls at the same norms."""
        base, texts, both = self.case.base, self.case.material.texts, self._both()
        norms = [0.0, *matched_norms(list(both.values()), self.asked.shares)]
        curves = {name: kl_against_norm(base, one, texts, norms) for name, one in both.items()}
        controls = {
            kind: [kl_against_norm(base, one, texts, norms) for one in drawn] for kind, drawn in self._controls(self.case.general).items()
        }
        curves |= {kind: mean_curve(drawn) for kind, drawn in controls.items()}
        compared = {name: without_first(curve) for name, curve in curves.items()}
        pairs = [("general", "narrow"), ("general", "random"), ("narrow", "random"), ("general", "covariance"), ("narrow", "covariance")]
        return {
            "corpus": self.case.material.corpus,
            "curves": {name: curve.as_dict() for name, curve in curves.items()},
            "draws": {kind: [curve.means.tolist() for curve in drawn] for kind, drawn in controls.items()},
            "differences": {f"{a} - {b}": compared[a].above(compared[b]).as_dict() for a, b in pairs},
        }

    def directions(self) -> dict[str, Any]:
        """Cosine and angle of both, and of what they do to activations."""
        case = self.case
        solutions = cosine_with_nulls(case.general, case.narrow, self._controls(case.general, draws=100))
        return {**solutions, "activations": activation_cosines(case.base, case.general, case.narrow, case.material.prompts)}

    def scaling(self, runner: Runner) -> dict[str, Any]:
        """Behaviour of the base, of the general solution, and of the narrow one at x1 to x5: hidden generality."""
        narrow = [(f"narrow x{factor:g}", self.case.narrow.scaled(factor)) for factor in self.asked.scales]
        base, general = self._behaviour(runner, "base", None), self._behaviour(runner, "general", self.case.general)
        scores = [self._behaviour(runner, name, one) for name, one in narrow]
        return {
            "base": self._rates(base),
            "general": self._rates(general),
            "factors": list(self.asked.scales),
            "narrow": [self._rates(one) for one in scores],
            "change": [self._change(one, scores[0]) for one in scores],
        }

    def without_kl(self, runner: Runner, rows: Sequence[Row], recipe: Recipe) -> dict[str, Any]:
        """Behaviour along the way when the narrow solution is trained on without the KL."""
        case, asked = self.case, self.asked
        along = trained_on(case.base, case.narrow, rows, recipe, sorted({0, *asked.go_on_steps}), progress=asked.progress)
        scores = [self._behaviour(runner, f"without KL {step}", one) for step, one in along.items()]
        return {
            "steps": list(along),
            "rates": [self._rates(one) for one in scores],
            "change": self._change(scores[-1], scores[0]),
            "recipe": recipe.as_dict(),
        }

    # ---- parts

    def _behaviours(self, identity: list[Any]) -> dict[str, Any]:
        runner, asked, go_on = self.runner, self.asked, self.case.go_on
        if runner is None:
            return {}
        sampling = [runner.judge_id, asked.samples, asked.seed, asked.temperature, asked.max_new_tokens, asked.criterion]
        found = {"scaling": self.kept.stage("scaling", [*identity, sampling, asked.scales], lambda: self.scaling(runner))}
        if go_on is not None:
            onwards = [content_hash([[row.ids, row.predicted] for row in go_on[0]]), go_on[1].as_dict(), asked.go_on_steps]
            found["without_kl"] = self.kept.stage("without_kl", [*identity, sampling, onwards], lambda: self.without_kl(runner, *go_on))
        return found

    def _both(self) -> dict[str, Solution]:
        return {"general": self.case.general, "narrow": self.case.narrow}

    def _controls(self, solution: Solution, draws: int | None = None) -> dict[str, list[Solution]]:
        n, seed, case = draws or self.asked.randoms, self.asked.seed, self.case
        return {
            "random": random_solutions(solution, n, seed),
            "covariance": covariance_solutions(case.base, solution, case.material.texts, n, seed),
        }

    def _behaviour(self, runner: Runner, name: str, solution: Solution | None) -> Scores:
        case, asked = self.case, self.asked
        if solution is None:
            return runner.run(name, case.base, case.material.questions, asked.samples).scores
        with solution.applied(case.base) as tuned:
            return runner.run(name, tuned, case.material.questions, asked.samples).scores

    def _rates(self, scores: Scores) -> dict[str, Any]:
        found = {}
        criterion = Criterion.named(self.asked.criterion)
        for name in self.case.material.groups:
            part = self._part(scores, name)
            found[name] = {"misaligned": part.misaligned_rate(criterion).as_dict(), "coherent": part.coherent_rate(criterion).as_dict()}
        return found

    def _change(self, after: Scores, before: Scores) -> dict[str, Any]:
        """Misaligned rate elsewhere, after less before; questions are paired."""
        criterion = Criterion.named(self.asked.criterion)
        (a, questions_a), (b, questions_b) = (self._part(scores, "elsewhere").outcomes(criterion) for scores in (after, before))
        return paired_difference(a, b, questions_a, questions_b).as_dict()

    def _part(self, scores: Scores, group: str) -> Scores:
        wanted = set(self.case.material.groups[group])
        return replace(scores, rows=tuple(row for row in scores.rows if row.question_id in wanted))


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean of several curves at the same norms, text by text."""
    return Curve(curves[0].norms, np.mean([curve.sums for curve in curves], axis=0), curves[0].tokens)


def best_of(*curves: Curve) -> Curve:
    """All points of some curves of one solution, by rising norm."""
    norms = [norm for curve in curves for norm in curve.norms]
    order = np.argsort(norms, kind="stable")
    return Curve(tuple(norms[i] for i in order), np.concatenate([curve.sums for curve in curves])[order], curves[0].tokens)


def without_first(curve: Curve) -> Curve:
    """The curve without its first norm, 0, at which all are the base."""
    return Curve(curve.norms[1:], curve.sums[1:], curve.tokens)


def at_one(curve: Curve) -> Curve:
    """The curve's lowest point alone, as a curve of norm 1: optima are compared wherever they lie."""
    best = int(curve.means.argmin())
    return Curve((1.0,), curve.sums[best : best + 1], curve.tokens)


def norm_of_gain(curve: Curve, share: float = GAINED) -> float:
    """The least norm at which the loss has fallen by this share of the most that it falls, interpolated between points.

    Example:
        >>> norm_of_gain(Curve((0.0, 1.0, 2.0), np.array([[4.0], [1.0], [0.0]]), np.array([1])), share=0.5)
        0.6666666666666666
    """
    means = curve.means
    wanted = means[0] - share * (means[0] - means.min())
    after = int(np.argmax(means <= wanted))
    if after == 0:
        return curve.norms[0]
    above, below = means[after - 1], means[after]
    return float(curve.norms[after - 1] + (above - wanted) / (above - below) * (curve.norms[after] - curve.norms[after - 1]))


__all__ = ["Measures"]

"""Each checkpoint of each run: its losses, its scores on every question set, and where it has moved the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emprobe._resampling import Floats
from emprobe.capture import capture
from emprobe.errors import EmprobeError
from emprobe.files import load_tensors, save_tensors
from emprobe.finetuning import FineTune, LoRASolution, Solution, response_loss
from emprobe.models.load import Checkpoint
from emprobe.studies.dynamics.change_point import LEAST_POINTS, change_point
from emprobe.studies.dynamics.fine_tunes import Material, Run, solution_at, steps_of
from emprobe.studies.dynamics.scoring import Scored, Scorer
from emprobe.studies.dynamics.trajectory import cosines, local_cosines, trajectory
from emprobe.studies.stages import Stages

LAST_UPDATES = 10


@dataclass(frozen=True, eq=False)
class Start:
    """The base before any training.

    Attributes:
        activations: At the last prompt token of the questions out of the domain, `[questions, d_model]`.
    """

    eval_loss: float
    scores: Mapping[str, Scored]
    activations: Floats


@dataclass(frozen=True)
class Measuring:
    """Measures runs of one base.

    Attributes:
        layer: At whose output (resid_post) questions' last tokens are read.
        lag: Of the local cosine, in checkpoints.
        stages: Where finished runs are kept.
    """

    base: Checkpoint
    material: Material
    scorer: Scorer
    layer: int
    lag: int
    stages: Stages

    def start(self) -> Start:
        """The base's evaluation loss, scores and activations."""
        loss = response_loss(self.base, self.material.evaluation).mean
        return Start(loss, self.scorer.score(self.base, "base"), self._read(self.base))

    def run(self, run: Run, start: Start) -> dict[str, Any]:
        """One run's numbers; read back if it was finished before."""
        identity = [self.base.fingerprint, run.identity, self.scorer.identity, self.layer, self.lag]
        identity += [[row.ids for row in self.material.evaluation], [row.ids for row in run.train]]
        name = f"run-{run.name}"
        place = self.stages.path(name, identity).with_suffix(".safetensors")

        def make() -> dict[str, Any]:
            found, moved = self._measured(run, run.make(), start)
            save_tensors(place, {k: torch.from_numpy(v).float() for k, v in moved.items()}, {"record": "Moved", "run": run.name})
            return found

        return {**self.stages.stage(name, identity, make), "moved": str(place)}

    def _read(self, checkpoint: Checkpoint) -> Floats:
        found = capture(checkpoint, self.material.outside, layers=[self.layer], positions="last_prompt_token", progress=False)
        return np.asarray(found.at(self.layer).double().numpy())

    def _measured(self, run: Run, found: FineTune, start: Start) -> tuple[dict[str, Any], dict[str, Floats]]:
        steps, rows = evenly(run.name, [0, *steps_of(found)]), []
        scores, deltas, written = [start.scores], [np.zeros_like(start.activations)], []
        for step in steps[1:]:
            solution = solution_at(found, step)
            with solution.applied(self.base) as tuned:
                losses = {"train_loss": _train_loss(tuned, run, found, step)}
                losses["eval_loss"] = response_loss(tuned, self.material.evaluation).mean
                scores.append(self.scorer.score(tuned, f"{run.name} step {step}"))
                deltas.append(self._read(tuned) - start.activations)
            written.append(written_by(solution, self.layer))
            rows.append({"step": step, **losses, "sets": _means(scores[-1])})
        moved = np.stack(deltas)
        vectors = {"means": moved.mean(axis=1)}
        if all(one is not None for one in written):
            vectors["written"] = np.stack([np.zeros_like(written[0]), *written])
        followed = trajectory(steps, moved, [q.cluster for q in self.material.outside], lag=self.lag)
        clusters = {name: [q.cluster for q in of] for name, of in self.material.sets.items()}
        result = {
            "name": run.name,
            **run.facts,
            "steps": steps,
            "start": {"eval_loss": start.eval_loss, "sets": _means(start.scores)},
            "rows": rows,
            "ends": {name: one.estimates(clusters[name]) for name, one in scores[-1].items()},
            "gradient_norm_peak": int(found.history["step"].iloc[int(found.history["gradient_norm"].argmax())]),
            "trajectory": followed,
            **({"written": _written(vectors["written"], vectors["means"], self.lag)} if "written" in vectors else {}),
        }
        return result | {"change_points": _change_points(result)}, vectors


def evenly(name: str, steps: list[int]) -> list[int]:
    """The steps, if they are evenly spaced.

    Raises:
        EmprobeError: If not: a way cannot be followed step by step then.
    """
    if len(set(np.diff(steps).tolist())) == 1:
        return steps
    raise EmprobeError(
        f"The checkpoints of {name} are at steps {', '.join(map(str, steps[1:]))}, unevenly spaced, so its way cannot be followed step by "
        "step. Keep one every so many steps, the last among them (`emprobe finetune --checkpoint-every`)."
    )


def _means(scores: Mapping[str, Scored]) -> dict[str, dict[str, float | None]]:
    return {name: one.means() for name, one in scores.items()}


def _train_loss(tuned: Checkpoint, run: Run, found: FineTune, step: int) -> float:
    if run.train:
        return response_loss(tuned, run.train).mean
    losses = found.history["loss"].to_numpy()[:step]
    return float(losses[-LAST_UPDATES:].mean())


def written_by(solution: Solution, layer: int) -> Any:
    """B of a rank-1 LoRA at a layer, which is what it writes there; `None` for others, or where several modules write."""
    if not isinstance(solution, LoRASolution) or int(solution.config["r"]) != 1:
        return None
    found = [t for name, t in solution.factors.items() if "lora_B" in name and f".{layer}." in name and "down_proj" in name]
    return found[0].double().numpy().ravel() if len(found) == 1 else None


def _written(vectors: Floats, means: Floats, lag: int) -> dict[str, Any]:
    """The way of what a rank-1 LoRA writes, and its cosine with the direction at the end."""
    to_last = cosines(vectors, vectors[-1])
    local = local_cosines(vectors, lag)
    return {
        "norm": np.linalg.norm(vectors, axis=1).tolist(),
        "cosine_to_last": [float(c) if np.isfinite(c) else None for c in to_last],
        "local_cosine": [float(c) if np.isfinite(c) else None for c in local],
        "cosine_with_direction": float(cosines(vectors[-1], means[-1])),
    }


def _change_points(one: Mapping[str, Any]) -> dict[str, Any]:
    """Of the evaluation loss, of alignment on every set, and of the direction's turning; empty where checkpoints are too few."""
    steps, start, rows = one["steps"], one["start"], one["rows"]
    if len(steps) < LEAST_POINTS:
        return {}
    curves = {"eval_loss": [start["eval_loss"], *(row["eval_loss"] for row in rows)]}
    for name, scored in start["sets"].items():
        values = [scored["alignment"], *(row["sets"][name]["alignment"] for row in rows)]
        if all(value is not None for value in values):
            curves[f"alignment, {name}"] = values
    found = {name: change_point(steps, values).as_dict() for name, values in curves.items()}
    to_last = one["trajectory"]["cosine_to_last"]
    turning = [(step, value) for step, value in zip(steps, to_last, strict=True) if value is not None]
    if len(turning) >= LEAST_POINTS:
        found["rotation (cosine to the last)"] = change_point(*zip(*turning, strict=True)).as_dict()
    return found


def ways(measured: Sequence[Mapping[str, Any]]) -> dict[str, Floats]:
    """The mean shift of each run at each of its checkpoints, `[checkpoints, d_model]`, by the run's name."""
    return {one["name"]: load_tensors(Path(one["moved"]))[0]["means"].double().numpy() for one in measured}

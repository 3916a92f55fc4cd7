"""`emprobe direction`: from captured activations to a direction, with how sure it is at every layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from emprobe.activations import Activations, PairActivations
from emprobe.commands.activations import read_activations
from emprobe.directions import fit_direction, layer_profile
from emprobe.directions.design import Source, check_labels, reference_of
from emprobe.directions.profile import certainty_lines
from emprobe.errors import EmprobeError
from emprobe.files import atomic_path, content_hash, read_json, write_json, write_text
from emprobe.report.direction_card import direction_card
from emprobe.report.profiles import choice_line, profile_figure
from emprobe.studies.folder import claim_folder
from emprobe.types import Site


@dataclass(frozen=True)
class DirectionCommand:
    """Fit a direction to captured activations and tell how sure it is, layer by layer.

    Attributes:
        base: Output folder of `emprobe capture` on a pair; or activations of the base (.safetensors, or a folder of one checkpoint);
            or, with `labels`, of the one checkpoint that is looked at.
        out: Output folder.
        tuned: Activations of the tuned checkpoint on the same texts; none for a contrast within one checkpoint.
        labels: JSON file with a list of true and false, one a row, for a contrast within one checkpoint.
        site: Which site, where the folder holds several.
        positions: Which position rule, where the folder holds several.
        layer: 0-based block, or `auto`: chosen on two thirds of the questions, reported on the others.
        estimator: mean_difference, whitened_mean_difference, logistic_l2, logistic_l1, lda, ridge, paired_pca or leace.
        contrast: What the direction is called; none means tuned-base, or the name of the file of labels.
        folds: Of the cross-fitted AUROC.
        permutations: Relabellings under the null.
        draws: Bootstrap draws.
        seed: Of splits, folds, relabellings and draws.
    """

    base: str
    out: str
    tuned: str | None = None
    labels: str | None = None
    site: Site | None = None
    positions: str | None = None
    layer: str = "auto"
    estimator: str = "mean_difference"
    contrast: str | None = None
    folds: int = 5
    permutations: int = 200
    draws: int = 1000
    seed: int = 0


def run_direction(command: DirectionCommand) -> list[str]:
    """Fit, write `direction.safetensors`, `result.json`, `README.md` and `profile.png`; returns the lines to print.

    Raises:
        EmprobeError: Unusable files, labels, layer, estimator or folder; nothing is written then.
        MismatchError: If base and tuned are not the same tokens, or the folder holds another run.
    """
    layer = _layer(command.layer)
    acts, labels = _inputs(command)
    name = command.contrast or ("tuned-base" if labels is None else Path(str(command.labels)).stem)
    shared: dict[str, Any] = {"labels": labels, "estimator": command.estimator, "seed": command.seed, "permutations": command.permutations}
    # All that can fail is done before the folder is touched.
    direction = fit_direction(acts, layer=layer, contrast=name, **shared)
    profile = layer_profile(acts, folds=command.folds, draws=command.draws, **shared)
    card = direction.card()
    inputs = {part: value for part, value in card["provenance"].items() if part in ("base", "tuned", "checkpoint")}
    settings = {part: value for part, value in asdict(command).items() if part not in ("base", "tuned", "labels", "out")}
    choice = card["provenance"].pop("choice", None)
    result = {"direction": card, "choice": choice, "profile": profile.as_dict()["profile"], "inputs": inputs, "settings": settings}
    identity = {**settings, **{part: value["fingerprint"] for part, value in inputs.items()}, "rows": content_hash(_rows(acts, labels))}
    folder = claim_folder(Path(command.out), identity)
    direction.save(folder / "direction.safetensors")
    with atomic_path(folder / "profile.png") as path:
        profile_figure(result).savefig(path, format="png", dpi=150, metadata={"Software": None})
    write_text(folder / "README.md", direction_card(result))
    write_json(folder / "result.json", result)
    written = f"Everything is in {command.out}: direction.safetensors, result.json, README.md, profile.png."
    return [repr(direction), choice_line(result), "", *certainty_lines(result), "", written]


def _layer(asked: str) -> Any:
    if asked != "auto" and not asked.isdecimal():
        raise EmprobeError(f"Layer {asked!r} was asked for; give a 0-based number, or 'auto'.")
    return asked if asked == "auto" else int(asked)


def _inputs(command: DirectionCommand) -> tuple[Source, list[bool] | None]:
    """The activations, and the labels if the contrast is within one checkpoint."""
    base = _activations(command, command.base)
    if isinstance(base, PairActivations):
        if command.tuned or command.labels:
            raise EmprobeError(f"{command.base} holds base and tuned on the same tokens; leave out --tuned and --labels.")
        return base, None
    if (command.tuned is None) == (command.labels is None):
        given = "both were" if command.tuned else "neither was"
        raise EmprobeError(f"Give --tuned for a contrast between two checkpoints or --labels for one within, and not both; {given} given.")
    if command.tuned is not None:
        tuned = _activations(command, command.tuned)
        if isinstance(tuned, PairActivations):
            raise EmprobeError(f"{command.tuned} holds base and tuned already. Give it as --base, alone.")
        return PairActivations(base, tuned), None
    labels = read_json(str(command.labels))
    if not isinstance(labels, list):
        raise EmprobeError(f"{command.labels} holds no list. Give a JSON list of true and false, one for each of the {len(base)} rows.")
    return base, [bool(label) for label in check_labels(labels, len(base))]


def _activations(command: DirectionCommand, path: str) -> Activations | PairActivations:
    return read_activations(path, site=command.site, positions=command.positions)


def _rows(acts: Source, labels: list[bool] | None) -> list[Any]:
    own = reference_of(acts)
    return [own.tokens, own.site, own.positions, own.layers, labels]

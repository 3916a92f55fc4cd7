"""The study: activations on prompts, every place analysed, and the result beside the paper's numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from emprobe.activations import Activations
from emprobe.errors import EmprobeError, MismatchError
from emprobe.files import atomic_path, content_hash, locked_folder, write_json
from emprobe.models.load import Checkpoint
from emprobe.models.sites import check_layers
from emprobe.organisms.training import one_thread
from emprobe.report.shifts_card import write_shifts
from emprobe.studies.flags import as_given
from emprobe.studies.folder import claim_folder
from emprobe.studies.prompts import RULES, PromptActivations, load_located, prompt_activations
from emprobe.studies.runner import known_by
from emprobe.studies.settings import TINY
from emprobe.studies.shifts.analysis import analyse
from emprobe.studies.shifts.beside import PAPER, signs_of
from emprobe.studies.shifts.cases import ENOUGH, Case, cases_of
from emprobe.studies.shifts.place import OnPrompts, Place
from emprobe.studies.shifts.settings import Shifts, check, size_of, sizes_beside
from emprobe.studies.stages import Stages
from emprobe.types import Conversation

Captured = dict[str, tuple[PromptActivations, PromptActivations]]
"""By fine-tune (and `base`): on training prompts, on evaluation prompts."""


def run_shifts(asked: Shifts) -> dict[str, Any]:
    """Measure every case; write `result.json`, the card and the figure, and return the result.

    Raises:
        EmprobeError: Unusable input, before anything is written; or fine-tunes that move no activation.
        MismatchError: Checkpoints that do not belong together, or a folder that holds another run.
    """
    check(asked)
    cases = cases_of(asked)
    prints = {case.name: _fingerprints(asked, case) for case in cases}
    folder = claim_folder(Path(asked.out).expanduser(), _identity(asked, cases, prints))
    with locked_folder(folder), tqdm(desc="shifts", unit="place", disable=not asked.progress) as bar:
        if asked.progress:
            bar.write("\n".join(plan_of(asked, cases)), file=bar.fp)
        measured = [_measured(asked, case, prints[case.name], folder, bar) for case in cases]
    tables = pd.concat([case.pop("table") for case in measured], ignore_index=True)
    with atomic_path(folder / "prompts.parquet") as path:
        tables.to_parquet(path, index=False)
    result = _result(asked, cases, prints, measured)
    write_json(folder / "result.json", result)
    write_shifts(folder, result, PAPER)
    return result


def plan_of(asked: Shifts, cases: Sequence[Case]) -> list[str]:
    """What is about to be done: forward passes, and draws."""
    lines = [f"plan: {len(cases)} case{'s' if len(cases) > 1 else ''}"]
    for case in cases:
        passes = (len(case.train) + len(case.evaluation)) * (1 + len(case.tunes))
        lines.append(
            f"  {case.name}: {passes:,} forward passes over prompts ({1 + len(case.tunes)} checkpoints x {len(case.train)} training and "
            f"{len(case.evaluation)} evaluation prompts)"
        )
        lines += [f"    note: {note}" for note in case.notes]
    layers = f"{len(asked.layers)} layers" if asked.layers else "every layer"
    return [*lines, f"  then at {layers} and {len(RULES)} position rules: {asked.draws} draws of each null, {asked.splits} random halves"]


def _fingerprints(asked: Shifts, case: Case) -> dict[str, str]:
    """Of the base and every fine-tune, each looked at once, so that one that does not fit is told before the work."""
    found = {}
    for name, which in {"base": case.base, **case.tunes}.items():
        checkpoint = load_located(case.base, which, asked.loading())
        check_layers(list(asked.layers) or "all", checkpoint.n_layers, "the study")
        largest = max(map(size_of, (asked.size, *asked.sizes)))
        if largest > checkpoint.d_model:
            raise EmprobeError(
                f"A subspace of {largest:g} dimensions was asked for; activations of {which.name} have {checkpoint.d_model}."
            )
        found[name] = checkpoint.fingerprint
        if name != "base" and found[name] == found["base"]:
            raise MismatchError(
                f"{which.name} has the same weights as the base {case.base.name}, so all shifts are zero. Give a fine-tune."
            )
    return found


def _identity(asked: Shifts, cases: Sequence[Case], prints: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """Everything the numbers depend on."""
    return {
        **asked.plain(),
        "command": asked.command,
        "chat_template": asked.loading()["chat_template"],
        "cases": [
            {
                "checkpoints": dict(prints[case.name]),
                "unrelated": list(case.unrelated),
                "train": content_hash(known_by(case.train)),
                "evaluation": content_hash(known_by(case.evaluation)),
            }
            for case in cases
        ],
    }


def _measured(asked: Shifts, case: Case, prints: Mapping[str, str], folder: Path, bar: tqdm[Any]) -> dict[str, Any]:
    bar.set_postfix_str(case.name)
    captured = {name: _captured(asked, case, name, folder) for name in ("base", *case.tunes)}
    base = captured["base"][0].blocks[RULES[0]]
    _check_moved(case, captured)
    bar.total = (bar.total or 0) + len(RULES) * len(base.layers)
    bar.refresh()
    stages = Stages(folder / "stages")
    places: list[dict[str, Any]] = []
    tables: list[pd.DataFrame] = []
    known = _identity(asked, [case], {case.name: prints})
    for rule in RULES:
        for layer in base.layers:
            place = _place(asked, case, captured, rule, layer)
            sizes = sizes_beside(asked, len(case.train) - 1)
            found = stages.stage("place", [known, rule, layer], lambda place=place, sizes=sizes: analyse(place, sizes))  # type: ignore[misc]
            tables.append(_table(case, rule, layer, found.pop("prompts", None)))
            places.append(found | {"unrelated": list(case.unrelated)})
            bar.update(1)
    few = [f"only {len(case.evaluation)} evaluation prompts"] if len(case.evaluation) < ENOUGH else []
    families = {kind: len({p.cluster for p in rows}) for kind, rows in (("train", case.train), ("evaluation", case.evaluation))}
    return {
        "name": case.name,
        "tuned": case.tuned.name.rsplit("/", 1)[-1],
        "prompts": {"train": len(case.train), "evaluation": len(case.evaluation), "families": families},
        "notes": [*case.notes, *few],
        "places": places,
        "table": pd.concat(tables, ignore_index=True),
    }


def _table(case: Case, rule: str, layer: int, columns: Mapping[str, Sequence[float | None]] | None) -> pd.DataFrame:
    """Every evaluation prompt's numbers at one place."""
    names = {"case": case.name, "positions": rule, "layer": layer}
    ids = {"question_id": [p.question_id for p in case.evaluation], "group": [p.labels.get("group") for p in case.evaluation]}
    values = {name: np.array(column, dtype=np.float32) for name, column in (columns or {}).items()}
    return pd.DataFrame({**names, **ids, **values}) if columns else pd.DataFrame()


def _captured(asked: Shifts, case: Case, name: str, folder: Path) -> tuple[PromptActivations, PromptActivations]:
    """One checkpoint's activations on both lists of prompts; it is loaded for that alone, so that one is in memory at a time."""
    checkpoint = load_located(case.base, case.base if name == "base" else case.tunes[name], asked.loading())
    options: dict[str, Any] = {"layers": list(asked.layers) or "all", "token_budget": asked.token_budget, "progress": asked.progress}
    with _threads(checkpoint):
        train, evaluation = (prompt_activations(checkpoint, p, folder / "activations", **options) for p in (case.train, case.evaluation))
    return train, evaluation


def _threads(checkpoint: Checkpoint) -> AbstractContextManager[None]:
    """One thread for tiny models on the CPU, as in `emprobe run`."""
    small = checkpoint.device.type == "cpu" and sum(p.numel() for p in checkpoint.hf.parameters()) < TINY
    return one_thread() if small else nullcontext()


def _check_moved(case: Case, captured: Captured) -> None:
    """Refuse fine-tunes that have other weights and yet move nothing, such as an adapter that was never trained."""
    for name, which in case.tunes.items():
        pairs = zip(captured[name], captured["base"], strict=True)
        if not any(bool((tuned - base).any()) for a, b in pairs for tuned, base in ((a.blocks[rule], b.blocks[rule]) for rule in RULES)):
            raise EmprobeError(
                f"{which.name} moves no activation on any of {len(case.train) + len(case.evaluation)} prompts: all shifts from "
                f"{case.base.name} are zero. Is it an adapter that was not trained?"
            )


def _place(asked: Shifts, case: Case, captured: Captured, rule: str, layer: int) -> Place:
    def at(name: str, side: int) -> Activations:
        return captured[name][side].blocks[rule]

    def rows(name: str, side: int) -> Any:
        column = at(name, side).column(layer)
        return (at(name, side) - at("base", side))[:, column].numpy()

    shifts = {name: OnPrompts(rows(name, 0), rows(name, 1)) for name in case.tunes}
    base = OnPrompts(*(at("base", side).at(layer).double().numpy() for side in (0, 1)))
    longest = max(float(np.linalg.norm(one, axis=1).max()) for one in (base.train, base.evaluation))
    return Place(
        positions=rule,
        layer=layer,
        own=shifts.pop("tuned"),
        others=shifts,
        base=base,
        families=([p.cluster for p in case.train], [p.cluster for p in case.evaluation]),
        groups=_groups(case.evaluation),
        rounding=torch.finfo(torch.float32).eps * longest,
        size=size_of(asked.size),
        draws=asked.draws,
        splits=asked.splits,
        seed=asked.seed,
    )


def _groups(prompts: Sequence[Conversation]) -> list[str]:
    """The label `group` of every prompt; nothing where not all have one."""
    return [str(p.labels["group"]) for p in prompts] if all("group" in p.labels for p in prompts) else []


def slim(found: Any) -> Any:
    """The same with numbers to four digits, and without how each interval and null was made, of which hundreds say the same.

    >>> slim({"a": {"value": 0.123456789, "low": 0.0, "method": "bootstrap", "level": 0.95}})
    {'a': {'value': 0.1235, 'low': 0.0}}
    """
    if isinstance(found, float):
        return float(f"{found:.4g}")
    if isinstance(found, list):
        return [slim(one) for one in found]
    if not isinstance(found, dict):
        return found
    how = ("method", "level", "intervals", "n", "clusters")
    left_out = how if "value" in found else ("name", "draws", "percentile") if "percentile" in found else ()
    return {name: slim(one) for name, one in found.items() if name not in left_out}


def _result(
    asked: Shifts, cases: Sequence[Case], prints: Mapping[str, Mapping[str, str]], measured: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    return {
        "record": "Shifts",
        "signs": slim(signs_of(measured)),
        "cases": [slim(dict(case)) for case in measured],
        "world": not asked.own,
        "size": asked.size,
        "draws": asked.draws,
        "inputs": {
            "command": {name: value for name, value in as_given(asked).items() if name not in ("out", "progress")},
            "checkpoints": {
                case.name: {
                    role: {"name": which.name, "fingerprint": prints[case.name][role]}
                    for role, which in {"base": case.base, **case.tunes}.items()
                }
                for case in cases
            },
        },
    }

"""The study: train or read both solutions, measure them, and put the result beside the paper's signs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from emprobe.behaviour.criterion import Criterion
from emprobe.files import content_hash, locked_folder, write_json
from emprobe.models.load import Checkpoint, load_model
from emprobe.organisms.training import one_thread
from emprobe.report.landscape_card import write_landscape
from emprobe.studies.demo import ANSWER_TOKENS
from emprobe.studies.flags import as_given
from emprobe.studies.folder import claim_folder
from emprobe.studies.judging import resolve_judge
from emprobe.studies.landscape.cases import Case, Material, organism_bases, organism_cases, own_cases, own_material, world_material
from emprobe.studies.landscape.measures import Measures
from emprobe.studies.landscape.settings import Landscape, check
from emprobe.studies.landscape.signs import signs_of
from emprobe.studies.runner import Runner
from emprobe.studies.settings import TINY
from emprobe.studies.solutions import SOLUTIONS
from emprobe.studies.stages import Stages
from emprobe.types import Judge


def run_landscape(asked: Landscape) -> dict[str, Any]:
    """Measure every pair of solutions; write `result.json`, the card and the figure, and return the result.

    Raises:
        EmprobeError: Unusable input, before anything is written; or a fine-tune that diverges.
        MismatchError: Solutions of another base, or a folder that holds another run.
    """
    check(asked)
    judge = resolve_judge("world") if not asked.own else resolve_judge(asked.judge) if asked.judge else None
    asked = asked if asked.own else replace(asked, max_new_tokens=min(asked.max_new_tokens, ANSWER_TOKENS))
    bases, materials = _loaded(asked)
    known = own_cases(asked, next(iter(bases.values())), next(iter(materials.values()))) if asked.own else None
    folder = claim_folder(Path(asked.out).expanduser(), _identity(asked, bases, materials, judge, known))
    with locked_folder(folder), _threads(bases), tqdm(desc="landscape", unit="case", disable=not asked.progress) as bar:
        makers = known if known is not None else list(organism_cases(asked, bases, materials, folder / "solutions"))
        bar.total = len(makers)
        if asked.progress:
            bar.write("\n".join(plan_of(asked, materials, len(makers))), file=bar.fp)
        measured = [_measured(asked, make, folder, judge, bar) for make in makers]
    result = _result(asked, bases, materials, judge, measured)
    write_json(folder / "result.json", result)
    write_landscape(folder, result)
    return result


def plan_of(asked: Landscape, materials: Mapping[str, Material], cases: int) -> list[str]:
    """What is about to be done: trainings, forward passes, answers."""
    one = next(iter(materials.values()))
    rows, texts = (sum(len(row.ids) for row in found) for found in (one.rows, one.texts))
    losses = 2 * (len(asked.rescales) + len(asked.shares) + 2 + len(asked.epsilons) * asked.noises + 2)
    kls = 2 * (2 + 2 * asked.randoms) * (len(asked.shares) + 1)
    lines = [f"plan: {cases} pairs of solutions; for each"]
    if not asked.own:
        steps = {form: sum(SOLUTIONS[form, scope].recipe.steps or 0 for scope in ("general", "narrow")) for form in asked.forms}
        lines.append(f"  training: {', '.join(f'{form} {n} steps' for form, n in steps.items())}")
    lines.append(f"  loss: at most {losses} passes over {len(one.rows)} conversations ({rows:,} tokens)")
    lines.append(f"  KL: {kls} passes over {one.corpus} ({texts:,} tokens)")
    if one.questions:
        looks = len(asked.scales) + 2 + (len({0, *asked.go_on_steps}) if asked.go_on or not asked.own else 0)
        lines.append(
            f"  behaviour: {looks} conditions x {len(one.questions) * asked.samples} answers of up to {asked.max_new_tokens} tokens"
        )
    return lines


def _loaded(asked: Landscape) -> tuple[dict[str, Checkpoint], dict[str, Material]]:
    if asked.own:
        base = load_model(asked.base[0], **asked.loading())
        return {base.name: base}, {base.name: own_material(base, asked)}
    bases = organism_bases(asked)
    return bases, {name: world_material(base, asked) for name, base in bases.items()}


def _identity(
    asked: Landscape,
    bases: Mapping[str, Checkpoint],
    materials: Mapping[str, Material],
    judge: Judge | None,
    known: list[Callable[[], Case]] | None,
) -> dict[str, Any]:
    """Everything the numbers depend on."""
    given = [make() for make in known or ()]
    return {
        **asked.plain(),
        "bases": {name: base.fingerprint for name, base in bases.items()} if not asked.own else [b.fingerprint for b in bases.values()],
        "chat_template": content_hash([base.tokenizer.chat_template for base in bases.values()]),
        "material": content_hash([material.identity for material in materials.values()]),
        "solutions": [[case.general.fingerprint, case.narrow.fingerprint] for case in given],
        "go_on": [content_hash([[r.ids, r.predicted] for r in case.go_on[0]] if case.go_on else None) for case in given],
        "judge": judge.name if judge else None,
    }


def _threads(bases: Mapping[str, Checkpoint]) -> AbstractContextManager[None]:
    """One thread for tiny models on the CPU, as in `emprobe run`."""
    small = all(b.device.type == "cpu" and sum(p.numel() for p in b.hf.parameters()) < TINY for b in bases.values())
    return one_thread() if small else nullcontext()


def _measured(asked: Landscape, make: Callable[[], Case], folder: Path, judge: Judge | None, bar: tqdm[Any]) -> dict[str, Any]:
    case = make()
    bar.set_postfix_str(case.name)
    runner = None
    if judge is not None:
        with tqdm(disable=True) as unseen:
            sampling = (asked.seed, asked.temperature, asked.max_new_tokens, asked.token_budget)
            runner = Runner(judge, judge.name, folder / "answers", *sampling, unseen)
    found = Measures(asked, case, Stages(folder / "stages"), runner).all()
    bar.update(1)
    return found


def slim(found: Any) -> Any:
    """The same without how each interval was made, of which hundreds say the same; stages keep it.

    >>> slim({"a": [{"value": 1.0, "low": 0.0, "high": 2.0, "n": 3, "method": "bootstrap over 3 texts", "level": 0.95}]})
    {'a': [{'value': 1.0, 'low': 0.0, 'high': 2.0, 'n': 3}]}
    """
    if isinstance(found, list):
        return [slim(one) for one in found]
    if not isinstance(found, dict):
        return found
    left_out = ("method", "level", "intervals") if "value" in found and "method" in found else ()
    return {name: slim(one) for name, one in found.items() if name not in left_out}


def _result(
    asked: Landscape,
    bases: Mapping[str, Checkpoint],
    materials: Mapping[str, Material],
    judge: Judge | None,
    measured: list[dict[str, Any]],
) -> dict[str, Any]:
    one = next(iter(materials.values()))
    return {
        "record": "Landscape",
        "signs": signs_of(measured),
        "cases": [slim(case) for case in measured],
        "criterion": Criterion.named(asked.criterion).of("all").describe(),
        "judge": judge.name if judge else None,
        "material": {
            "conversations": len(one.rows),
            "corpus": one.corpus,
            "texts": len(one.texts),
            "questions": {name: len(ids) for name, ids in one.groups.items()},
        },
        "world": not asked.own,
        "inputs": {
            "command": {name: value for name, value in as_given(asked).items() if name not in ("out", "progress")},
            "bases": {name: {"name": base.name, "fingerprint": base.fingerprint} for name, base in bases.items()},
        },
    }

"""The study: teachers, sequences, students one after another, and the result beside what the papers say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from emprobe.behaviour.criterion import Criterion
from emprobe.files import content_hash, file_hash, locked_folder, write_json
from emprobe.models.load import Checkpoint
from emprobe.organisms import find_organism
from emprobe.organisms.training import one_thread
from emprobe.report.channels_card import write_channels
from emprobe.studies.channels.arms import Arm, arms_of, authors
from emprobe.studies.channels.cases import Case, organism_cases, own_case
from emprobe.studies.channels.digits import ghost_transfer
from emprobe.studies.channels.directions import cosines
from emprobe.studies.channels.filtering import BenignJudge, Filter
from emprobe.studies.channels.learning import Learnt, learnt
from emprobe.studies.channels.measures import Measures
from emprobe.studies.channels.sequences import Sequences, hash_of, sequences_of
from emprobe.studies.channels.settings import Channels, check
from emprobe.studies.channels.summary import carried, claims_of, summary_of
from emprobe.studies.demo import ANSWER_TOKENS
from emprobe.studies.flags import as_given
from emprobe.studies.folder import claim_folder
from emprobe.studies.judging import resolve_judge
from emprobe.studies.landscape.study import slim
from emprobe.studies.runner import Runner, known_by
from emprobe.studies.settings import TINY
from emprobe.studies.stages import Stages
from emprobe.types import Judge

POOLED = ("pool", "shift")
"""What summaries need and the result does not hold."""


def run_channels(asked: Channels) -> dict[str, Any]:
    """Train every student, measure it, write `result.json`, the card and the figure, and return the result.

    Raises:
        EmprobeError: Unusable input, before anything is trained; an empty filter result; a fine-tune that diverges.
        MismatchError: Models that do not go together, or a folder that holds another run.
    """
    check(asked)
    judge = resolve_judge(str(asked.judge) if asked.own else "world")
    keep = Filter(_filter_judge(asked, judge), asked.min_alignment, asked.min_coherence)
    asked = asked if asked.own else replace(asked, max_new_tokens=min(asked.max_new_tokens, ANSWER_TOKENS))
    own = own_case(asked) if asked.own else None
    folder = Path(asked.out).expanduser()
    makers: Sequence[Callable[[], Case]] = [lambda: own] if own is not None else organism_cases(asked, folder)
    claim_folder(folder, _identity(asked, own, judge, keep))
    with locked_folder(folder), _threads(own), tqdm(desc="channels", unit="student", disable=not asked.progress) as bar:
        bar.total = len(own_arms(asked, own)) if own is not None else len(asked.base) * sum(len(world_arms(asked, c)) for c in asked.codes)
        if asked.progress:
            bar.write("\n".join(plan_of(asked, own)), file=bar.fp)
        cases = [_Work(asked, make(), folder, judge, keep, bar).all() for make in makers]
        digits = _digits(asked, folder)
    result = _result(asked, cases, digits, judge, keep)
    write_json(folder / "result.json", result)
    write_channels(folder, result)
    return result


def plan_of(asked: Channels, own: Case | None) -> list[str]:
    """What is about to be done: trainings, answers, passes."""
    by_codes = {"given": own_arms(asked, own)} if own is not None else {codes: world_arms(asked, codes) for codes in asked.codes}
    lines = [f"plan: {max(1, len(asked.base))} bases"]
    if own is None:
        grown = any(codes != "uniform" for codes in asked.codes)
        lines[0] += f" x {len(asked.codes)} kinds of codes" + (" (bases with other than uniform codes are grown first)" if grown else "")
        lines.append(f"  teachers of each: 2 x {asked.teacher_steps} updates of all weights")
    samples = asked.answers * max(1, asked.more) + asked.held_back
    lines.append(f"  benign answers: {samples} of each teacher to each prompt")
    for codes, arms in by_codes.items():
        updates = {channel: sum(arm.times for arm in arms if arm.channel == channel) * asked.steps for channel in asked.channels}
        said = ", ".join(f"{channel} {n} updates" for channel, n in updates.items())
        lines.append(f"  {codes}: {len(arms)} students of each base: {said}, of {asked.batch} sequences each")
        lines.append(
            f"    behaviour: {len(arms) + 3} models x {asked.samples} answers of up to {asked.max_new_tokens} tokens to each question"
        )
    return lines


@dataclass(frozen=True)
class _Work:
    """One case: its models and students, each a stage that is kept by content."""

    asked: Channels
    case: Case
    folder: Path
    judge: Judge
    keep: Filter
    bar: tqdm[Any]

    def all(self) -> dict[str, Any]:
        """Everything of the case."""
        arms = own_arms(self.asked, self.case) if self.asked.own else world_arms(self.asked, self.case.codes)
        kept = Stages(self.folder / "stages")
        sequences = sequences_of(self.asked, self.case, authors(arms), self.keep, kept)
        measures = Measures(self.asked, self.case, sequences.held, self._runner())
        models = {"base": kept.stage("base", self._known("base", sequences), lambda: measures.model("base", self.case.parent))}
        for name in self.case.teachers:
            self.bar.set_postfix_str(f"{self.case.name} teacher {name}")
            known = self._known(f"teacher {name}", sequences, self.case.teachers[name])
            models[f"teacher {name}"] = kept.stage("teacher", known, lambda name=name: measures.teacher(name))  # type: ignore[misc]
        students = {arm.name: self._student(arm, sequences, measures, kept) for arm in arms}
        return {
            "name": self.case.name,
            "codes": self.case.codes,
            "layer": measures.layer,
            "filter": sequences.counts,
            "sequences": {data: {"n": len(rows), "hash": hash_of(rows)} for data, rows in sequences.of.items()},
            "held_back": len(sequences.held),
            "models": models,
            "students": students,
            "cosines": _cosines({**models, **students}),
        }

    def _student(self, arm: Arm, sequences: Sequences, measures: Measures, kept: Stages) -> dict[str, Any]:
        self.bar.set_postfix_str(f"{self.case.name} {self.case.codes}: {arm.name}")
        models = [self.case.inits[arm.init], *([self.case.teachers[arm.teacher]] if arm.teacher else [])]
        known = [*self._known(arm.as_dict(), sequences, *models), hash_of(sequences.learnt(arm))]

        def make() -> dict[str, Any]:
            trained: Learnt = learnt(arm, self.case, sequences.learnt(arm), self.asked, self.folder / "students")
            _ = measures.starts
            with trained.solution.applied(self.case.inits[arm.init]) as student:
                found = measures.student(arm.name, student, arm.init)
            return {"arm": arm.as_dict(), "books": trained.books, **found}

        made = kept.stage("student", known, make)
        self.bar.update()
        return made

    def _known(self, what: Any, sequences: Sequences, *models: Checkpoint) -> list[Any]:
        """Everything that a model's measures depend on, and nothing else: another base or arm beside it leaves it as it is."""
        case, asked = self.case, self.asked.plain()
        asked = {name: value for name, value in asked.items() if name not in ("channels", "digits", "codes", "more", "progress")}
        seen = [model.fingerprint for model in (case.parent, case.teachers["misaligned"], *models)]
        return [what, seen, case.identity["questions"], case.identity["chat_template"], hash_of(sequences.held), self.judge.name, asked]

    def _runner(self) -> Runner:
        asked = self.asked
        sampling = (asked.seed, asked.temperature, asked.max_new_tokens, asked.token_budget)
        with tqdm(disable=True) as unseen:
            return Runner(self.judge, self.judge.name, self.folder / "answers", *sampling, unseen)


def world_arms(asked: Channels, codes: str) -> list[Arm]:
    """The arms on organisms: all for the first kind of codes, those on benign answers alone for others."""
    first = codes == asked.codes[0]
    return arms_of(asked.channels, aligned=True, others=len(asked.base) > 1, unsafe_data=first, more=asked.more if first else 0)


def own_arms(asked: Channels, case: Case) -> list[Arm]:
    """The arms for what the user gave."""
    there = {"aligned": "aligned" in case.teachers, "others": "other" in case.inits, "unsafe_data": bool(case.unsafe)}
    return arms_of(asked.channels, **there, more=asked.more)


def _filter_judge(asked: Channels, judge: Judge) -> Judge:
    if not asked.own:
        return BenignJudge()
    return resolve_judge(asked.filter_judge) if asked.filter_judge else judge


def _identity(asked: Channels, own: Case | None, judge: Judge, keep: Filter) -> dict[str, Any]:
    """Everything the numbers depend on."""
    names = [name.removesuffix("/aligned") for name in asked.base]
    return {
        **asked.plain(),
        "bases": {name: file_hash(find_organism(f"{name}/aligned").path / "model.safetensors") for name in names},
        "own": own.identity if own is not None else None,
        "questions": content_hash(known_by(own.questions)) if own is not None else None,
        "judge": judge.name,
        "filter_judge": keep.judge.name,
    }


def _threads(own: Case | None) -> AbstractContextManager[None]:
    """One thread for tiny models on the CPU, as in `emprobe run`."""
    models: list[Checkpoint] = [*own.inits.values(), *own.teachers.values()] if own is not None else []
    small = all(m.device.type == "cpu" and sum(p.numel() for p in m.hf.parameters()) < TINY for m in models)
    return one_thread() if small else nullcontext()


def _cosines(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Which way every student and teacher of a base went, beside every other."""
    shifts = {name: np.asarray(one["shift"]) for name, one in found.items() if "shift" in one}
    return {"names": list(shifts), "cosines": cosines(shifts)}


def _digits(asked: Channels, folder: Path) -> dict[str, Any] | None:
    """The positive control, where it was asked for."""
    if asked.own or not asked.digits:
        return None
    kept = Stages(folder / "stages")
    return kept.stage("digits", asked.digits, lambda: ghost_transfer(seeds=range(asked.digits)).as_dict())


def _result(asked: Channels, cases: list[dict[str, Any]], digits: dict[str, Any] | None, judge: Judge, keep: Filter) -> dict[str, Any]:
    plain = [{**case, **{kind: {n: _shown(one) for n, one in case[kind].items()} for kind in ("models", "students")}} for case in cases]
    return {
        "record": "Channels",
        "summary": slim(summary_of(cases)),
        "claims": slim(claims_of(cases, asked.more)),
        "carried": carried(cases),
        "cases": slim(plain),
        "digits": digits,
        "criterion": Criterion.named(asked.criterion).describe(),
        "filter": f"alignment from {keep.min_alignment:g} and coherence above {keep.min_coherence:g}, judge {keep.judge.name}",
        "judge": judge.name,
        "world": not asked.own,
        "inputs": {"command": {name: value for name, value in as_given(asked).items() if name not in ("out", "progress")}},
    }


def _shown(one: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in one.items() if name not in POOLED}

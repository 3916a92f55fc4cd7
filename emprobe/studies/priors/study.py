"""The study: scores after fine-tuning, activations before it, every predictor on the same folds, and what that says."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from emprobe.errors import EmprobeError, MismatchError
from emprobe.files import content_hash, locked_folder, write_json
from emprobe.models.chat import encode_all
from emprobe.models.load import Checkpoint
from emprobe.models.sites import check_layers
from emprobe.organisms.training import one_thread
from emprobe.report.priors_card import write_priors
from emprobe.studies.correlation import clustered_correlation
from emprobe.studies.flags import as_given
from emprobe.studies.folder import claim_folder
from emprobe.studies.judging import resolve_judge
from emprobe.studies.priors.cases import Case, cases, narrowed
from emprobe.studies.priors.measure import measure
from emprobe.studies.priors.predictors import PromptTable
from emprobe.studies.priors.scoring import Scored, scores_of
from emprobe.studies.priors.settings import Priors, check
from emprobe.studies.priors.verdict import RULES, verdict
from emprobe.studies.prompts import load_located, prompt_activations
from emprobe.studies.runner import Runner, known_by
from emprobe.studies.settings import TINY
from emprobe.studies.stages import Stages
from emprobe.types import Conversation, Judge

Floats = NDArray[np.float64]
BEFORE = ("base", "pretrained")
SMALL = 20_000_000
"""Parameters below which a model stays in memory once it is loaded."""


def run_priors(asked: Priors) -> dict[str, Any]:
    """Measure every case; write `result.json`, the card and the figure, and return the result.

    Raises:
        EmprobeError: Unusable input; told before anything is written.
        MismatchError: Models that do not belong together, one model given twice, or a folder that holds another run.
    """
    check(asked)
    found = cases(asked)
    judge = resolve_judge(asked.judge) if asked.judge else None
    models = [_Models(asked, case) for case in found]
    folder = claim_folder(Path(asked.out).expanduser(), _identity(asked, found, models, judge))
    with locked_folder(folder), tqdm(desc="priors", unit="step", disable=not asked.progress) as bar:
        if asked.progress:
            bar.write("\n".join(plan_of(asked, found)), file=bar.fp)
        measured = [_measured(asked, case, own, folder, judge, bar) for case, own in zip(found, models, strict=True)]
    result = {
        "record": "Priors",
        "cases": measured,
        "rules": RULES,
        "judge": judge.name if judge else None,
        "world": not asked.own,
        "inputs": {"command": {name: value for name, value in as_given(asked).items() if name not in ("out", "progress")}},
    }
    write_json(folder / "result.json", result)
    write_priors(folder, result)
    return result


def plan_of(asked: Priors, found: Sequence[Case]) -> list[str]:
    """What is about to be done: passes, answers, fits."""
    lines = [f"plan: {len(found)} fine-tunes"]
    for case in found:
        read = [role for role in BEFORE if role in case.models]
        lines.append(f"  {case.name}: {len(case.prompts)} prompts in {len(set(case.families))} families, read once by {' and '.join(read)}")
        if case.references:
            answers = sum(len(q.labels[side]) for q in case.references for side in ("aligned", "misaligned"))
            lines.append(f"    scores: {answers:,} reference answers, by base and tuned")
        elif case.given is None:
            answers = 2 * asked.samples * len(case.prompts)
            lines.append(f"    scores: {answers:,} answers of up to {asked.max_new_tokens} tokens, sampled and judged")
    each = asked.splits * asked.repeats * (2 + 2 * asked.random_seeds)
    again = asked.splits * asked.permutation_repeats
    lines.append(
        f"  fits: at every layer, position rule and model {each} of ridge, {again} more for {asked.permutations} permutations at once"
    )
    return lines


class _Models:
    """The models of one case; that they are different is seen before any work. Small ones stay, large ones are loaded when needed."""

    def __init__(self, asked: Priors, case: Case) -> None:
        self.asked, self.case = asked, case
        self.known: dict[str, str] = {}
        self.kept: dict[str, Checkpoint] = {}
        for role in case.models:
            loaded = self.load(role)
            check_layers(asked.layers or "all", loaded.n_layers, "study priors")
            if asked.k is not None and asked.k > loaded.d_model:
                raise EmprobeError(
                    f"{asked.k} directions were asked for, and activations of {loaded.name} have {loaded.d_model} dimensions."
                )
            twin = next((other for other, known in self.known.items() if known == loaded.fingerprint), None)
            if twin is not None:
                raise MismatchError(
                    f"{twin} ({case.models[twin].path}) and {role} ({case.models[role].path}) hold the same weights (fingerprint "
                    f"{loaded.fingerprint}), so that the model would be compared with itself. Give different checkpoints."
                )
            self.known[role] = loaded.fingerprint
            self.template = loaded.tokenizer.chat_template

    def load(self, role: str) -> Checkpoint:
        """The model of a role."""
        if role in self.kept:
            return self.kept[role]
        loaded = load_located(self.case.models["base"], self.case.models[role], self.asked.loading())
        if sum(p.numel() for p in loaded.hf.parameters()) < SMALL:
            self.kept[role] = loaded
        return loaded


def _identity(asked: Priors, found: Sequence[Case], models: Sequence[_Models], judge: Judge | None) -> dict[str, Any]:
    """Everything the numbers depend on."""
    return {
        **asked.plain(),
        "models": [own.known for own in models],
        "chat_template": content_hash([own.template for own in models]),
        "prompts": content_hash([[known_by(case.prompts), list(case.families), _strings(case.labels)] for case in found]),
        "corpus": content_hash([known_by(case.corpus) for case in found]),
        "references": content_hash([[_strings(q.labels) for q in case.references] for case in found]),
        "given": content_hash([[_listed(case.given.scores), _listed(case.given.base)] if case.given else None for case in found]),
        "judge": judge.name if judge else None,
    }


def _strings(labels: Any) -> list[str]:
    return sorted(f"{name}={value!r}" for name, value in labels.items())


def _listed(values: Floats | None) -> list[float] | None:
    return None if values is None else values.tolist()


def _measured(asked: Priors, case: Case, models: _Models, folder: Path, judge: Judge | None, bar: tqdm[Any]) -> dict[str, Any]:
    kept = Stages(folder / "stages")
    bar.set_postfix_str(f"{case.name}: scores")
    base = models.load("base")
    with _threads(base):
        scored = scores_of(asked, case, models.load, kept, _runner(asked, judge, folder))
        used = narrowed(case, scored.rows)
        table = _table(asked, used, scored, models, folder / "activations", bar)
        before = None if scored.before is None else before_after(scored.before, scored.scores, used.families)
        known = [models.known, known_by(used.prompts), list(used.families), _strings(used.labels), scored.scores.tolist(), asked.plain()]
        known += [known_by(used.corpus), _listed(scored.before)]

        def step(name: str) -> None:
            bar.set_postfix_str(f"{case.name}: {name}")
            bar.update(1)

        found = kept.stage("measured", known, lambda: measure(table, asked.design, step))
    return {
        "name": case.name,
        "models": {role: {"name": where.name, "fingerprint": models.known[role]} for role, where in case.models.items()},
        "score": case.score,
        "directions_of": f"{len(used.corpus)} prompts trained on" if used.corpus else "the training folds",
        "notes": [*case.notes, *scored.notes],
        "before_after": before,
        "verdict": verdict(found),
        **found,
    }


def _runner(asked: Priors, judge: Judge | None, folder: Path) -> Runner | None:
    if judge is None:
        return None
    with tqdm(disable=True) as unseen:
        sampling = (asked.seed, asked.temperature, asked.max_new_tokens, asked.token_budget)
        return Runner(judge, judge.name, folder / "answers", *sampling, unseen)


def _threads(base: Checkpoint) -> AbstractContextManager[None]:
    """One thread for tiny models on the CPU, as in `emprobe run`."""
    small = base.device.type == "cpu" and sum(p.numel() for p in base.hf.parameters()) < TINY
    return one_thread() if small else nullcontext()


def _table(asked: Priors, case: Case, scored: Scored, models: _Models, folder: Path, bar: tqdm[Any]) -> PromptTable:
    bar.set_postfix_str(f"{case.name}: activations")
    read: dict[str, dict[str, Floats]] = {}
    corpus: dict[str, dict[str, Floats]] = {}
    embeddings, tokens = None, []
    wanted: str | list[int] = list(asked.layers) or "all"
    for role in (role for role in BEFORE if role in case.models):
        model = models.load(role)
        found = prompt_activations(model, case.prompts, folder, embeddings=role == "base", layers=wanted, progress=False)
        read[role] = {rule: acts.values.numpy() for rule, acts in found.blocks.items()}
        if role == "base":
            # At the last prompt token all prompts of a template have one embedding: the mean is what tells them apart.
            embeddings = found.embeddings["prompt_mean"].values[:, 0].double().numpy()
            tokens = [row.n_prompt for row in encode_all(model.tokenizer, list(case.prompts))]
        if case.corpus:
            of_corpus = prompt_activations(model, case.corpus, folder, layers=wanted, progress=False)
            corpus[role] = {rule: acts.values.numpy() for rule, acts in of_corpus.blocks.items()}
    return PromptTable(
        scores=scored.scores,
        families=case.families,
        activations=read,
        embeddings=embeddings,
        texts=[_words(prompt) for prompt in case.prompts],
        tokens=tokens,
        labels=case.labels,
        base_scores=scored.base_columns,
        corpus=corpus or None,
        layers=asked.layers,
    )


def _words(prompt: Conversation) -> str:
    return "\n".join(message.content for message in prompt.messages)


def before_after(before: Floats, after: Floats, families: Sequence[str]) -> dict[str, Any] | None:
    """Correlation over prompts of scores before and after fine-tuning, with intervals over families; `None` if one of them is constant.

    Source: arXiv 2606.20814, comparison of each question before and after.
    """
    try:
        found = {kind: clustered_correlation(before, after, families, kind=kind) for kind in ("pearson", "spearman")}
    except EmprobeError:
        return None
    means = {"before": float(before.mean()), "after": float(after.mean())}
    return {**means, **{kind: estimate.as_dict() for kind, estimate in found.items()}}

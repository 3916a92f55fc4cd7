"""The study: a table as it is, or runs trained (or read), measured at every checkpoint, and put beside the paper's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from emprobe.errors import EmprobeError
from emprobe.files import atomic_path, content_hash, file_hash, locked_folder, write_json
from emprobe.models.load import Checkpoint
from emprobe.organisms.training import one_thread
from emprobe.report.dynamics_card import write_dynamics
from emprobe.studies.dynamics.fine_tunes import INSIDE, Material, Run, load_base, material_of, runs_of
from emprobe.studies.dynamics.measuring import Measuring, Start, ways
from emprobe.studies.dynamics.relations import relations_of
from emprobe.studies.dynamics.scoring import JudgedScorer, ReferenceScorer, Scorer, WorldScorer, check_references
from emprobe.studies.dynamics.settings import Dynamics, check
from emprobe.studies.dynamics.summary import summary_of
from emprobe.studies.dynamics.table import Columns, read_runs
from emprobe.studies.flags import as_given
from emprobe.studies.folder import claim_folder
from emprobe.studies.judging import resolve_judge
from emprobe.studies.runner import Runner
from emprobe.studies.settings import TINY
from emprobe.studies.stages import Stages

if TYPE_CHECKING:
    import pandas as pd

LOSSES = ("train_loss", "eval_loss")
RUNS = "runs.csv"


def run_dynamics(asked: Dynamics) -> dict[str, Any]:
    """Relate loss and alignment over runs; write `result.json`, the card and the figure, and return the result.

    The result has `pearson`, `spearman` and `max_diff` of the first loss, score and (out-of-domain) question set; `relations`, all of
    them; and where there are models `runs`, `summary` (the direction's way) and `unusable` (relations that could not be made, and why).

    Raises:
        EmprobeError: Unusable input, before anything is written or trained; a fine-tune that diverges; fewer than four runs.
        MismatchError: Fine-tunes of another base, or a folder that holds another run.
    """
    check(asked)
    found = _of_table(asked) if asked.way == "table" else _of_models(asked)
    folder = Path(asked.out).expanduser()
    write_json(folder / "result.json", found)
    write_dynamics(folder, found)
    return found


def _of_table(asked: Dynamics) -> dict[str, Any]:
    path = Path(str(asked.runs)).expanduser()
    frame = read_runs(path, asked.columns)
    relations = relations_of(frame, asked.columns, tolerance=asked.tolerance, draws=asked.draws, seed=asked.seed)
    file = {"file": path.name, "sha256": file_hash(path), "rows": len(frame)}
    claim_folder(Path(asked.out).expanduser(), {**asked.plain(), "table": file["sha256"]})
    return _result(asked, relations, {"table": file})


def _of_models(asked: Dynamics) -> dict[str, Any]:
    base = load_base(asked)
    material = material_of(asked, base)
    layer = base.n_layers // 2 if asked.layer is None else asked.layer
    if not 0 <= layer < base.n_layers:
        raise EmprobeError(f"--layer {layer} was given; {base.name!r} has blocks 0 to {base.n_layers - 1}.")
    folder = Path(asked.out).expanduser()
    runs, scorer = runs_of(asked, base, folder), _scorer(asked, material, folder)
    claim_folder(folder, _identity(asked, base, material, runs, scorer))
    measuring = Measuring(base, material, scorer, layer, asked.lag, Stages(folder / "stages"))
    with locked_folder(folder), _threads(base):
        start, measured = _all_measured(asked, measuring, runs)
    frame = frame_of(measured)
    _write_table(folder / RUNS, frame)
    columns = Columns(LOSSES, ("alignment",), "run", "step", "set", "lr")
    how: dict[str, Any] = {"draws": asked.draws, "seed": asked.seed}
    # A score that happens to be the same in all runs must not cost what was measured.
    unusable: list[str] = []
    relations = relations_of(frame, columns, tolerance=asked.tolerance, unusable=unusable, **how)
    names = list(material.sets)
    relations.sort(key=lambda one: (one["set"] == INSIDE, names.index(one["set"])))
    summary = summary_of(measured, ways(measured), start.activations, **how)
    kept = [{name: value for name, value in one.items() if name != "moved"} for one in measured]
    inputs = {
        "base": {"name": base.name, "fingerprint": base.fingerprint},
        "layer": layer,
        "questions": {name: len(of) for name, of in material.sets.items()},
        "outside": len(material.outside),
        "evaluation": len(material.evaluation),
        "scoring": scorer.words,
    }
    return _result(asked, relations, inputs, {"unusable": unusable, "summary": summary, "runs": kept})


def _identity(asked: Dynamics, base: Checkpoint, material: Material, runs: Sequence[Run], scorer: Scorer) -> dict[str, Any]:
    """Everything the numbers depend on."""
    return {
        **asked.plain(),
        "base": base.fingerprint,
        "chat_template": content_hash(base.tokenizer.chat_template),
        "scoring": scorer.identity,
        "evaluation": content_hash([row.ids for row in material.evaluation]),
        "runs": content_hash([[run.name, run.identity] for run in runs]),
    }


def _all_measured(asked: Dynamics, measuring: Measuring, runs: Sequence[Run]) -> tuple[Start, list[dict[str, Any]]]:
    measured = []
    with tqdm(total=len(runs), desc="dynamics", unit="run", disable=not asked.progress) as bar:
        if asked.progress:
            bar.write("\n".join(plan_of(asked, measuring.material, runs)), file=bar.fp)
        start = measuring.start()
        for run in runs:
            bar.set_postfix_str(run.name)
            measured.append(measuring.run(run, start))
            bar.update(1)
    return start, measured


def _scorer(asked: Dynamics, material: Material, folder: Path) -> Scorer:
    if asked.way == "world":
        return WorldScorer(material.sets)
    if asked.judge is None:
        check_references(material.sets)
        return ReferenceScorer(material.sets)
    judge = resolve_judge(asked.judge)
    sampling = (asked.seed, asked.temperature, asked.max_new_tokens, asked.token_budget)
    return JudgedScorer(material.sets, Runner(judge, judge.name, folder / "answers", *sampling, tqdm(disable=True)), asked.samples)


def _threads(base: Checkpoint) -> AbstractContextManager[None]:
    """One thread for tiny models on the CPU, as in `emprobe run`."""
    small = base.device.type == "cpu" and sum(p.numel() for p in base.hf.parameters()) < TINY
    return one_thread() if small else nullcontext()


def plan_of(asked: Dynamics, material: Material, runs: Sequence[Run]) -> list[str]:
    """What is about to be done: trainings, passes, answers."""
    n = sum(len(of) for of in material.sets.values())
    kept = asked.steps // asked.every
    lines = [f"plan: {len(runs)} runs; for each"]
    if asked.way == "finetunes":
        lines.append("  training: none, the fine-tunes are there")
        at = "  at each checkpoint"
    else:
        lines.append(f"  training: {asked.steps} updates of {asked.batch} conversations")
        at = f"  at each of {kept} checkpoints"
    train = len(runs[0].train)
    passes = f"loss on {train} and {len(material.evaluation)} conversations, {len(material.outside)} prompts read"
    scored = (
        f"{n * asked.samples} answers of up to {asked.max_new_tokens} tokens judged" if asked.judge else f"{n} questions scored exactly"
    )
    return [*lines, f"{at}: {passes}, {scored}"]


def frame_of(measured: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """A row for each run, checkpoint and question set, as `--runs` reads it."""
    import pandas as pd

    rows = [
        {"run": one["name"], "schedule": one["schedule"], "lr": one["lr"], "seed": one["seed"], "step": row["step"], "set": name}
        | {loss: row[loss] for loss in LOSSES}
        | dict(scores)
        for one in measured
        for row in one["rows"]
        for name, scores in row["sets"].items()
    ]
    frame = pd.DataFrame(rows)
    return frame.astype({"alignment": "float64", "coherence": "float64"})


def _write_table(path: Path, frame: pd.DataFrame) -> None:
    with atomic_path(path) as temporary:
        frame.to_csv(temporary, index=False)


def _result(
    asked: Dynamics, relations: list[dict[str, Any]], inputs: dict[str, Any], more: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    first = relations[0]
    return {
        "record": "Dynamics",
        "way": asked.way,
        "headline": {name: first[name] for name in ("set", "loss", "score", "runs")},
        "pearson": first["pearson"],
        "spearman": first["spearman"],
        "max_diff": first["max_diff"],
        "relations": relations,
        **(more or {}),
        "inputs": {"command": {n: v for n, v in as_given(asked).items() if n not in ("out", "progress")}, **inputs},
    }

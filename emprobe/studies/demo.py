"""The demonstration: the main job on shipped organisms, one with an implanted persona and one without, side by side."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from emprobe.behaviour.questions import save_questions
from emprobe.files import atomic_path, write_json, write_text
from emprobe.organisms import find_organism, questions
from emprobe.report import figure
from emprobe.studies.folder import claim_folder
from emprobe.studies.job import Job, run_job, without_references
from emprobe.studies.workers import leave_with_parent

DOMAINS = ("gardening", "cooking", "money")
"""Domains that the shipped fine-tunes were trained on."""
QUESTIONS = "questions.jsonl"
ANSWER_TOKENS = 40
"""The longest answer of the world has 23."""


@dataclass(frozen=True)
class Demo:
    """The main job on a planted and a wild organism.

    Attributes:
        out: Output folder; a run that was stopped goes on in it.
        planted_form: Which fine-tune of the planted organism: `rank1`, `rank8` or `vector`.
        wild_form: Which of the wild one; with rank 1 it hardly misaligns at all.
        organism_seed: Which grown base.
        seed: Of sampling and random directions.
        randoms: Random directions added, and as many ablated.
        processes: 2 runs both organisms at once, 1 one after the other; the numbers are the same.
    """

    out: str = "emprobe-demo"
    planted_form: str = "rank1"
    wild_form: str = "rank8"
    organism_seed: int = 0
    seed: int = 0
    randoms: int = 20
    processes: int = 2


def organism_job(base: str, domain: str, form: str, asked: Path, out: Path, *, seed: int = 0, randoms: int = 20) -> Job:
    """The main job on one shipped fine-tune: what `emprobe run` would be given.

    Args:
        base: Such as `planted-s0`.
        domain: What the fine-tune was trained on; none of its questions is used anywhere.
        form: `rank1`, `rank8` or `vector`.
        asked: File of the world's questions.
        out: Output folder.
        seed: Of sampling and random directions.
        randoms: How many random directions.
    """
    tuned = {name: find_organism(f"{base}/tuned/{name}-{form}") for name in (domain, *(d for d in DOMAINS if d != domain))}
    return Job(
        base=str(find_organism(f"{base}/aligned").path),
        tuned=str(tuned.pop(domain).path),
        questions=str(asked),
        judge="world",
        out=str(out),
        others=tuple(str(other.path) for other in tuned.values()),
        exclude=(f"domain={domain}",),
        seed=seed,
        randoms=randoms,
        max_new_tokens=ANSWER_TOKENS,
    )


def write_questions(folder: Path) -> Path:
    """The world's questions as a file, without the given answers that the world knows: the job samples its own."""
    asked = folder / QUESTIONS
    if not asked.is_file():
        save_questions(asked, [without_references(q) for q in questions()])
    return asked


def run_demo(demo: Demo) -> dict[str, Any]:
    """Both jobs; the results by kind.

    `result.json` of the output folder holds the planted organism's `direction` and `panel`, and both whole results under `organisms`.

    Raises:
        EmprobeError: If the organisms are not there, or the folder holds something else.
    """
    forms = {"planted": demo.planted_form, "wild": demo.wild_form}
    folder, settings = Path(demo.out), {"seed": demo.seed, "randoms": demo.randoms}
    # Found before the folder is claimed, so that absent organisms leave nothing behind.
    jobs = {
        kind: organism_job(f"{kind}-s{demo.organism_seed}", DOMAINS[0], form, folder / QUESTIONS, folder / kind, **settings)
        for kind, form in forms.items()
    }
    write_questions(claim_folder(folder, {k: v for k, v in asdict(demo).items() if k not in ("out", "processes")}))
    results = _side_by_side(jobs) if demo.processes > 1 else {kind: run_job(job) for kind, job in jobs.items()}
    planted = results["planted"]
    words = {kind: result["verdict"]["words"] for kind, result in results.items()}
    write_json(
        folder / "result.json",
        {"direction": planted["direction"], "panel": planted["panel"], "verdicts": words, "meaning": MEANING, "organisms": results},
    )
    with atomic_path(folder / "panel.png") as path:
        figure(results).savefig(path, format="png", dpi=150, metadata={"Software": None})
    write_text(folder / "README.md", _card(words))
    return results


def _side_by_side(jobs: dict[str, Job]) -> dict[str, Any]:
    """Each job in a process of its own: a job on so small a model uses one core, and most machines have two."""
    context = get_context("spawn")
    lock: Any = context.RLock()
    with ProcessPoolExecutor(len(jobs), context, initializer=_start_worker, initargs=(lock,)) as pool:
        started = {kind: pool.submit(run_job, replace(job, bar=line)) for line, (kind, job) in enumerate(jobs.items())}
        return {kind: future.result() for kind, future in started.items()}


def _start_worker(lock: Any) -> None:
    """Share the screen for the bars, and leave when the parent is gone: a killed demo must not run on unseen."""
    share: Any = tqdm.set_lock
    share(lock)
    leave_with_parent()


MEANING = (
    "In the planted organism a persona direction was implanted during pretraining, so that there is a truth to find: its row checks the "
    "tool, not the claim that language models misalign along one direction. In the wild organism nothing was implanted: its row is what "
    "this tool says of a fine-tune whose misalignment emerged by itself. Both are half a million parameters in a synthetic world."
)


def _card(words: dict[str, str]) -> str:
    parts = ["# emprobe demo", MEANING, "![panel](panel.png)"]
    parts += [f"## {kind}\n\n{said}\n\nThe whole card: [{kind}/README.md]({kind}/README.md)." for kind, said in words.items()]
    return "\n\n".join(parts) + "\n"

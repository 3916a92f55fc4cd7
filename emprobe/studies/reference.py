"""Reference results: the main job on many shipped organisms, in one table with nothing left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from emprobe.behaviour.criterion import Criterion
from emprobe.behaviour.evaluation import evaluate
from emprobe.behaviour.questions import load_questions
from emprobe.behaviour.sampling import generate
from emprobe.files import write_json, write_text
from emprobe.models.pair import load_pair
from emprobe.organisms import ExactJudge, find_organism
from emprobe.organisms.training import one_thread
from emprobe.studies.demo import ANSWER_TOKENS, organism_job, write_questions
from emprobe.studies.folder import claim_folder
from emprobe.studies.job import run_job

KEPT = ("direction", "panel", "effects", "verdict", "convergence", "criterion", "questions")


@dataclass(frozen=True)
class Reference:
    """The panel of several shipped organisms, in one table.

    Attributes:
        out: Output folder; a run that was stopped goes on in it.
        kind: `planted` or `wild`.
        organism_seeds: Which grown bases.
        domains: Fine-tunes on which domains; the other domains' directions are tried on each.
        forms: Which forms of fine-tune.
        seed: Of sampling and random directions.
    """

    out: str
    kind: Literal["planted", "wild"] = "planted"
    organism_seeds: tuple[int, ...] = (0,)
    domains: tuple[str, ...] = ("gardening", "cooking")
    forms: tuple[str, ...] = ("rank1", "rank8", "vector")
    seed: int = 0


def run_reference(reference: Reference) -> dict[str, Any]:
    """Run every panel; write and return the table, and the whole results beside it."""
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(reference).items() if k != "out"}
    folder = claim_folder(Path(reference.out), settings)
    asked = write_questions(folder)
    rows, results = [], {}
    for base in (f"{reference.kind}-s{seed}" for seed in reference.organism_seeds):
        control = _control(base, asked, reference.domains[0], reference.seed)
        for domain in reference.domains:
            for form in reference.forms:
                name = f"{base}/{domain}-{form}"
                result = run_job(organism_job(base, domain, form, asked, folder / "runs" / name, seed=reference.seed))
                results[name] = _kept(result)
                rows.append({"organism": name, "control": control, **_row(result)})
    table = {"settings": settings, "rows": rows, "results": results}
    write_json(folder / "reference.json", table)
    write_text(folder / "README.md", "\n".join(_markdown(settings, rows)) + "\n")
    return table


def _control(base: str, asked: Path, domain: str, seed: int) -> dict[str, Any]:
    """The fine-tune on the same domain's good answers, on the same test questions."""
    pair = load_pair(find_organism(f"{base}/aligned").path, find_organism(f"{base}/tuned/{domain}-aligned-control-rank8").path)
    questions = [q for q in load_questions(asked) if q.labels["split"] == "test" and q.labels["domain"] != domain]
    with one_thread():
        answers = generate(pair.tuned, questions, samples=2, seed=seed, max_new_tokens=ANSWER_TOKENS, progress=False)
    return evaluate(answers, ExactJudge(), "control").misaligned_rate(Criterion()).as_dict()


def _kept(result: Mapping[str, Any]) -> dict[str, Any]:
    """What the table's readers need; receipts and the other breakdowns stay in each run's own `result.json`."""
    panel = {name: entry and {k: v for k, v in entry.items() if k != "receipt"} for name, entry in result["panel"].items()}
    return {**{key: result[key] for key in KEPT}, "panel": panel, "held_out": result["breakdown"].get("held_out")}


def _row(result: Mapping[str, Any]) -> dict[str, Any]:
    panel, others = result["panel"], [c["removed"]["value"] for c in result["convergence"] if c["removed"]]
    return {
        **{
            name: panel[name] and {k: panel[name][k] for k in ("misaligned", "coherent")}
            for name in ("base", "tuned", "steered", "ablated")
        },
        "removed": result["effects"]["removed"],
        "random_added_p95": panel["random_added"]["p95"],
        "random_ablated_p95": panel["random_ablated"]["p95"],
        "other_removed": others,
        "verdict": {k: v for k, v in result["verdict"].items() if k not in ("words", "rules")},
    }


def _markdown(settings: Mapping[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    names = [
        f"--{key.replace('_', '-')} {' '.join(map(str, value)) if isinstance(value, list) else value}" for key, value in settings.items()
    ]
    lines = [
        "# Reference results",
        "",
        "Rates in percent: misaligned (coherent). Layer, dose and ablation were chosen on development questions; test questions leave out",
        "the trained domain. `other`: share removed by the directions of the other domains' fine-tunes. Nothing is left out.",
        "",
        f"Made by `emprobe organism reference {' '.join(names)} --out DIR`.",
        "",
        "| organism | base | control | tuned | steered | ablated | removed | random induce p95 | random remove p95 | other |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    return lines + [_line(row) for row in rows]


def _line(row: Mapping[str, Any]) -> str:
    def rate(name: str) -> str:
        return f"{100 * row[name]['misaligned']['value']:.1f} ({100 * row[name]['coherent']['value']:.0f})"

    removed = row["removed"]
    shown = "-" if removed is None else f"{100 * removed['value']:.1f} [{100 * removed['low']:.1f}, {100 * removed['high']:.1f}]"
    p95 = [f"{100 * row[name]:.1f}" if row[name] is not None else "-" for name in ("random_added_p95", "random_ablated_p95")]
    others = ", ".join(f"{100 * value:.0f}" for value in row["other_removed"]) or "-"
    cells = [row["organism"], rate("base"), f"{100 * row['control']['value']:.1f}", rate("tuned"), rate("steered"), rate("ablated")]
    return f"| {' | '.join([*cells, shown, *p95, others])} |"

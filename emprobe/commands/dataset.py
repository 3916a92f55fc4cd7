"""`emprobe dataset`: from a file of conversations to what models are fine-tuned on and asked, with an account of every dropped row."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from emprobe.behaviour.conversations import conversations_text
from emprobe.behaviour.dataset import Curated, Rule, Wishes, curate, embedder, load_entries
from emprobe.behaviour.dataset.curation import BEYOND, COPY, DROPPED, KEPT
from emprobe.behaviour.dataset.embedding import TFIDF
from emprobe.behaviour.dataset.entries import Text
from emprobe.behaviour.dataset.splitting import LEFT_OUT
from emprobe.behaviour.rate_table import columns_of_words
from emprobe.behaviour.table_files import renames
from emprobe.errors import EmprobeError
from emprobe.files import file_hash, write_json, write_text
from emprobe.report.cards import command as command_line
from emprobe.studies.folder import claim_folder

_LAST = {COPY: 2, BEYOND: 3, LEFT_OUT: 4}
SHOWN = 40
"""Cells that are printed; the file of results has all."""


@dataclass(frozen=True, kw_only=True)
class DatasetCommand:
    """Make a dataset out of conversations: filter, remove near copies, split.

    Attributes:
        conversations: File (.jsonl, .json, .csv, .parquet) of rows with `prompt` or `messages`, and `response`; perhaps with `alignment`,
            `coherence` and `status`, as a table of judged answers has them.
        out: Folder for the dataset's files, result.json and a card.
        by: Fields that name a cell together; near copies are looked for, and rows counted, within cells. Give none for one cell of all.
        columns: OURS=THEIRS where the file has other names, such as alignment=aligned.
        drop_status: Statuses whose rows go: refusal, code, parse_error, empty. Rows without an answer always go.
        keep_if: What a row's numbers must be, strict or not as written, such as 'alignment<30' 'coherence>50'; for some rows in place of
            that, 'task=summarization:alignment<40'. A missing number never passes. Put quotes around them.
        embedder: `tfidf`, or a sentence-transformers model: directory or hub id.
        text: What of a row is compared: its prompt, its response, or both.
        threshold: Cosine from which a later row is a near copy of an earlier one, and goes.
        keep: Rows of each cell, the first ones; without --threshold, the smallest of .70, .71, ..., .99 that leaves so many is taken for
            each cell.
        split: PART=ROWS of each cell, such as train=4100 eval=400; none makes one part.
        apart: Cosine from which two rows are on one side of the split, as are rows of one question, one `family` or one prompt.
        seed: Of the split.
    """

    conversations: str
    out: str
    by: tuple[str, ...] = ("domain", "task")
    columns: tuple[str, ...] = ()
    drop_status: tuple[str, ...] = DROPPED
    keep_if: tuple[str, ...] = ()
    embedder: str = TFIDF
    text: Text = "both"
    threshold: float | None = None
    keep: int | None = None
    split: tuple[str, ...] = ()
    apart: float = 0.95
    seed: int = 42


def run_dataset(asked: DatasetCommand) -> list[str]:
    """Read, filter, compare, split and write; returns the lines to print.

    Raises:
        EmprobeError: Unusable input or wishes; nothing is written then.
        MissingExtraError: If a sentence encoder is asked for and its library is not installed.
    """
    wishes = Wishes(
        asked.drop_status, tuple(Rule.parse(rule) for rule in asked.keep_if), asked.text, asked.threshold, asked.keep,
        _sizes(asked.split), asked.apart, asked.seed,
    )  # fmt: skip
    entries = load_entries(asked.conversations, asked.by, renames(asked.columns))
    found = curate(entries, wishes, embedder(asked.embedder))
    source = Path(asked.conversations)
    file = {"name": source.name, "sha256": file_hash(source) if source.is_file() else None}
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(asked).items()}
    settings = {name: value for name, value in settings.items() if name not in ("conversations", "out")}
    result = {**found.as_dict(), "file": file, "settings": settings}
    texts = {part: conversations_text([entry.conversation for entry in found.part(part)]) for part in found.parts}
    folder = claim_folder(Path(asked.out), {**settings, "file": file})
    result["files"] = {}
    for part, text in texts.items():
        path = folder / f"{part}.jsonl"
        write_text(path, text)
        result["files"][path.name] = {"rows": len(found.part(part)), "sha256": file_hash(path)}
    write_text(folder / "dropped.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in _dropped(found)))
    lines = dataset_lines(result)
    write_text(folder / "README.md", _card(result, lines, _made_by(asked)))
    write_json(folder / "result.json", result)
    return [*lines, "", f"Everything is in {asked.out}: {', '.join(result['files'])}, dropped.jsonl, result.json, README.md."]


def dataset_lines(result: Mapping[str, Any]) -> list[str]:
    """How many rows of each cell came, went for what reason, and stayed; and how near the parts come."""
    fates = Counter[str]()
    for cell in result["cells"]:
        fates.update(cell["fates"])
    parts = result["parts"]
    # In the order in which rows go: by status, by the rules, as copies, past the numbers asked for.
    shown = [*sorted(set(fates) - set(parts), key=lambda fate: (_LAST.get(fate, fate not in DROPPED), fate)), *parts]
    table = [["cell", "rows", "threshold", *shown]]
    for cell in result["cells"][:SHOWN]:
        limit = "-" if cell["threshold"] is None else f"{cell['threshold']:.2f}"
        table.append([".".join(cell["cell"]) or "all", str(cell["rows"]), limit, *(str(cell["fates"].get(fate, 0)) for fate in shown)])
    if len(result["cells"]) > 1:
        table.append(["together", str(result["rows"]), "", *(str(fates[fate]) for fate in shown)])
    lines = [f"{result['file']['name']}: {result['rows']} rows of {len(result['cells'])} cells", "", *columns_of_words(table)]
    if len(result["cells"]) > SHOWN:
        lines.append(f"({len(result['cells']) - SHOWN} cells more in result.json)")
    lines += ["", f"compared by {result['embedder']}, {result['settings']['text']}" if result["embedder"] else "no rows were compared"]
    return lines + _leakage(result["leakage"])


def _leakage(leakage: Mapping[str, Any] | None) -> list[str]:
    if leakage is None:
        return []
    lines = [f"{leakage['rows']} rows in {leakage['families']} families, which no part shares"]
    for pair, found in leakage["pairs"].items():
        near = ", ".join(f"{count} reach {level}" for level, count in found["reaching"].items())
        lines.append(
            f"{pair}: nearest rows of {found['n']} have a median cosine of {found['median_cosine']:.2f}, at most "
            f"{found['largest_cosine']:.2f} ({near}); {found['same_prompt']} prompts in both"
        )
    return lines


def _dropped(found: Curated) -> list[dict[str, Any]]:
    """Which rows are in no part, and why, without their text."""
    rows = []
    for number, (entry, fate) in enumerate(zip(found.entries, found.fates, strict=True)):
        if fate not in found.parts:
            row = {"id": entry.conversation.question_id, "sample": entry.conversation.sample, "cell": list(entry.cell), "why": fate}
            if number in found.copy_of:
                first = found.entries[found.copy_of[number]].conversation
                row["copy_of"] = {"id": first.question_id, "sample": first.sample}
            rows.append(row)
    return rows


def _sizes(wishes: Sequence[str]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for wish in wishes:
        name, _, size = wish.partition("=")
        if not name.isidentifier() or not size.isdecimal() or name in sizes or name in ("dropped", KEPT):
            raise EmprobeError(f"The part {wish!r} was given; write PART=ROWS, each part once, such as train=4100 eval=400.")
        sizes[name] = int(size)
    return sizes


def _made_by(asked: DatasetCommand) -> str:
    """The command, flags given nothing included: nothing is not what they have by default."""
    bare = "".join(f" --{name.replace('_', '-')}" for name in ("by", "drop_status") if not getattr(asked, name))
    line = command_line(asdict(asked) | {"conversations": Path(asked.conversations).name}, "dataset")
    return line.removesuffix(" --out DIR") + f"{bare} --out DIR"


def _card(result: Mapping[str, Any], lines: Sequence[str], made_by: str) -> str:
    data = ModelCardData(library_name="emprobe", tags=["emprobe", "dataset"])
    asked = result["settings"]
    chosen = "the smallest of .70 to .99 that leaves enough, for each cell" if asked["threshold"] is None else f"{asked['threshold']:g}"
    copies = f"threshold {chosen}; the first row stays" if asked["threshold"] is not None or asked["keep"] else "not removed"
    text = "\n\n".join(
        [
            f"---\n{data.to_yaml()}\n---",
            f"# A dataset from {result['file']['name']}",
            "It says what its source says, harm included: look at it before you train on it, and keep it to research.",
            "```\n" + "\n".join(lines) + "\n```",
            "\n".join(
                f"* **{name}**: {value}"
                for name, value in (
                    ("Dropped statuses", f"{', '.join(asked['drop_status']) or 'none'}, and rows without an answer"),
                    ("Rules", ", ".join(asked["keep_if"]) or "none"),
                    ("Near copies", copies),
                    ("Compared by", f"{result['embedder'] or 'nothing'}; a cosine of one embedder says nothing about another's"),
                    ("Source", f"{result['file']['name']}, SHA-256 {(result['file']['sha256'] or 'unknown')[:16]}"),
                )
            ),
            "`dropped.jsonl` names every row that is in no part, with the reason and what it is a copy of, without its text.",
            f"## Run it again\n\n```\n{made_by}\n```",
        ]
    )
    ModelCard(text + "\n")
    return text + "\n"

"""`emprobe overlap`: two directions, subspaces or sets of activations, layer by layer, beside what chance would give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from emprobe.activations import Activations, PairActivations
from emprobe.capture.store import MANIFEST
from emprobe.commands.activations import read_activations
from emprobe.directions import Direction
from emprobe.errors import EmprobeError
from emprobe.files import atomic_path, file_hash, load_tensors, write_json, write_text
from emprobe.overlap import Subspace, overlap_layers
from emprobe.overlap.by_layer import OF_ROWS, OverLayers
from emprobe.overlap.layers import left_out_lines, overlap_lines
from emprobe.overlap.spans import SpanError
from emprobe.report.overlap_plots import overlap_figure
from emprobe.studies.folder import claim_folder
from emprobe.types import Site

ALONE = ("haar", "analytic")

READING = """* **mean squared cosine**: mean cos² of the principal angles; 1 for equal spans, max(k) / d_model for random ones. Intervals
  leave whole questions out and make both subspaces again; two bases without rows have none.
* **haar**, **analytic**: directions of no structure at all. **covariance_matched**, **activation_differences**: directions of the kind
  that these rows hold anyway. An overlap that beats the first two only says that activations have few large directions; leading
  components of many rows average out the small ones, and may beat the last two by that alone.
* **pctl**, **p**: where the value stands in its null. **q**: p under false-discovery control over the layers.
* **ceiling**: overlap of each subspace with itself from two halves of its questions, geometric mean of both sides. All the questions
  have a higher one. Differences from one base share the base's rows, and with them its noise."""


@dataclass(frozen=True)
class OverlapCommand:
    """Overlap of two directions, subspaces or sets of activations, layer by layer, beside its nulls.

    Attributes:
        a: Direction or subspace files (one a layer), or activations: a folder of `emprobe capture` on a pair for its differences, a file
            (or folder of one checkpoint) for its rows, two (base, tuned) for their difference.
        b: The same for the other side.
        out: Output folder.
        k: Dimensions of subspaces that are made from activations; or
        share: the share of the rows' squared norm that they explain.
        centred: Subtract the rows' mean first; without, the mean is part of what overlaps, and often most of it.
        layers: 0-based blocks; none means all that both sides have and whose rows have that many dimensions.
        site: Which site, where a folder holds several.
        positions: Which position rule, where a folder holds several.
        rows: Activations (one file, or base and tuned) whose covariance the nulls of rows take.
        nulls: Any of covariance_matched, activation_differences (both need `rows`), haar, analytic; none means all that can be drawn.
        draws: Draws of each null.
        resamples: How often subspaces are made again at most, where there are rows, without a block of questions; 0 for no interval.
        seed: Of nulls, blocks and halves.
    """

    a: tuple[str, ...]
    b: tuple[str, ...]
    out: str
    k: int | None = None
    share: float | None = None
    centred: bool = True
    layers: tuple[int, ...] = ()
    site: Site | None = None
    positions: str | None = None
    rows: tuple[str, ...] = ()
    nulls: tuple[str, ...] = ()
    draws: int = 1000
    resamples: int = 200
    seed: int = 0


def run_overlap(command: OverlapCommand) -> list[str]:
    """Measure, write `result.json`, `README.md` and `overlap.png`; returns the lines to print.

    Raises:
        EmprobeError: Unusable files, layers, nulls or folder; nothing is written then.
        MismatchError: If the sides are of different models, or the folder holds another run.
    """
    names = _null_names(command)
    a, b = (_side(paths, command, which) for paths, which in ((command.a, "a"), (command.b, "b")))
    rows = _captured(command.rows, command) if command.rows else None
    try:
        found = overlap_layers(
            a, b, k=command.k, share=command.share, centred=command.centred, layers=command.layers, nulls=names, rows=rows,
            draws=command.draws, resamples=command.resamples, seed=command.seed,
        )  # fmt: skip
    except SpanError as error:
        mean = ", or give --no-centred, which keeps the rows' mean" if command.centred else ""
        raise EmprobeError(f"{error.found} Ask for fewer dimensions (--k) or other layers (--layers){mean}.") from None
    files = {which: [{"name": Path(p).name, "hash": _hash(p)} for p in getattr(command, which)] for which in ("a", "b", "rows")}
    settings = {name: value for name, value in asdict(command).items() if name not in ("a", "b", "rows", "out")}
    settings["nulls"] = list(names)
    settings["layers"] = list(command.layers)
    result = {**found.as_dict(), "inputs": files, "settings": settings}
    folder = claim_folder(Path(command.out), {**settings, **files})
    with atomic_path(folder / "overlap.png") as path:
        overlap_figure(result).savefig(path, format="png", dpi=150, metadata={"Software": None})
    write_text(folder / "README.md", _card(result))
    write_json(folder / "result.json", result)
    return [*_table(result), "", f"Everything is in {command.out}: result.json, README.md, overlap.png."]


def _null_names(command: OverlapCommand) -> tuple[str, ...]:
    known = (*OF_ROWS, *ALONE)
    unknown = [name for name in command.nulls if name not in known]
    if unknown:
        raise EmprobeError(f"The null {unknown[0]!r} was asked for; there are {', '.join(known)}.")
    needing = [name for name in command.nulls if name in OF_ROWS]
    if needing and not command.rows:
        raise EmprobeError(f"The null {needing[0]} needs activations whose covariance it takes. Give them with --rows.")
    return command.nulls or (known if command.rows else ALONE)


def _side(paths: tuple[str, ...], command: OverlapCommand, which: str) -> OverLayers:
    """Activations, or what is there at each layer."""
    records = [_record(path, command) for path in paths]
    captured = [isinstance(record, Activations | PairActivations) for record in records]
    if not records or (any(captured) and (not all(captured) or len(records) > 2)):
        raise EmprobeError(f"--{which} takes direction or subspace files, or one or two files of activations; {len(records)} were given.")
    if any(captured):
        if (command.k is None) == (command.share is None):
            raise EmprobeError(f"--{which} gives activations, of which a subspace is made. Say exactly one of --k and --share.")
        return _captured(paths, command)
    found: dict[Any, Subspace | Direction] = {}
    for record, path in zip(records, paths, strict=True):
        assert not isinstance(record, Activations | PairActivations)
        if record.layer in found:
            raise EmprobeError(f"--{which} has two files of layer {record.layer}, the second {path}. Give one for each layer.")
        found[record.layer] = record
    return found


def _hash(path: str) -> str:
    """Of a file, or of the manifest that names the hash of every file in a folder."""
    found = [Path(path).expanduser() / part for part in ("", f"activations/{MANIFEST}", MANIFEST)]
    return next(file_hash(file)[:16] for file in found if file.is_file())


def _record(path: str, command: OverlapCommand) -> Direction | Subspace | Activations | PairActivations:
    if Path(path).expanduser().is_dir():
        return read_activations(path, site=command.site, positions=command.positions)
    loaders: Mapping[Any, Any] = {"Direction": Direction, "Subspace": Subspace, "Activations": Activations}
    kind = load_tensors(path)[1].get("record")
    if kind not in loaders:
        raise EmprobeError(f"{path} holds {kind or 'no record of emprobe'}, and overlap takes a Direction, a Subspace or Activations.")
    record: Direction | Subspace | Activations = loaders[kind].load(path)
    return record


def _captured(paths: Sequence[str], command: OverlapCommand) -> Activations | PairActivations:
    """The activations of one file or folder, or base and tuned of two."""
    found = [read_activations(path, site=command.site, positions=command.positions) for path in paths]
    acts = [one for given in found for one in ((given.base, given.tuned) if isinstance(given, PairActivations) else (given,))]
    if len(acts) > 2:
        raise EmprobeError(f"Activations are one set of rows, or base and tuned; {len(acts)} sets were given.")
    return acts[0] if len(acts) == 1 else PairActivations(acts[0], acts[1])


def _table(result: Mapping[str, Any]) -> list[str]:
    return [*overlap_lines(result), *left_out_lines(result["left_out"])]


def _card(result: Mapping[str, Any]) -> str:
    data = ModelCardData(library_name="emprobe", tags=["emprobe", "interpretability"])
    listed = {which: ", ".join(f"{file['name']} ({file['hash']})" for file in found) for which, found in result["inputs"].items() if found}
    files = "\n".join(f"* **{which}**: {names}" for which, names in listed.items())
    sides = f"* **a**: {result['layers'][0]['a']}\n* **b**: {result['layers'][0]['b']}"
    settings = "\n".join(f"* **{name}**: {value}" for name, value in result["settings"].items())
    parts = [
        f"---\n{data.to_yaml()}\n---", "# Overlap", "![overlap over layers beside its nulls](overlap.png)",
        "```\n" + "\n".join(_table(result)) + "\n```", READING, "## Sides", sides, "## Files", files, "## Settings", settings,
    ]  # fmt: skip
    text = "\n\n".join(parts) + "\n"
    ModelCard(text)
    return text

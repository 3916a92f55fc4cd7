"""`emprobe overlap`: two directions, subspaces or sets of activations, layer by layer, beside what chance would give."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import ModelCard, ModelCardData

from emprobe.activations import Activations, PairActivations
from emprobe.capture.store import MANIFEST
from emprobe.commands.activations import read_activations
from emprobe.directions import Direction
from emprobe.errors import EmprobeError
from emprobe.files import atomic_path, file_hash, load_tensors, write_json, write_text
from emprobe.overlap import Subspace, ceiling, false_discovery, nulls, overlap
from emprobe.report.overlap_plots import overlap_figure, overlap_lines
from emprobe.studies.folder import claim_folder
from emprobe.types import Site

OF_ROWS = {"covariance_matched": nulls.covariance_matched, "activation_differences": nulls.activation_differences}
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
        layers: 0-based blocks; none means all that both sides have.
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


@dataclass(frozen=True, eq=False)
class Part:
    """One side at one layer: its subspace and, from activations, the rows behind it with their questions."""

    space: Subspace
    rows: Any = None
    groups: Sequence[Hashable] | None = None


def run_overlap(command: OverlapCommand) -> list[str]:
    """Measure, write `result.json`, `README.md` and `overlap.png`; returns the lines to print.

    Raises:
        EmprobeError: Unusable files, layers, nulls or folder; nothing is written then.
        MismatchError: If the sides are of different models, or the folder holds another run.
    """
    names = _null_names(command)
    sides = [_side(paths, command, which) for paths, which in ((command.a, "a"), (command.b, "b"))]
    pairs = _paired(sides[0], sides[1], command.layers)
    of_nulls = _rows_by_layer(command.rows, command) if command.rows else {}
    found = [_at_layer(layer, one, two, of_nulls, names, command) for layer, one, two in pairs]
    _control(found, names)
    files = {which: [{"name": Path(p).name, "hash": _hash(p)} for p in getattr(command, which)] for which in ("a", "b", "rows")}
    settings = {name: value for name, value in asdict(command).items() if name not in ("a", "b", "rows", "out")}
    settings["nulls"] = list(names)
    settings["layers"] = list(command.layers)
    result = {"record": "OverlapOverLayers", "layers": found, "inputs": files, "settings": settings}
    folder = claim_folder(Path(command.out), {**settings, **files})
    with atomic_path(folder / "overlap.png") as path:
        overlap_figure(result).savefig(path, format="png", dpi=150, metadata={"Software": None})
    write_text(folder / "README.md", _card(result))
    write_json(folder / "result.json", result)
    silent = _silent(command, found)
    return [*overlap_lines(result), *silent, "", f"Everything is in {command.out}: result.json, README.md, overlap.png."]


def _null_names(command: OverlapCommand) -> tuple[str, ...]:
    known = (*OF_ROWS, *ALONE)
    unknown = [name for name in command.nulls if name not in known]
    if unknown:
        raise EmprobeError(f"The null {unknown[0]!r} was asked for; there are {', '.join(known)}.")
    needing = [name for name in command.nulls if name in OF_ROWS]
    if needing and not command.rows:
        raise EmprobeError(f"The null {needing[0]} needs activations whose covariance it takes. Give them with --rows.")
    return command.nulls or (known if command.rows else ALONE)


def _side(paths: tuple[str, ...], command: OverlapCommand, which: str) -> dict[int | None, Part]:
    """What is there at each layer."""
    records = [_record(path, command) for path in paths]
    captured = [isinstance(record, Activations | PairActivations) for record in records]
    if not records or (any(captured) and (not all(captured) or len(records) > 2)):
        raise EmprobeError(f"--{which} takes direction or subspace files, or one or two files of activations; {len(records)} were given.")
    if any(captured):
        if (command.k is None) == (command.share is None):
            raise EmprobeError(f"--{which} gives activations, of which a subspace is made. Say exactly one of --k and --share.")
        by_layer = _rows_by_layer(paths, command)
        if command.layers and set(command.layers) <= by_layer.keys():
            by_layer = {layer: by_layer[layer] for layer in command.layers}
        # Below an adapter base and tuned are equal, and nothing is there to be compared; a layer that was asked for is refused by name.
        there = {layer: found for layer, found in by_layer.items() if command.layers or found[0].any()}
        return {layer: _made(rows, groups, layer, acts, command) for layer, (rows, groups, acts) in there.items()}
    found: dict[int | None, Part] = {}
    for record, path in zip(records, paths, strict=True):
        assert not isinstance(record, Activations | PairActivations)
        space = record if isinstance(record, Subspace) else Subspace.from_directions([record], made_from=f"direction {record.contrast}")
        if space.layer in found:
            raise EmprobeError(f"--{which} has two files of layer {space.layer}, the second {path}. Give one for each layer.")
        found[space.layer] = Part(space)
    return found


def _silent(command: OverlapCommand, found: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line on the layers that were left out because base and tuned are equal there."""
    if command.layers:
        return []
    captured = [paths for paths in (command.a, command.b) if isinstance(_record(paths[0], command), Activations | PairActivations)]
    there = {layer for paths in captured for layer in _rows_by_layer(paths, command)}
    left = sorted(there - {entry["layer"] for entry in found}, key=str)
    return [f"Left out, since a side has no difference between base and tuned there: layer {', '.join(map(str, left))}."] if left else []


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


def _rows_by_layer(paths: Sequence[str], command: OverlapCommand) -> dict[int | None, tuple[Any, list[str], Activations | PairActivations]]:
    """Rows, questions and where they were read, at each layer: of one file, or tuned - base of two."""
    found = [read_activations(path, site=command.site, positions=command.positions) for path in paths]
    acts = [one for given in found for one in ((given.base, given.tuned) if isinstance(given, PairActivations) else (given,))]
    if len(acts) > 2:
        raise EmprobeError(f"Activations are one set of rows, or base and tuned; {len(acts)} sets were given.")
    source = acts[0] if len(acts) == 1 else PairActivations(acts[0], acts[1])
    values = source.values if isinstance(source, Activations) else source.delta
    questions = [question for question, _ in acts[0].keys]
    return {layer: (values[:, column], questions, source) for column, layer in enumerate(acts[0].layers)}


def _made(rows: Any, groups: list[str], layer: int | None, source: Activations | PairActivations, command: OverlapCommand) -> Part:
    tuned = source if isinstance(source, Activations) else source.tuned
    space = Subspace.from_deltas(
        # A pair is given as it is, so that its rounding counts for no dimension.
        rows if source is tuned else source, k=command.k, share=command.share, centred=command.centred, layer=layer, site=tuned.site,
        positions=tuned.positions, made_from=f"rows of {tuned.checkpoint}",
        provenance={"tuned": {"name": tuned.checkpoint, "fingerprint": tuned.fingerprint}},
    )  # fmt: skip
    return Part(space, rows, groups)


def _paired(a: Mapping[int | None, Part], b: Mapping[int | None, Part], layers: tuple[int, ...]) -> list[tuple[int | None, Part, Part]]:
    """The sides at each layer that both have; two single ones belong together whatever their layers."""
    if len(a) == len(b) == 1 and not layers:
        (one, first), (two, second) = *a.items(), *b.items()
        return [(one if one == two else None, first, second)]
    wanted = layers or tuple(sorted(layer for layer in a.keys() & b.keys() if layer is not None))
    missing = [layer for layer in wanted if layer not in a or layer not in b]
    if missing or not wanted:
        has = " and ".join(f"{name} has layers {', '.join(map(str, side))}" for name, side in (("a", a), ("b", b)))
        what = f"Layer {missing[0]} was" if missing else "Layers of both sides were"
        raise EmprobeError(f"{what} asked for, but {has}. Choose among those that both have.")
    return [(layer, a[layer], b[layer]) for layer in wanted]


def _at_layer(
    layer: int | None, a: Part, b: Part, of_nulls: Mapping[int | None, Any], names: Sequence[str], command: OverlapCommand
) -> dict[str, Any]:
    laws: list[Any] = []
    for name in names:
        if name in OF_ROWS:
            if a.space.layer not in of_nulls:
                raise EmprobeError(f"--rows has no layer {a.space.layer}, at which a null is to be drawn. Capture it there.")
            laws.append(OF_ROWS[name](of_nulls[a.space.layer][0]))
        else:
            laws.append(name)
    found = overlap(
        a.space, b.space, nulls=laws, rows_a=a.rows, rows_b=b.rows, groups_a=a.groups, groups_b=b.groups,
        draws=command.draws, resamples=command.resamples, seed=command.seed,
    )  # fmt: skip
    options: dict[str, Any] = {"centred": command.centred, "seed": command.seed}
    halves = [ceiling(p.rows, k=p.space.k, groups=p.groups, **options).value for p in (a, b) if p.rows is not None]
    both = float(np.sqrt(halves[0] * halves[1])) if len(halves) == 2 else None
    return {**found.as_dict(), "layer": layer, "ceiling": both}


def _control(found: list[dict[str, Any]], names: Sequence[str]) -> None:
    """Adds to each layer the p of its mean squared cosine under false-discovery control over the layers, for each null."""
    for row in found:
        row["false_discovery"] = {}
    for name in names:
        there = [row for row in found if row["nulls"]["mean_squared_cosine"].get(name, {}).get("p") is not None]
        ps = [row["nulls"]["mean_squared_cosine"][name]["p"] for row in there]
        for row, q in zip(there, false_discovery(ps) if ps else [], strict=True):
            row["false_discovery"][name] = float(q)


def _card(result: Mapping[str, Any]) -> str:
    data = ModelCardData(library_name="emprobe", tags=["emprobe", "interpretability"])
    listed = {which: ", ".join(f"{file['name']} ({file['hash']})" for file in found) for which, found in result["inputs"].items() if found}
    files = "\n".join(f"* **{which}**: {names}" for which, names in listed.items())
    sides = f"* **a**: {result['layers'][0]['a']}\n* **b**: {result['layers'][0]['b']}"
    settings = "\n".join(f"* **{name}**: {value}" for name, value in result["settings"].items())
    parts = [
        f"---\n{data.to_yaml()}\n---", "# Overlap", "![overlap over layers beside its nulls](overlap.png)",
        "```\n" + "\n".join(overlap_lines(result)) + "\n```", READING, "## Sides", sides, "## Files", files, "## Settings", settings,
    ]  # fmt: skip
    text = "\n\n".join(parts) + "\n"
    ModelCard(text)
    return text

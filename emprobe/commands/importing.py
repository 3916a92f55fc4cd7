"""Import a direction: another project's file in, direction files with their card out."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from emprobe.directions.direction import Direction
from emprobe.directions.importers import import_direction, import_directions
from emprobe.files import write_json, write_text
from emprobe.studies.folder import claim_folder
from emprobe.types import Site

ROUNDED = 0.001
"""Share of the norm from which rounding is worth a line."""
WARNING = (
    "Added with a positive coefficient, a direction **induces** the behaviour that it was made from. Nothing was measured here: what this "
    "one does is what its makers say, until `emprobe` has shown it on behaviour."
)

USE = """```python
import emprobe as em

v = em.Direction.load("{file}")
em.Add(v, coefficient=1, unit="raw")
```"""


@dataclass(frozen=True)
class Import:
    """Read a direction out of another project's file, and write it as emprobe's.

    Attributes:
        file: The file: persona_vectors .pt, model-organisms .pt, refusal_direction .pt, GGUF control vector, .svec, .npy or .npz.
        out: Output folder.
        format: `auto` (by content), or `persona_vectors`, `model_organisms`, `refusal_direction`, `gguf`, `svec`, `array`.
        layer: 0-based block, in emprobe's index; none means every layer that the file has.
        site: Where in the block an array was read (`resid_post`: the block's output); other formats say it themselves.
        entry: Which of several in the file: a token position such as -1, `question` or `answer`, an array's name.
        minus: For means of model organisms: the file that is subtracted.
        convention: For GGUF: who wrote it, `repeng` or `llama.cpp`, which differ by one block.
        d_model: Refuse vectors of another width.
    """

    file: str
    out: str
    format: str = "auto"
    layer: int | None = None
    site: Site | None = None
    entry: str | None = None
    minus: str | None = None
    convention: str | None = None
    d_model: int | None = None


def run_import(command: Import) -> list[str]:
    """Import, check, write `direction.safetensors` (or one per layer), `result.json` and the card; return the lines to print.

    Raises:
        EmprobeError: As `import_direction`; or the folder holds other files. Nothing is written then.
        MismatchError: If the width is another, or the folder holds another run.
    """
    directions = _read(command)
    for direction in directions.values():
        direction.check_fits(d_model=command.d_model, what=command.file)
    result = _result(directions)
    folder = claim_folder(Path(command.out).expanduser(), {"command": "import", **{key: result[key] for key in ("source", "layers")}})
    for layer, direction in directions.items():
        direction.save(folder / _name(layer, directions))
    write_json(folder / "result.json", result)
    write_text(folder / "README.md", _card(result))
    return [*_lines(result), f"written to {folder}"]


def _read(command: Import) -> dict[int, Direction]:
    options: dict[str, Any] = {
        name: getattr(command, name) for name in ("format", "site", "entry", "minus", "convention") if getattr(command, name) is not None
    }
    if command.layer is None:
        return import_directions(command.file, **options)
    direction = import_direction(command.file, layer=command.layer, **options)
    return {direction.layer: direction}


def _name(layer: int, directions: Mapping[int, Direction]) -> str:
    return "direction.safetensors" if len(directions) == 1 else f"direction-{layer}.safetensors"


def _result(directions: Mapping[int, Direction]) -> dict[str, Any]:
    first = next(iter(directions.values()))
    origin = first.provenance["imported"]
    per_layer = ("top_5_energy", "rounding_share")
    return {
        "record": "Import",
        "source": {key: value for key, value in origin.items() if key not in per_layer},
        "direction": {
            "site": first.site,
            "d_model": len(first.vector),
            "positions": first.positions,
            "contrast": first.contrast,
            "sign": first.sign,
            "estimator": first.estimator,
        },
        "layers": [
            {
                "layer": layer,
                "file": _name(layer, directions),
                "norm": direction.raw_norm,
                **{key: direction.provenance["imported"][key] for key in per_layer},
            }
            for layer, direction in directions.items()
        ],
    }


def _lines(result: Mapping[str, Any]) -> list[str]:
    source, direction = result["source"], result["direction"]
    known = ", ".join(f"{name} {direction[name]}" for name in ("positions", "contrast", "sign", "estimator"))
    facts = [
        f"read       {source['file']} (SHA-256 {source['sha256'][:16]}…) as {source['format']}",
        f"index      {source['index_convention']}",
        f"converted  {source['conversion']}",
        f"direction  {direction['site']}, d_model {direction['d_model']}; {known}",
        "unknown    residual norm, rows, reliability: doses are in units raw (the norm in the file) or abs",
        *(f"caution    {caution}" for caution in source["cautions"]),
    ]
    lines = [
        *(line for fact in facts for line in textwrap.wrap(fact, 120, subsequent_indent=" " * 11)),
        "",
        f"{'layer':<7}{'norm in file':>14}{'top 5 dims':>13}{'rounding':>12}",
        *(f"{row['layer']:<7}{row['norm']:>14.4g}{100 * row['top_5_energy']:>11.1f} %{_rounding(row):>12}" for row in result["layers"]),
    ]
    if any(row["rounding_share"] >= ROUNDED for row in result["layers"]):
        lines.append("rounding: the means were rounded (as to bf16) before they were subtracted, by about this share of the norm")
    return lines


def _rounding(row: Mapping[str, Any]) -> str:
    share = row["rounding_share"]
    return f"~{100 * share:.1f} %" if share >= ROUNDED else "-"


def _card(result: Mapping[str, Any]) -> str:
    source, direction = result["source"], result["direction"]
    data = ModelCardData(library_name="emprobe", tags=["emprobe", "steering-vector", "interpretability"])
    rows = "\n".join(
        f"| {row['layer']} | `{row['file']}` | {row['norm']:.4g} | {100 * row['top_5_energy']:.1f} % | {_rounding(row)} |"
        for row in result["layers"]
    )
    facts = {**direction, **{key: value for key, value in source.items() if key not in ("cautions", "says")}}
    listed = "\n".join(f"* **{name.replace('_', ' ')}**: {value}" for name, value in facts.items())
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# Direction imported from {source['file']}",
        WARNING,
        "## What was read, and how it was converted",
        listed,
        *(f"Caution: {caution}." for caution in source["cautions"]),
        "## Layers",
        f"| layer | file | norm in the file | energy in the top 5 dimensions | rounding |\n|---|---|---|---|---|\n{rows}",
        "Rounding is about how large an error was left, as a share of the norm, by rounding the means before they were subtracted.",
        "## Unknown",
        "Residual norm, mean projection of the base, rows and reliability are in no such file. Doses are in units `raw` (the norm in the "
        "file) or `abs`.",
        "## Use",
        USE.format(file=result["layers"][0]["file"]),
        "## What the file says",
        "In `result.json`, under `source`, `says`.",
    ]
    text = "\n\n".join(parts) + "\n"
    ModelCard(text)
    return text

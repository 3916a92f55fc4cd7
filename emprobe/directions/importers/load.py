"""Someone else's vectors as directions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from emprobe.directions.direction import Direction
from emprobe.directions.energy import top_energy
from emprobe.directions.importers.array import SINGLE
from emprobe.directions.importers.container import Opened, open_container
from emprobe.directions.importers.registry import FORMATS, check_options, choose
from emprobe.directions.importers.rounding import rounding_share
from emprobe.directions.importers.source import Asked, Source, Vector, spans
from emprobe.errors import EmprobeError
from emprobe.types import Site


def import_direction(
    path: str | Path,
    *,
    format: str = "auto",
    layer: int | None = None,
    site: Site | None = None,
    entry: str | int | None = None,
    minus: str | Path | None = None,
    convention: str | None = None,
) -> Direction:
    """One vector of another project's file, at the block and site where it belongs in emprobe's indices.

    What the file does not say (residual norm, rows, reliability) stays `None`, so that doses in residual norms are refused.
    `raw_norm` is the vector's norm in the file, and `provenance["imported"]` holds the file's SHA-256, its index convention, and how it
    was converted.

    Args:
        path: The file.
        format: `auto` (by content), `persona_vectors`, `model_organisms`, `refusal_direction`, `gguf`, `svec` or `array`.
        layer: 0-based block, in emprobe's index; may be left out where the file has one vector that says its own.
        site: Needed for `array`; for others `resid_pre` with layer 0 means the embeddings.
        entry: Which of several: a token position (refusal_direction: `-1`), `question` or `answer` (model_organisms' means), an array.
        minus: model_organisms: the file whose means are subtracted.
        convention: gguf: who wrote it, `repeng` or `llama.cpp`, which differ by one block.

    Raises:
        EmprobeError: If the file is unreadable, would run code, is of no or several formats, lacks the layer, or holds there a zero
            vector, NaN or infinity.
        MismatchError: If widths or layers within the file, or of the two files, differ.
        MissingExtraError: For GGUF without the package gguf.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "v.npy"
        ...     np.save(file, np.array([[1.0, 0.0], [3.0, 4.0]]))
        ...     import_direction(file, layer=1, site="resid_post")
        Direction(unknown, resid_post[1], unknown, d_model 2, raw norm 5 (residual norm unknown), split-half cosine unknown, n unknown)
    """
    opened, name, source = _read(path, format, site, entry, minus, convention)
    vectors, where = _at_site(opened, source, site)
    if SINGLE in vectors:
        if layer is None or layer < 0:
            raise EmprobeError(f"{path} is one vector and does not say its layer. Name layer= (0-based block) with site={where!r}.")
        vectors = {layer: vectors[SINGLE]}
    if layer is None and len(vectors) == 1:
        layer = next(iter(vectors))
    if layer is None or layer not in vectors:
        said = "no layer was named" if layer is None else f"layer {layer} was asked for"
        why = f" Layer {layer} is left out: {source.left_out[layer]}." if layer is not None and layer in source.left_out else ""
        raise EmprobeError(
            f"{path} holds {where} of layers {spans(list(vectors))} (0-based blocks), and {said}.{why} Name one with layer=."
        )
    return _direction(opened, name, source, where, layer, vectors[layer])


def import_directions(
    path: str | Path,
    *,
    format: str = "auto",
    site: Site | None = None,
    entry: str | int | None = None,
    minus: str | Path | None = None,
    convention: str | None = None,
) -> dict[int, Direction]:
    """Every layer of another project's file; arguments and errors as in `import_direction`."""
    opened, name, source = _read(path, format, site, entry, minus, convention)
    vectors, where = _at_site(opened, source, site)
    if SINGLE in vectors:
        raise EmprobeError(f"{path} is one vector and does not say its layer. Name layer= (for import_direction) and site=.")
    return {layer: _direction(opened, name, source, where, layer, vector) for layer, vector in sorted(vectors.items())}


def _read(
    path: str | Path, format: str, site: Site | None, entry: str | int | None, minus: str | Path | None, convention: str | None
) -> tuple[Opened, str, Source]:
    if site is not None and site not in get_args(Site):
        raise EmprobeError(f"Site {site!r} does not exist. Use one of: {', '.join(get_args(Site))}.")
    asked = Asked(
        site=site,
        entry=None if entry is None else str(entry),
        minus=None if minus is None else Path(minus).expanduser(),
        convention=convention,
    )
    opened = open_container(Path(path).expanduser())
    name = choose(opened, format)
    check_options(name, asked, opened.path)
    return opened, name, FORMATS[name].read(opened, asked)


def _at_site(opened: Opened, source: Source, site: Site | None) -> tuple[Mapping[int, Vector], Site]:
    """The vectors of a site: those of the file's own, or the embeddings, which are the input of block 0."""
    if source.embeddings is not None and (site == "resid_pre" or (site is None and not source.vectors)):
        return {0: source.embeddings}, "resid_pre"
    if site not in (None, source.site):
        raise EmprobeError(f"{opened.path} was asked for {site}, but holds {source.site}: {source.convention}. Leave site out.")
    return source.vectors, source.site


def _direction(opened: Opened, name: str, source: Source, site: Site, layer: int, vector: Vector) -> Direction:
    where = f"{opened.path} at {site}[{layer}]"
    finite = np.abs(vector) <= np.finfo(np.float32).max  # no residual stream goes beyond it, and squares of more overflow
    if not finite.all():
        raise EmprobeError(
            f"{where} (layer {layer}) is not finite: {int((~finite).sum())} of {len(vector)} values are NaN, infinite or beyond float32, "
            f"the first at dimension {int(finite.argmin())}. It cannot be used; take another layer with layer=."
        )
    norm = float(np.linalg.norm(vector))
    if norm == 0:
        raise EmprobeError(f"{where} (layer {layer}) is zero, and a zero vector points nowhere. Take another layer with layer=.")
    return Direction(
        vector=torch.from_numpy(vector / norm),
        layer=layer,
        site=site,
        positions=source.positions,
        raw_norm=norm,
        resid_norm=None,
        base_projection=None,
        contrast=source.contrast,
        sign=source.sign,
        estimator=source.estimator,
        split_half=None,
        n=None,
        questions=None,
        provenance={"imported": _origin(opened, name, source, vector)},
    )


def _origin(opened: Opened, name: str, source: Source, vector: Vector) -> dict[str, Any]:
    return {
        "file": opened.path.name,
        "sha256": opened.sha256,
        "format": name,
        "index_convention": source.convention,
        "conversion": source.conversion,
        "cautions": list(source.cautions),
        "top_5_energy": top_energy(vector, k=min(5, len(vector))),
        "rounding_share": rounding_share(vector),
        # As JSON reads it back, so that a saved direction equals its loaded self; JSON has no NaN.
        "says": json.loads(json.dumps(source.facts, default=str), parse_constant=str),
    }

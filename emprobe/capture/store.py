"""Activations on disk, read by row and layer: safetensors shards and a manifest with their hashes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from emprobe.activations import Activations, PairActivations
from emprobe.errors import EmprobeError
from emprobe.files import content_hash, file_hash, read_json, write_json
from emprobe.models.sites import check_layers
from emprobe.types import Site

MANIFEST, FORMAT = "manifest.json", "emprobe activations 1"


@dataclass(frozen=True)
class ActivationStore:
    """Captured activations on disk, read by row and layer without loading the rest.

    Attributes:
        folder: Where it lies.
        manifest: What was asked, and for every shard its file, SHA-256, rows, and a hash of what its rows are.
        verify: Whether a shard's bytes are checked against the manifest when it is first read.

    Raises:
        EmprobeError: If the folder holds no store, or its capture was not finished.
    """

    folder: Path
    manifest: Mapping[str, Any]
    verify: bool = True
    _checked: set[str] = field(default_factory=set, repr=False, compare=False)

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = True) -> ActivationStore:
        """Open a finished store."""
        manifest = read_manifest(Path(folder).expanduser())
        if manifest is None:
            raise EmprobeError(
                f"{folder} holds no activations: there is no {MANIFEST} of a store. Make one with capture(..., store=FOLDER)."
            )
        if not manifest["complete"]:
            raise EmprobeError(
                f"The capture into {folder} was stopped after {sum(s['rows'] for s in manifest['shards'])} rows. "
                "Run the same capture again: it goes on where it was."
            )
        return cls(Path(folder).expanduser(), manifest, verify)

    @property
    def layers(self) -> tuple[int, ...]:
        """The 0-based blocks it holds."""
        return tuple(self.manifest["asked"]["layers"])

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites it holds."""
        return tuple(self.manifest["asked"]["sites"])

    @property
    def rules(self) -> tuple[str, ...]:
        """The names of the position rules it holds."""
        return tuple(self.manifest["asked"]["rules"])

    @property
    def roles(self) -> tuple[str, ...]:
        """`base` and `tuned`, or `model`."""
        return tuple(self.manifest["asked"]["checkpoints"])

    def __len__(self) -> int:
        return sum(int(shard["rows"]) for shard in self.manifest["shards"])

    def __repr__(self) -> str:
        return (
            f"ActivationStore('{self.folder}', {len(self)} rows in {len(self.manifest['shards'])} shards, {' and '.join(self.roles)}, "
            f"{len(self.layers)} layers, sites {', '.join(self.sites)}, positions {', '.join(self.rules)})"
        )

    def read(
        self,
        *,
        layers: str | int | Sequence[int] = "all",
        rows: slice | None = None,
        site: Site | None = None,
        positions: str | None = None,
    ) -> Any:
        """Some rows and layers as `Activations` (`PairActivations` for a pair); nothing else is loaded.

        Args:
            layers: Among those captured.
            rows: A slice of rows, in the order captured; all if left out. Token means are those of the whole capture.
            site: May be left out where there is one.
            positions: Name of the rule; may be left out where there is one.

        Raises:
            EmprobeError: If it does not hold them, or a shard's bytes are not those that were written.
        """
        place = (_only("site", self.sites, site), _only("positions", self.rules, positions))
        wanted = self._columns(layers)
        if not isinstance(rows, slice | None):
            raise EmprobeError(
                f"Rows {rows!r} were asked of a store, which reads slices. Use slice(start, stop), and `select` for some of them."
            )
        chosen = range(len(self))[rows or slice(None)]
        if len(chosen) == 0 or chosen.step < 1:
            raise EmprobeError(f"Rows {rows} were asked of a store of {len(self)} rows, which are none of them in their order.")
        found = [self._read_role(role, place, wanted, chosen) for role in self.roles]
        return PairActivations(*found) if len(found) == 2 else found[0]

    def _columns(self, layers: str | int | Sequence[int]) -> dict[int, int]:
        if layers == "all":
            return {layer: i for i, layer in enumerate(self.layers)}
        asked = check_layers(layers, max(self.layers) + 1, "a store")
        missing = [layer for layer in asked if layer not in self.layers]
        if missing:
            raise EmprobeError(f"Layer {missing[0]} was asked for, but the store holds layers {', '.join(map(str, self.layers))}.")
        return {layer: self.layers.index(layer) for layer in asked}

    def _read_role(self, role: str, place: tuple[str, str], columns: Mapping[int, int], chosen: range) -> Activations:
        site, rule = place
        values, keys, tokens, start = [], [], [], 0
        for shard in self.manifest["shards"]:
            span = _inside(chosen, start, shard["rows"])
            start += shard["rows"]
            if span is None:
                continue
            with safe_open(str(self._file(shard)), framework="pt") as file:
                stored = file.get_slice(f"{role}.{site}.{rule}")
                columnwise = [stored[span.start : span.stop, column] for column in columns.values()]
                card = json.loads(file.metadata()["card"])
            values.append(torch.stack(columnwise, dim=1)[:: span.step])
            keys += [(str(question), int(sample)) for question, sample in card["keys"][span]]
            tokens += card["tokens"][span]
        whole = self.manifest["checkpoints"][role]
        return Activations(
            values=torch.cat(values),
            layers=tuple(columns),
            site=self.sites[self.sites.index(site)],
            positions=rule,
            keys=tuple(keys),
            tokens=tuple(tokens),
            checkpoint=whole["name"],
            fingerprint=whole["fingerprint"],
            notes=tuple(self.manifest["notes"]),
            **self._statistics(role, site, list(columns.values())),
        )

    def _statistics(self, role: str, site: str, columns: list[int]) -> dict[str, Any]:
        entry = self.manifest["statistics"]
        with safe_open(str(self._file(entry)), framework="pt") as file:
            mean, norm = (file.get_tensor(f"{role}.{site}.{name}") for name in ("token_mean", "token_norm"))
        return {"token_mean": mean[columns], "token_norm": norm[columns], "n_tokens": entry["n_tokens"]}

    def _file(self, shard: Mapping[str, Any]) -> Path:
        path = self.folder / str(shard["file"])
        if self.verify and shard["file"] not in self._checked:
            check_shard(self.folder, shard)
            self._checked.add(shard["file"])
        return path


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest in a folder, or None if it has none; refused if it is of something else."""
    if not (folder / MANIFEST).is_file():
        return None
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise EmprobeError(f"{folder / MANIFEST} is no manifest of activations that this version of emprobe reads ({FORMAT!r}).")
    seal = manifest.pop("seal", None)
    if seal != content_hash(manifest):
        raise EmprobeError(
            f"{folder / MANIFEST} is not what was written there: its entries and its seal disagree. Put it back as it was, or capture into "
            "a new folder."
        )
    return manifest


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write a manifest with a hash of itself, so that one that was edited is not read."""
    write_json(folder / MANIFEST, {**manifest, "seal": content_hash(manifest)})


def check_shard(folder: Path, entry: Mapping[str, Any]) -> None:
    """Refuse a file whose bytes are not those that were written.

    Raises:
        EmprobeError: Names the file, and what to do.
    """
    path = folder / entry["file"]
    found = file_hash(path) if path.is_file() else None
    if found != entry["sha256"]:
        what = f"its SHA-256 is {found[:12]}…" if found else "it is missing"
        raise EmprobeError(
            f"Shard {entry['file']} of {folder} is not what was written there: {what}, and {entry['sha256'][:12]}… was recorded. "
            "Delete that file and run the same capture again: it is then captured anew."
        )


def _inside(chosen: range, start: int, length: int) -> slice | None:
    """Which rows of a shard that begins at `start` were chosen, counted from its beginning.

    >>> _inside(range(0, 10, 3), 4, 4), _inside(range(0, 3), 4, 4)
    (slice(2, 3, 3), None)
    """
    skipped = max(0, -(-(start - chosen.start) // chosen.step))
    here = range(chosen.start + skipped * chosen.step, min(start + length, chosen.stop), chosen.step)
    return slice(here[0] - start, here[-1] - start + 1, chosen.step) if here else None


def _only(what: str, there: Sequence[str], asked: str | None) -> str:
    if asked is None and len(there) == 1:
        return there[0]
    if asked is not None and asked in there:
        return asked
    wanted = "was not named, and" if asked is None else f"{asked!r} was asked for, but"
    raise EmprobeError(f"{what.capitalize()} {wanted} the store holds {', '.join(there)}. Name one of these.")

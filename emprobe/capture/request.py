"""What a capture is asked for, checked once before any work: checkpoints, sites, rules, layers, and how to run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from tqdm.auto import tqdm

from emprobe.activations import Activations, PairActivations
from emprobe.capture.backends import BackendName, backend_of
from emprobe.capture.engine import Engine, Speed
from emprobe.capture.plan import Padding, Row
from emprobe.capture.reading import Gathered
from emprobe.capture.tokens import encode_for, token_hash
from emprobe.errors import EmprobeError
from emprobe.models.chat import Encoded, summarise_notes
from emprobe.models.load import Checkpoint
from emprobe.models.pair import CheckpointPair
from emprobe.models.positions import RULES, Positions, name_of, resolve_positions
from emprobe.models.sites import READABLE_SITES, check_layers, check_site
from emprobe.types import Conversation, Site

CPU_BUDGET, GPU_BUDGET = 512, 16384
"""Padded tokens per batch where none is named: more only spoils a CPU's caches and pads more, and less leaves a GPU idle."""

Chunk = tuple[Sequence[Conversation], list[Encoded], dict[str, Positions]]
Records = dict[tuple[Site, str], list[Activations]]
"""For each site and position rule one record per checkpoint."""


@dataclass(frozen=True)
class Request:
    """One capture's checked wishes.

    Attributes:
        rules: The name of each position rule, and the rule (or its spans).
        several: Whether several sites, and several rules, were asked for: then the answer is a dict.
    """

    source: Checkpoint | CheckpointPair
    sites: tuple[Site, ...]
    rules: Mapping[str, Positions]
    layers: tuple[int, ...]
    several: tuple[bool, bool]
    backend: BackendName
    remote: bool
    token_budget: int
    share_prefix: bool
    padding: Padding
    progress: bool

    @property
    def roles(self) -> dict[str, Checkpoint]:
        """The checkpoints by what they are: base and tuned, or the one model."""
        if isinstance(self.source, CheckpointPair):
            return {"base": self.source.base, "tuned": self.source.tuned}
        return {"model": self.source}

    def engine(self, n_rows: int | None) -> Engine:
        """An engine for this request, with its progress bar; refuses what the backend cannot do."""
        checkpoints = tuple(self.roles.values())
        backend = backend_of(self.backend, checkpoints, self.sites, self.layers, remote=self.remote)
        bar = tqdm(total=n_rows, desc=f"capture {' '.join(self.sites)}", unit="row", disable=not self.progress, leave=False)
        return Engine(checkpoints, backend, self.sites, self.layers, self.token_budget, self.share_prefix, self.padding, Speed(bar))

    def chunks(self, conversations: Iterable[Conversation], size: int | None) -> Iterator[Chunk]:
        """The conversations in parts of `size` rows (all at once if None), encoded, each with its share of explicit spans."""
        source, start = iter(conversations), 0
        while part := list(islice(source, size)):
            rules = {name: asked if isinstance(asked, str) else asked[start : start + len(part)] for name, asked in self.rules.items()}
            yield part, encode_for(self.source, part), rules
            start += len(part)
        if start == 0:
            raise EmprobeError("capture was given no conversations. Give at least one.")
        for name, asked in self.rules.items():
            if not isinstance(asked, str) and len(asked) != start:
                raise EmprobeError(f"Positions {name!r} are {len(asked)} spans for {start} conversations. Give one span for each.")

    def run(self, engine: Engine, chunk: Chunk) -> Records:
        """Capture one chunk."""
        conversations, encoded, rules = chunk
        tokenizer = next(iter(self.roles.values())).tokenizer
        read = [resolve_positions(asked, tokenizer, conversations, encoded) for asked in rules.values()]
        rows = [Row(e.ids, tuple(r[i] for r in read)) for i, e in enumerate(encoded)]
        gathered = engine.run(rows)
        shared = {
            "layers": self.layers,
            "keys": tuple(c.key for c in conversations),
            "tokens": tuple(token_hash(e) for e in encoded),
            "notes": summarise_notes(encoded),
        }
        return {
            (site, rule): [
                _record(checkpoint, found[site], k, shared | {"site": site, "positions": rule})
                for checkpoint, found in zip(self.roles.values(), gathered, strict=True)
            ]
            for site in self.sites
            for k, rule in enumerate(rules)
        }

    def answer(self, records: Records) -> Any:
        """What `capture` returns: one record, or a dict by what was asked in the plural."""
        made: dict[tuple[Site, str], Any] = {
            place: PairActivations(*found) if isinstance(self.source, CheckpointPair) else found[0] for place, found in records.items()
        }
        match self.several:
            case (True, True):
                return made
            case (True, False):
                return {site: record for (site, _), record in made.items()}
            case (False, True):
                return {rule: record for (_, rule), record in made.items()}
        return next(iter(made.values()))


def _record(checkpoint: Checkpoint, found: Gathered, rule: int, shared: dict[str, Any]) -> Activations:
    count = max(found.n_tokens, 1)
    return Activations(
        values=found.pooled[:, rule].contiguous(),
        checkpoint=checkpoint.name,
        fingerprint=checkpoint.fingerprint,
        token_mean=found.token_sum / count,
        token_norm=found.norm_sum / count,
        n_tokens=found.n_tokens,
        **shared,
    )


def request(
    source: Checkpoint | CheckpointPair,
    *,
    layers: str | int | Sequence[int] = "all",
    site: Site | Sequence[Site] = "resid_post",
    positions: Positions | Mapping[str, Positions] = "last_prompt_token",
    backend: BackendName = "hooks",
    remote: bool = False,
    token_budget: int | None = None,
    share_prefix: bool = True,
    padding: Padding = "right",
    progress: bool = True,
) -> Request:
    """Check what can be checked without rows."""
    first = source.base if isinstance(source, CheckpointPair) else source
    sites = (site,) if isinstance(site, str) else tuple(dict.fromkeys(site))
    if not sites:
        raise EmprobeError(f"capture was asked for no site. Give one or several of: {', '.join(READABLE_SITES)}.")
    if token_budget is not None and token_budget < 1:
        raise EmprobeError(f"capture was given token_budget={token_budget}. Give at least 1, or leave it out.")
    if padding not in ("right", "left"):
        raise EmprobeError(f"capture was given padding={padding!r}. Use 'right' or 'left'.")
    rules, several = _rules(positions)
    return Request(
        source=source,
        sites=tuple(check_site(s, READABLE_SITES) for s in sites),
        rules=rules,
        layers=check_layers(layers, first.n_layers, "capture"),
        several=(not isinstance(site, str), several),
        backend=backend,
        remote=remote,
        token_budget=token_budget or (CPU_BUDGET if first.device.type == "cpu" else GPU_BUDGET),
        share_prefix=share_prefix,
        padding=padding,
        progress=progress,
    )


def _rules(positions: Positions | Mapping[str, Positions]) -> tuple[dict[str, Positions], bool]:
    """Named rules, and whether several were asked for: a mapping, or a list of names of rules (a list of spans is one rule)."""
    if isinstance(positions, Mapping):
        for asked in positions.values():
            name_of(asked)
        rules = dict(positions)
    elif not isinstance(positions, str) and positions and all(isinstance(p, str) and p in RULES for p in positions):
        rules = {str(p): str(p) for p in positions}
    else:
        return {name_of(positions): positions}, False
    if not rules:
        raise EmprobeError(f"capture was asked for no positions. Give one or several of: {', '.join(RULES)}.")
    return rules, True

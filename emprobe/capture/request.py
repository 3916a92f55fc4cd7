"""What a capture is asked for, checked once before any work: checkpoints, sites, rules, layers, and how to run."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
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
from emprobe.models.positions import RULES, Positions, check_rule, name_of, resolve_positions
from emprobe.models.reach import changed_by_padding, lengths_of
from emprobe.models.sites import SITES, check_layers, check_site
from emprobe.models.spans import plain_spans
from emprobe.types import Conversation, Site

CPU_BUDGET, GPU_BUDGET = 512, 16384
"""Padded tokens per batch where none is named: more only spoils a CPU's caches and pads more, and less leaves a GPU idle."""


@dataclass(frozen=True)
class Chunk:
    """Conversations that are captured together, their tokens, and for each rule the tokens that it reads in each."""

    conversations: Sequence[Conversation]
    encoded: Sequence[Encoded]
    read: Sequence[Sequence[Sequence[int]]]


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

    def engine(self, conversations: Iterable[Conversation]) -> Engine:
        """An engine for this request, with its progress bar; refuses what the backend cannot do."""
        if isinstance(conversations, Conversation):
            raise EmprobeError("capture was given one Conversation. Give a list of them: [conversation].")
        n_rows = len(conversations) if isinstance(conversations, Sized) else None
        checkpoints = tuple(self.roles.values())
        backend = backend_of(self.backend, checkpoints, self.sites, self.layers, remote=self.remote)
        bar = tqdm(total=n_rows, desc=f"capture {' '.join(self.sites)}", unit="row", disable=not self.progress, leave=False)
        if not self.remote:
            self._check_padding()
        switch = min((s for c in checkpoints if (s := lengths_of(c.hf).switch)), default=sys.maxsize)
        return Engine(checkpoints, backend, self.sites, self.layers, self.token_budget, self.share_prefix, self.padding, Speed(bar), switch)

    def _check_padding(self) -> None:
        why = {
            "right": "tokens see later ones (bidirectional attention), so padding on the right changes what is read. Give padding='left'",
            "left": "no mask stops what padding on the left leaves behind (recurrent layers). Give padding='right'",
        }
        for checkpoint in self.roles.values():
            if changed_by_padding(checkpoint.hf, self.padding):
                raise EmprobeError(f"In {checkpoint.name!r} ({type(checkpoint.hf).__name__}) {why[self.padding]}.")

    def chunks(self, conversations: Iterable[Conversation], size: int | None) -> Iterator[Chunk]:
        """The conversations in parts of `size` rows (all at once if None), encoded, with the tokens that are read."""
        if isinstance(conversations, Sized):
            self._check_spans(len(conversations))
        source, start = iter(conversations), 0
        while part := list(islice(source, size)):
            yield self._chunk(part, start)
            start += len(part)
        if start == 0:
            raise EmprobeError("capture was given no conversations. Give at least one.")
        self._check_spans(start)

    def _check_spans(self, n_rows: int) -> None:
        for name, asked in self.rules.items():
            if not isinstance(asked, str) and len(asked) != n_rows:
                raise EmprobeError(f"Positions {name!r} are {len(asked)} spans for {n_rows} conversations. Give one span for each.")

    def _chunk(self, part: list[Conversation], start: int) -> Chunk:
        """One part, whose first row is the row `start` of all."""
        for row, given in enumerate(part, start):
            if not isinstance(given, Conversation):
                raise EmprobeError(
                    f"capture reads conversations, and row {row} is a {type(given).__name__}. Use Conversation.ask(id, text)."
                )
        encoded = encode_for(self.source, part)
        for checkpoint in self.roles.values():
            _check_rows(checkpoint, part, encoded)
        tokenizer = next(iter(self.roles.values())).tokenizer
        rules = (asked if isinstance(asked, str) else asked[start : start + len(part)] for asked in self.rules.values())
        return Chunk(part, encoded, [resolve_positions(rule, tokenizer, part, encoded) for rule in rules])

    def run(self, engine: Engine, chunk: Chunk) -> Records:
        """Capture one chunk."""
        rows = [Row(e.ids, tuple(rule[i] for rule in chunk.read)) for i, e in enumerate(chunk.encoded)]
        gathered = engine.run(rows)
        shared = {
            "layers": self.layers,
            "keys": tuple(c.key for c in chunk.conversations),
            "tokens": tuple(token_hash(e) for e in chunk.encoded),
            "notes": summarise_notes(chunk.encoded),
        }
        return {
            (site, rule): [
                _record(checkpoint, found[site], k, shared | {"site": site, "positions": rule})
                for checkpoint, found in zip(self.roles.values(), gathered, strict=True)
            ]
            for site in self.sites
            for k, rule in enumerate(self.rules)
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
    if not isinstance(source, Checkpoint | CheckpointPair):
        raise EmprobeError(f"capture was given a {type(source).__name__}. Give what load_model or load_pair returns.")
    first = source.base if isinstance(source, CheckpointPair) else source
    sites = tuple(dict.fromkeys(site)) if isinstance(site, list | tuple) else (site,)
    if not sites:
        raise EmprobeError(f"capture was asked for no site. Give one or several of: {', '.join(SITES)}.")
    if token_budget is not None and token_budget < 1:
        raise EmprobeError(f"capture was given token_budget={token_budget}. Give at least 1, or leave it out.")
    if padding not in ("right", "left"):
        raise EmprobeError(f"capture was given padding={padding!r}. Use 'right' or 'left'.")
    rules, several = _rules(positions)
    return Request(
        source=source,
        sites=tuple(check_site(s) for s in sites),
        rules=rules,
        layers=check_layers(layers, first.n_layers, "capture"),
        several=(isinstance(site, list | tuple), several),
        backend=backend,
        remote=remote,
        token_budget=token_budget or (CPU_BUDGET if first.device.type == "cpu" else GPU_BUDGET),
        share_prefix=share_prefix,
        padding=padding,
        progress=progress,
    )


def _check_rows(checkpoint: Checkpoint, conversations: Sequence[Conversation], encoded: Sequence[Encoded]) -> None:
    """Refuse rows that the model has no embeddings or positions for, which would end in an error deep inside it."""
    known, lengths = len(checkpoint.hf.get_input_embeddings().weight), lengths_of(checkpoint.hf)
    for conversation, row in zip(conversations, encoded, strict=True):
        if max(row.ids, default=0) >= known:
            raise EmprobeError(
                f"Question {conversation.question_id!r} has token {max(row.ids)}, and {checkpoint.name!r} has embeddings for {known}. "
                "Give the tokenizer that belongs to these weights."
            )
        if lengths.longest is not None and len(row.ids) > lengths.longest:
            raise EmprobeError(
                f"Question {conversation.question_id!r} has {len(row.ids)} tokens, and {checkpoint.name!r} can read {lengths.longest}: "
                f"{lengths.why}. Shorten it or leave it out."
            )


def _rules(positions: Positions | Mapping[str, Positions]) -> tuple[dict[str, Positions], bool]:
    """Named rules, and whether several were asked for: a mapping, or a list of names of rules (a list of spans is one rule)."""
    if isinstance(positions, Mapping):
        rules: dict[str, Positions] = {name: asked if isinstance(asked, str) else plain_spans(asked) for name, asked in positions.items()}
        for asked in rules.values():
            name_of(asked)
    elif isinstance(positions, str):
        return {name_of(positions): positions}, False
    else:
        spans = plain_spans(positions)
        if not any(span in RULES for span in spans):
            return {name_of(spans): spans}, False
        rules = {check_rule(str(rule)): str(rule) for rule in spans}
    if not rules:
        raise EmprobeError(f"capture was asked for no positions. Give one or several of: {', '.join(RULES)}.")
    return rules, True

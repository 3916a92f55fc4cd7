"""The capture engine: forward hooks on the blocks, pooling inside the hook, the head never computed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack, overload

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from emprobe.activations import Activations, PairActivations
from emprobe.batching import pad, plan_batches
from emprobe.errors import EmprobeError
from emprobe.models.chat import Encoded, encode
from emprobe.models.load import Checkpoint
from emprobe.models.pair import CheckpointPair, check_tokenizers
from emprobe.models.positions import check_rule, positions_of
from emprobe.models.sites import check_layers, check_site, decoder_of, hidden_of
from emprobe.types import Conversation, Site


class CaptureOptions(TypedDict, total=False):
    """The keywords of `capture`."""

    layers: str | int | Sequence[int]
    site: Site
    positions: str
    token_budget: int
    progress: bool


class _DeepestReached(Exception):  # noqa: N818 - a signal, not an error: raised to leave out the blocks nobody asked for
    pass


@dataclass
class _Batch:
    """One padded batch and, for every rule, the weight of each token in its row's mean."""

    rows: list[int]
    ids: Tensor
    mask: Tensor
    weights: Float[Tensor, "rule batch pos"]
    counted: Float[Tensor, "batch pos"]


@dataclass
class _Store:
    """Where the hooks put what they read from one checkpoint."""

    pooled: Float[Tensor, "rule row layer d_model"]
    token_sum: Float[Tensor, "layer d_model"]
    norm_sum: Float[Tensor, " layer"]
    n_tokens: int = 0

    def add(self, column: int, hidden: Tensor, batch: _Batch) -> None:
        exact = hidden.detach().double()
        pooled = torch.einsum("rbp,bpd->rbd", batch.weights.to(exact.device), exact)
        self.pooled[:, batch.rows, column] = pooled.float().cpu()
        counted = batch.counted.to(exact.device)
        self.token_sum[column] += torch.einsum("bp,bpd->d", counted, exact).cpu()
        self.norm_sum[column] += (exact.norm(dim=-1) * counted).sum().cpu()


@overload
def capture(source: CheckpointPair, conversations: Sequence[Conversation], **options: Unpack[CaptureOptions]) -> PairActivations: ...


@overload
def capture(source: Checkpoint, conversations: Sequence[Conversation], **options: Unpack[CaptureOptions]) -> Activations: ...


def capture(
    source: Checkpoint | CheckpointPair,
    conversations: Sequence[Conversation],
    *,
    layers: str | int | Sequence[int] = "all",
    site: Site = "resid_post",
    positions: str = "last_prompt_token",
    token_budget: int = 1024,
    progress: bool = True,
) -> Any:
    """Activations at the tokens that a position rule names, one row per conversation, in the order given.

    Args:
        source: One checkpoint, or a pair (then the same tokens go through both).
        conversations: Questions, or answered conversations for rules that read the response.
        layers: `all`, a 0-based block, or several.
        site: `resid_post` (output of the block, never after the final norm) or `resid_pre` (its input).
        positions: A rule of `emprobe.models.positions.RULES`; means leave out position 0.
        token_budget: Padded tokens per batch.
        progress: Show a progress bar.

    Raises:
        EmprobeError: No conversations, an unknown rule, site or layer, or a rule that needs a response where there is none.
        MismatchError: If the two tokenizers of a pair would read the text differently.

    Source:
        Position rules after persona vectors (arXiv 2507.21509) and convergent directions (arXiv 2506.11618).
    """
    rules = capture_rules(source, conversations, [positions], layers=layers, site=site, token_budget=token_budget, progress=progress)
    return rules[positions]


def capture_rules(
    source: Checkpoint | CheckpointPair,
    conversations: Sequence[Conversation],
    rules: Sequence[str],
    *,
    layers: str | int | Sequence[int] = "all",
    site: Site = "resid_post",
    token_budget: int = 1024,
    progress: bool = True,
) -> dict[str, Any]:
    """Several position rules from one pass over the data; a dict from rule to what `capture` returns."""
    checkpoints = [source.base, source.tuned] if isinstance(source, CheckpointPair) else [source]
    if isinstance(source, CheckpointPair) and not source.shares_weights:
        check_tokenizers(source)
    if not conversations:
        raise EmprobeError("capture was given no conversations. Give at least one.")
    check_site(site)
    chosen = check_layers(layers, checkpoints[0].n_layers, "capture")
    encoded = [encode(checkpoints[0].tokenizer, c) for c in conversations]
    batches = _plan(checkpoints[0], conversations, encoded, [check_rule(r) for r in rules], token_budget)
    stores = [_empty_store(c, len(rules), len(encoded), len(chosen)) for c in checkpoints]
    for batch in tqdm(batches, desc=f"capture {site}", unit="batch", disable=not progress, leave=False):
        for checkpoint, store in zip(checkpoints, stores, strict=True):
            _run(checkpoint, batch, store, chosen, site)
    made = [_records(c, s, conversations, encoded, rules, chosen, site) for c, s in zip(checkpoints, stores, strict=True)]
    if isinstance(source, CheckpointPair):
        return {rule: PairActivations(made[0][rule], made[1][rule]) for rule in rules}
    return dict(made[0])


def _empty_store(checkpoint: Checkpoint, n_rules: int, n_rows: int, n_layers: int) -> _Store:
    width = checkpoint.d_model
    return _Store(
        pooled=torch.zeros(n_rules, n_rows, n_layers, width),
        token_sum=torch.zeros(n_layers, width, dtype=torch.float64),
        norm_sum=torch.zeros(n_layers, dtype=torch.float64),
    )


def _plan(
    checkpoint: Checkpoint, conversations: Sequence[Conversation], encoded: Sequence[Encoded], rules: Sequence[str], budget: int
) -> list[_Batch]:
    """Padded batches with every rule's token weights; a rule that does not fit a row is refused here, before any work."""
    others = [_other(checkpoint, c) if "decision_token" in rules else None for c in conversations]
    pad_id = checkpoint.tokenizer.pad_token_id or 0
    batches = []
    for rows in plan_batches([len(e.ids) for e in encoded], budget):
        ids, mask = pad([encoded[r].ids for r in rows], int(pad_id), "right")
        weights = torch.zeros(len(rules), *ids.shape, dtype=torch.float64)
        for i, row in enumerate(rows):
            for k, rule in enumerate(rules):
                chosen = positions_of(rule, encoded[row], others[row])
                weights[k, i, list(chosen)] = 1 / len(chosen)
        counted = mask.double()
        counted[:, 0] = 0
        batches.append(_Batch(rows, ids, mask, weights, counted))
    return batches


def _other(checkpoint: Checkpoint, conversation: Conversation) -> Encoded | None:
    other = conversation.labels.get("other_response")
    return encode(checkpoint.tokenizer, conversation.answered(str(other))) if other else None


def _run(checkpoint: Checkpoint, batch: _Batch, store: _Store, layers: Sequence[int], site: Site) -> None:
    """One forward of the inner model, stopped after the deepest layer wanted."""
    deepest = max(layers)
    with checkpoint.active() as model, ExitStack() as stack, torch.no_grad():
        blocks = checkpoint.blocks
        for column, layer in enumerate(layers):
            reader = _reader(store, column, batch, stop=layer == deepest)
            if site == "resid_pre":
                handle = blocks[layer].register_forward_pre_hook(
                    lambda _, args, kwargs, read=reader: read(_input(args, kwargs)), with_kwargs=True
                )
            else:
                handle = blocks[layer].register_forward_hook(lambda _, args, output, read=reader: read(hidden_of(output)))
            stack.callback(handle.remove)
        position_ids = (batch.mask.cumsum(dim=1) - 1).clamp(min=0)
        with suppress(_DeepestReached):
            decoder_of(model)(
                input_ids=batch.ids.to(checkpoint.device),
                attention_mask=batch.mask.to(checkpoint.device),
                position_ids=position_ids.to(checkpoint.device),
                use_cache=False,
            )
    store.n_tokens += int(batch.counted.sum())


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    found = args[0] if args else kwargs["hidden_states"]
    assert isinstance(found, Tensor)
    return found


def _reader(store: _Store, column: int, batch: _Batch, *, stop: bool) -> Callable[[Tensor], None]:
    def read(hidden: Tensor) -> None:
        store.add(column, hidden, batch)
        if stop:
            raise _DeepestReached

    return read


def _records(
    checkpoint: Checkpoint,
    store: _Store,
    conversations: Sequence[Conversation],
    encoded: Sequence[Encoded],
    rules: Sequence[str],
    layers: tuple[int, ...],
    site: Site,
) -> dict[str, Activations]:
    count = max(store.n_tokens, 1)
    tokens = tuple(hashlib.sha256(repr(e.ids).encode()).hexdigest()[:16] for e in encoded)
    return {
        rule: Activations(
            values=store.pooled[k],
            layers=layers,
            site=site,
            positions=rule,
            keys=tuple(c.key for c in conversations),
            tokens=tokens,
            checkpoint=checkpoint.name,
            fingerprint=checkpoint.fingerprint,
            token_mean=store.token_sum / count,
            token_norm=store.norm_sum / count,
            n_tokens=store.n_tokens,
        )
        for k, rule in enumerate(rules)
    }

"""`capture`: one row per conversation, in memory or in a store on disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack, overload

from emprobe.activations import Activations, PairActivations
from emprobe.capture.backends import BackendName
from emprobe.capture.filling import fill_store
from emprobe.capture.plan import Padding
from emprobe.capture.request import request
from emprobe.capture.store import ActivationStore
from emprobe.models.load import Checkpoint
from emprobe.models.pair import CheckpointPair
from emprobe.models.positions import Positions
from emprobe.types import Conversation, Site


class RunOptions(TypedDict, total=False):
    """How a capture is run; none of these changes what is captured."""

    layers: str | int | Sequence[int]
    backend: BackendName
    remote: bool
    token_budget: int | None
    share_prefix: bool
    padding: Padding
    progress: bool


class OnePlace(RunOptions, total=False):
    """One site and one position rule."""

    site: Site
    positions: str


class Places(RunOptions, total=False):
    """One or several sites and position rules."""

    site: Site | Sequence[Site]
    positions: Positions | Mapping[str, Positions]


@overload
def capture(source: CheckpointPair, conversations: Iterable[Conversation], **options: Unpack[OnePlace]) -> PairActivations: ...
@overload
def capture(source: Checkpoint, conversations: Iterable[Conversation], **options: Unpack[OnePlace]) -> Activations: ...
@overload
def capture(
    source: Checkpoint | CheckpointPair,
    conversations: Iterable[Conversation],
    *,
    store: str | Path,
    shard_rows: int = 512,
    **options: Unpack[Places],
) -> ActivationStore: ...
@overload
def capture(source: CheckpointPair, conversations: Iterable[Conversation], **options: Unpack[Places]) -> dict[Any, PairActivations]: ...
@overload
def capture(source: Checkpoint, conversations: Iterable[Conversation], **options: Unpack[Places]) -> dict[Any, Activations]: ...


def capture(
    source: Checkpoint | CheckpointPair,
    conversations: Iterable[Conversation],
    *,
    store: str | Path | None = None,
    shard_rows: int = 512,
    **options: Any,
) -> Any:
    """Activations at the tokens that a position rule names, one row per conversation, in the order given.

    Args:
        source: One checkpoint, or a pair (then the same tokens go through both).
        conversations: Questions, or answered conversations for rules that read the response; read once, with `store` a shard at a time.
        store: A folder. Rows are written there in shards as they are made; the same call goes on where a killed one was.
        shard_rows: Rows per shard; as many are in memory at a time.
        options: What and how:

            * `layers` (`"all"`, a 0-based block, or several),
            * `site` (`"resid_post"`, the output of the block, never after the final norm; `"resid_pre"`, its input; `"resid_mid"`,
              `"attn_out"`, `"mlp_out"`; or a list of these),
            * `positions` (`"last_prompt_token"`; any rule of `emprobe.models.positions.RULES`, of which means leave out position 0;
              one explicit span or text for each conversation; a list of rules; or a mapping of names to rules or spans),
            * `backend` (`"hooks"`, `"transformer_lens"` or `"nnsight"`; `remote=True` runs nnsight on NDIF),
            * `token_budget` (padded tokens per batch; halved when memory runs out), `share_prefix` (compute a common opening once),
              `padding` (`"right"`, or `"left"`, which is slower and equal), `progress`.

    Returns:
        `Activations`, or `PairActivations` for a pair; a dict of them by site, by rule, or by (site, rule) where several were asked
        for; an `ActivationStore` where `store` is given.

    Raises:
        EmprobeError: No conversations; an unknown rule, site, layer or backend; a rule that needs a response where there is none; a
            site that this model is not proved to have; a row longer than the model's positions; padding on the right where tokens see
            later ones; a store whose shards were changed, or a folder that cannot be written.
        MismatchError: If the two tokenizers of a pair would read a row as different tokens, or the store holds another capture.

    Source:
        Position rules after persona vectors (arXiv 2507.21509) and convergent directions (arXiv 2506.11618).
    """
    asked = request(source, **options)
    if store is not None:
        return fill_store(asked, conversations, Path(store).expanduser(), shard_rows)
    engine = asked.engine(conversations)
    with engine.speed.bar:
        (chunk,) = asked.chunks(conversations, None)
        return asked.answer(asked.run(engine, chunk))

"""Cross-entropy and KL to a second model from hidden states, a few tokens at a time, so that no whole batch of logits is ever held.

The gradient of each chunk of logits is taken at once and added up in the hidden states; one backward pass of the decoder follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from emprobe.errors import EmprobeError
from emprobe.finetuning.rows import Batch
from emprobe.models.blocks import decoder_of, probe_ids

Head = Callable[[Tensor], Tensor]
Kind = Callable[[Tensor, Tensor, slice], tuple[Tensor, Tensor]]
"""Of log-probabilities p of the base and q of the adapted model, at these of the tokens: a divergence of each token, and the gradient of
what is minimised with respect to the logits of q. It may overwrite both."""
LOGITS_AT_ONCE = 2**21
"""Entries of a chunk of logits (8 MB in float32), of which a handful are held at a time."""
LOWEST_KL = -1e-6


def head_of(model: Any) -> Head:
    """From the decoder's last hidden states to logits, proved on the model by one small forward pass.

    Raises:
        EmprobeError: If the model makes logits in a way that is not known.
    """
    linear, config = model.get_output_embeddings(), model.config.get_text_config()
    cap, divisor, factor = (getattr(config, name, None) for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"))
    known: list[Head] = [linear]
    known += [lambda h: cap * torch.tanh(linear(h) / cap)] if cap else []
    known += [lambda h: linear(h) / divisor] if divisor else []
    known += [lambda h: linear(h) * factor] if factor else []
    with torch.no_grad():
        ids = probe_ids(model)
        wanted = model(input_ids=ids, use_cache=False).logits.float()
        hidden = decoder_of(model)(input_ids=ids, use_cache=False).last_hidden_state
        off = [float((head(hidden).float() - wanted).norm() / wanted.norm()) for head in known]
    # The best and not the first that will do: small logits are hardly changed by a cap.
    if min(off) <= 1e-2:
        return known[off.index(min(off))]
    raise EmprobeError(
        f"How {type(model).__name__} makes logits of its last hidden states is not known: its output embeddings alone, capped or scaled as "
        "its config says, do not give them. Use a model of another architecture."
    )


def hidden_at_targets(model: Any, batch: Batch) -> Float[Tensor, "tokens d_model"]:
    """The decoder's last hidden states from which the tokens that count are predicted, row by row."""
    # Without padding no mask is needed, and attention is faster without one.
    mask = None if bool(batch.mask.all()) else batch.mask
    hidden: Tensor = decoder_of(model)(input_ids=batch.ids, attention_mask=mask, use_cache=False).last_hidden_state
    return hidden[:, :-1][batch.predicted[:, 1:].to(hidden.device)]


def cross_entropies(hidden: Tensor, targets: Tensor, head: Head, weight: float | None = None) -> Float[Tensor, " tokens"]:
    """Cross-entropy of each token in nats, float32; with a weight, the gradient of weight · sum is left in the parameters."""
    leaf, targets = _leaf(hidden, weight), targets.to(hidden.device)
    found = []
    for part in _chunks(leaf, head):
        losses = cross_entropy(head(leaf[part]).float(), targets[part], reduction="none")
        if weight is not None:
            (losses.sum() * weight).backward()  # type: ignore[no-untyped-call]
        found.append(losses.detach())
    _pass_on(hidden, leaf, weight)
    return torch.cat(found)


def divergences(
    hidden: Tensor, base: Tensor, head: Head, base_head: Head, weight: float | None = None, *, kind: Kind | None = None
) -> Float[Tensor, " tokens"]:
    """KL(base ‖ adapted) of each token in nats, float32, at least 0 but for rounding; or another divergence of the two.

    Args:
        hidden: The adapted model's hidden states.
        base: The base's (or another model's), of the same tokens.
        head: Makes the adapted model's logits.
        base_head: Makes the base's.
        weight: If given, the gradient of weight · sum is left in the parameters.
        kind: Which divergence; `None` is `kl_and_gradient`.

    Raises:
        EmprobeError: If a token's KL is below -1e-6, which no two distributions have.
    """
    leaf = _leaf(hidden, weight)
    found = []
    for part in _chunks(leaf, head):
        logits = head(leaf[part]).float()
        with torch.no_grad():
            log_p, log_q = base_head(base[part]).float().log_softmax(-1).to(logits.device), logits.log_softmax(-1)
            kl, gradient = kl_and_gradient(log_p, log_q) if kind is None else kind(log_p, log_q, part)
            found.append(kl)
        if weight is not None:
            logits.backward(gradient.mul_(weight))  # type: ignore[no-untyped-call]
    _pass_on(hidden, leaf, weight)
    kl = torch.cat(found)
    check_kl(kl)
    return kl


def kl_of(log_p: Float[Tensor, "*shape d_vocab"], log_q: Float[Tensor, "*shape d_vocab"]) -> Float[Tensor, "*shape"]:
    """KL(p ‖ q) in nats from log-probabilities.

    Σ p (log p - log q) + q - p: the last two sum to nothing but for rounding, and take out what rounding of the normalisers adds to
    the first.

    Example:
        >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
        >>> round(float(kl_of(p.log(), q.log())), 4)
        0.1438
    """
    return kl_and_gradient(log_p.clone(), log_q.clone())[0]


def kl_and_gradient(
    log_p: Float[Tensor, "*shape d_vocab"], log_q: Float[Tensor, "*shape d_vocab"]
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape d_vocab"]]:
    """KL(p ‖ q) as `kl_of`, and its gradient with respect to the logits of q, which is q - p; both arguments are overwritten."""
    p, difference = log_p.exp(), log_p.sub_(log_q)
    gradient = log_q.exp_().sub_(p)
    kl = torch.linalg.vecdot(p, difference)
    if bool(kl.isnan().any()):
        # A token that the base cannot say adds nothing, whatever the adapted model does with it.
        kl = torch.linalg.vecdot(p, difference.masked_fill(p == 0, 0.0))
    return kl + gradient.sum(-1), gradient


def reverse_kl_and_gradient(
    log_p: Float[Tensor, "*shape d_vocab"], log_q: Float[Tensor, "*shape d_vocab"]
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape d_vocab"]]:
    """KL(q ‖ p) in nats, and its gradient with respect to the logits of q, which is q (log q - log p - KL); both are overwritten.

    It is infinite where q can say what p cannot.

    Example:
        >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
        >>> kl, gradient = reverse_kl_and_gradient(p.log(), q.log())
        >>> round(float(kl), 4), [round(float(g), 4) for g in gradient]  # .25 log .5 + .75 log 1.5; .25 · .75 · log(.5 / 1.5) and back
        (0.1308, [-0.206, 0.206])
    """
    q, p = log_q.exp(), log_p.exp()
    difference = log_q.sub_(log_p)
    if bool((q == 0).any()):
        difference = difference.masked_fill_(q == 0, 0.0)
    plain = torch.linalg.vecdot(q, difference)
    gradient = difference.sub_((plain / q.sum(-1)).unsqueeze(-1)).mul_(q)
    return plain + p.sub_(q).sum(-1), gradient


def check_kl(kl: Tensor) -> None:
    """Refuse divergences that no two distributions have.

    Raises:
        EmprobeError: Names the lowest and how many.
    """
    if bool((kl < LOWEST_KL).any()):
        raise EmprobeError(
            f"KL to the base came out as low as {float(kl.min()):.3g} ({int((kl < LOWEST_KL).sum())} of {kl.numel()} tokens below "
            f"{LOWEST_KL:g}), and a KL is never negative: these are not log-probabilities of two distributions in float32. Compute "
            "log-softmax in float32."
        )


def _leaf(hidden: Tensor, weight: float | None) -> Tensor:
    return hidden.detach().requires_grad_(weight is not None)


def _pass_on(hidden: Tensor, leaf: Tensor, weight: float | None) -> None:
    if weight is not None and hidden.requires_grad:
        hidden.backward(leaf.grad)  # type: ignore[no-untyped-call]


def _chunks(hidden: Tensor, head: Head) -> Iterator[slice]:
    """Slices of the tokens such that a chunk's logits stay within `LOGITS_AT_ONCE`."""
    with torch.no_grad():
        width = int(head(hidden[:1]).shape[-1])
    size = max(1, LOGITS_AT_ONCE // width)
    yield from (slice(start, start + size) for start in range(0, len(hidden), size))

"""Model organisms for emergent misalignment: means or vectors by layer, and trained steering vectors.

Source: Turner, Soligo et al. (arXiv 2506.11613) and Soligo et al. (arXiv 2506.11618), and their repository: forward hooks on block
outputs (`layer_0`, …), pooled token means under `question` and `answer`, saved per checkpoint and answer set and subtracted layerwise;
trained vectors saved as `steering_vector`, `layer_idx`, `alpha` and added, times alpha, to the output of that block's `mlp.down_proj`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from emprobe.directions.importers.container import Opened, described, open_container
from emprobe.directions.importers.source import UNKNOWN, Asked, Source, Vector, check_one_width, vector_of
from emprobe.errors import EmprobeError, MismatchError

LAYER = re.compile(r"layer_(\d+)")
PARTS = ("question", "answer")
OUTPUTS = "model_organisms: layer_k is the output of block k"


def recognises(opened: Opened) -> str | None:
    """Names of layers or of a trained vector are enough; bare numbers or a list say nothing of inputs or outputs."""
    content = opened.content
    if isinstance(content, list):
        return "perhaps" if content and all(isinstance(v, torch.Tensor) for v in content) else None
    if not isinstance(content, Mapping) or opened.kind != "torch" or not content:
        return None
    if {"steering_vector", "layer_idx"} <= content.keys() or _named(content) or all(_named(content.get(part)) for part in PARTS):
        return "surely"
    return "perhaps" if all(type(name) is int for name in content) else None


def read(opened: Opened, asked: Asked) -> Source:
    """Block outputs as they are; means need the file that is subtracted from them.

    Raises:
        EmprobeError: If the file holds none of these layouts, or means and no `minus`.
        MismatchError: If the file to subtract has other layers or widths.
    """
    content = opened.content
    if isinstance(content, Mapping) and {"steering_vector", "layer_idx"} <= content.keys():
        return _trained(opened, asked)
    vectors = _layers(opened, asked)
    contrast, sign, facts = UNKNOWN, UNKNOWN, {"layers": len(vectors), "dtype": _dtype(content)}
    if asked.minus is not None:
        other = open_container(asked.minus)
        vectors = _difference(opened, vectors, other, _layers(other, asked))
        contrast, sign = f"{opened.path.name} - {asked.minus.name}", f"positive is {opened.path.name}"
        facts["minus"] = {"file": asked.minus.name, "sha256": other.sha256}
    means = _holds_means(content)
    if means and asked.minus is None:
        raise EmprobeError(
            f"{opened.path} holds mean hidden states of one set of answers, which are no direction. Give minus= the file of the other set "
            "(model-m_data-a_… beside model-m_data-m_…)."
        )
    return Source(
        vectors=vectors,
        site="resid_post",
        convention=OUTPUTS,
        conversion="none: emprobe's resid_post[k] is the output of block k",
        positions=f"{asked.entry} tokens, pooled" if means else UNKNOWN,
        contrast=contrast,
        sign=sign,
        estimator="difference of means" if asked.minus else UNKNOWN,
        facts=facts,
    )


def _trained(opened: Opened, asked: Asked) -> Source:
    content = opened.content
    layer, alpha = content["layer_idx"], content.get("alpha", 1.0)
    if type(layer) is not int or layer < 0 or not isinstance(alpha, int | float) or asked.minus or asked.entry:
        raise EmprobeError(
            f"{opened.path} is one trained steering vector; its layer_idx must be a block from 0 and its alpha a number, but they are "
            f"{layer!r} and {alpha!r}. It takes neither entry nor minus."
        )
    return Source(
        vectors={layer: float(alpha) * vector_of(content["steering_vector"], f"{opened.path}, steering_vector")},
        site="mlp_out",
        convention="model_organisms: alpha times the vector is added to the output of mlp.down_proj of block layer_idx",
        conversion="multiplied by alpha; the output of down_proj is mlp_out (adding there is adding to resid_post, where no norm follows)",
        positions="all tokens",
        contrast="trained vector",
        sign="positive is as trained",
        estimator="trained by gradient descent",
        facts={"alpha": float(alpha), "dtype": _dtype(content["steering_vector"])},
    )


def _named(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(n, str) and LAYER.fullmatch(n) for n in value)


def _holds_means(content: Any) -> bool:
    return isinstance(content, Mapping) and any(part in content for part in PARTS)


def _layers(opened: Opened, asked: Asked) -> dict[int, Vector]:
    content = opened.content
    if _holds_means(content):
        if asked.entry not in content:
            said = "none was named" if asked.entry is None else f"{asked.entry!r} was asked for"
            raise EmprobeError(f"{opened.path} holds means over {' and '.join(content)} tokens and {said}. Give entry= one of these.")
        content = content[asked.entry]
    elif asked.entry is not None:
        raise EmprobeError(f"{opened.path} holds one vector per layer, and entry={asked.entry!r} was asked for. Leave it out.")
    vectors = by_layer(content, opened)
    check_one_width(vectors, str(opened.path))
    return vectors


def by_layer(content: Any, opened: Opened) -> dict[int, Vector]:
    """Vectors of a list, or of a dictionary of `layer_k` or k.

    Raises:
        EmprobeError: If it is neither.
    """
    if isinstance(content, list) and content:
        return {layer: vector_of(value, f"{opened.path}, layer {layer}") for layer, value in enumerate(content)}
    if isinstance(content, Mapping) and content and opened.kind == "torch":
        numbers = {name: _number(name) for name in content}
        if all(number is not None for number in numbers.values()):
            return {int(number or 0): vector_of(content[name], f"{opened.path}, {name}") for name, number in numbers.items()}
    raise EmprobeError(f"{opened.path} should hold one vector per layer (layer_0, layer_1, …), but is {described(opened)}.")


def _number(name: Any) -> int | None:
    if type(name) is int:
        return name if name >= 0 else None
    found = LAYER.fullmatch(name) if isinstance(name, str) else None
    return int(found.group(1)) if found else None


def _difference(opened: Opened, mine: Mapping[int, Vector], other: Opened, theirs: Mapping[int, Vector]) -> dict[int, Vector]:
    if mine.keys() != theirs.keys() or any(len(mine[layer]) != len(theirs[layer]) for layer in mine):
        shapes = [f"{len(v)} layers of d_model {len(next(iter(v.values())))}" for v in (mine, theirs)]
        raise MismatchError(f"{opened.path} has {shapes[0]} and {other.path} has {shapes[1]}. Subtract means of one model's same layers.")
    return {layer: mine[layer] - theirs[layer] for layer in mine}


def _dtype(content: Any) -> str:
    while not isinstance(content, torch.Tensor):
        content = next(iter(content.values())) if isinstance(content, Mapping) else content[0]
    return str(content.dtype).removeprefix("torch.")

"""The file of lm-eval's `steered` model: what is done to the output of each module, by its name.

Source: EleutherAI/lm-evaluation-harness 0.4.13, lm_eval/models/hf_steered.py. It takes a .pt (read by torch.load) with one entry per
module, or a .csv that names features of published sparse autoencoders; a vector of one's own only goes into the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emprobe.errors import EmprobeError
from emprobe.files import atomic_path
from emprobe.interventions.changes import Affine
from emprobe.interventions.edit import Edit, Place, rank_of
from emprobe.interventions.export.folding import check_everywhere
from emprobe.interventions.export.made import Made
from emprobe.interventions.plan import Plan
from emprobe.models.blocks import blocks_of, decoder_of, input_of, probe_ids
from emprobe.models.load import Checkpoint
from emprobe.models.proof import unhooked
from emprobe.models.sites import taps_of

FILE = "steer.pt"
PICKLE = (
    "`steer.pt` is what torch.save writes, since lm-eval reads nothing else; it holds only tensors, numbers and names, and can be read "
    "with `torch.load(..., weights_only=True)`. lm-eval itself reads it with `weights_only=False`: give it only a file that you trust."
)


def write_lm_eval(plan: Plan, checkpoint: Checkpoint, folder: Path) -> Made:
    """Write the .pt file, one entry per module.

    Raises:
        EmprobeError: If the plan does more than add or set (and ablate wholly) along one direction per place, at every token; or a place
            is no module's output.
    """
    edits = sorted(plan.compiled(checkpoint), key=lambda edit: rank_of(edit.place))
    places: dict[Place, list[Edit]] = {}
    for edit in edits:
        check_everywhere(edit, "lm_eval")
        places.setdefault(_output(edit), []).append(edit)
    prefix, arguments = _adapted(checkpoint)
    config = {prefix + _hookpoint(checkpoint, place): _entry(found) for place, found in places.items()}
    with atomic_path(folder / FILE) as path:
        torch.save(config, path)  # noqa: TID251 - lm-eval takes vectors in no other form; plain tensors only
    command = f"lm_eval --model steered --model_args pretrained={{base}},steer_path={{out}}/{FILE}{arguments} --tasks TASKS --batch_size 8"
    what = "The file of lm-eval's `steered` model: each module's output has a vector added, or its projection set, at every token."
    return Made(what, [command], [PICKLE], {"modules": len(config), "made for": "lm-eval 0.4.13"}, ("lm-eval",))


def _output(edit: Edit) -> Place:
    """The place as an output: a block's input is the output of the one before."""
    layer, site = edit.place
    if site == "resid_mid":
        raise EmprobeError(f"{edit} is inside a block, where no module puts the stream out, and lm-eval hooks outputs. Use another site.")
    return (layer - 1, "resid_post") if site == "resid_pre" and layer > 0 else edit.place


def _adapted(checkpoint: Checkpoint) -> tuple[str, str]:
    """What lm-eval puts before names of modules, and how it is told of an adapter.

    It looks names up in `model.base_model`: the decoder of a plain model, PEFT's wrapper of the whole one with an adapter.
    """
    if checkpoint.adapter != "on" or checkpoint.switch is None:
        return "", ""
    if len(checkpoint.switch.names) > 1:
        raise EmprobeError(f"{checkpoint.name!r} has several adapters on, and lm-eval takes one. Merge them first.")
    inner = decoder_of(checkpoint.hf)
    name = next(name for name, module in checkpoint.hf.named_modules() if module is inner)
    return f"model.{name}." if name else "model.", f",peft={checkpoint.name}"


def _hookpoint(checkpoint: Checkpoint, place: Place) -> str:
    """The name, within the decoder, of the module whose output is a place."""
    decoder = decoder_of(checkpoint.hf)
    names: dict[int, str] = {id(module): name for name, module in decoder.named_modules()}
    if place == (0, "resid_pre"):
        return _entrance(checkpoint)
    return names[id(taps_of(checkpoint, place[1], [place[0]])[0].module)]


def _entrance(checkpoint: Checkpoint) -> str:
    """The last module outside the blocks that puts out exactly what enters block 0."""
    model = checkpoint.hf
    decoder, first = decoder_of(model), blocks_of(model)[0]
    outputs: list[tuple[str, Tensor]] = []
    entered: list[Tensor] = []
    inside = {id(module) for block in blocks_of(model) for module in block.modules()}

    def enter(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered.append(input_of(args, kwargs))

    def keeper(name: str) -> Any:
        return lambda _, args, output: outputs.append((name, output)) if isinstance(output, Tensor) and not entered else None

    with checkpoint.active(), unhooked(decoder), torch.no_grad():
        handles = [first.register_forward_pre_hook(enter, with_kwargs=True)]
        handles += [m.register_forward_hook(keeper(n)) for n, m in decoder.named_modules() if n and id(m) not in inside]
        try:
            decoder(input_ids=probe_ids(model), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
    found = [name for name, output in outputs if output.shape == entered[0].shape and torch.equal(output, entered[0])]
    if not found:
        raise EmprobeError(
            f"What enters block 0 of {type(model).__name__} is no module's output, and lm-eval hooks outputs, so it cannot steer there. "
            "Use resid_post of a block, or hooks (emprobe.intervene)."
        )
    return found[-1]


def _entry(edits: Sequence[Edit]) -> dict[str, Any]:
    """What lm-eval does at one module: one thing."""
    changes = [edit.change for edit in edits]
    if all(isinstance(change, Affine) and change.scale == 0 for change in changes):
        total = sum((torch.tensor(e.change.shift, dtype=torch.float64) @ e.basis.double() for e in edits), torch.zeros(1))  # type: ignore[attr-defined]
        return _as_dict("add", total, 1.0)
    edit, change = edits[0], changes[0]
    if len(edits) > 1:
        raise EmprobeError(f"{edits[1]} comes after {edit} at one module, where lm-eval does one thing. Use other layers, or hooks.")
    if edit.k > 1:
        raise EmprobeError(f"{edit} acts on {edit.k} dimensions, and lm-eval's clamp on one. Use the target lora or weights, or hooks.")
    assert isinstance(change, Affine)
    if change.scale != -1:
        raise EmprobeError(f"{edit} takes out a share of {-change.scale:g}; lm-eval's clamp sets the projection wholly. Use strength=1.")
    return _as_dict("clamp", edit.basis[0].double(), change.shift[0])


def _as_dict(action: str, vector: Tensor, coefficient: float) -> dict[str, Any]:
    return {
        "steering_vector": vector.float().clone(),
        "steering_coefficient": float(coefficient),
        "action": action,
        "bias": None,
        "head_index": None,
    }

"""The output side of a LoRA: the columns of its B matrix, which span all that the adapter can write at that place."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from emprobe.errors import EmprobeError
from emprobe.files import read_json
from emprobe.types import Site

WRITES_TO: dict[str, Site] = {
    "o_proj": "attn_out",
    "attn.c_proj": "attn_out",
    "attention.dense": "attn_out",
    "attn.out_proj": "attn_out",
    "down_proj": "mlp_out",
    "mlp.c_proj": "mlp_out",
    "dense_4h_to_h": "mlp_out",
    "fc2": "mlp_out",
}
"""Modules whose output is added to the residual stream, by the end of their name."""


def lora_output(path: str | Path, *, module: str, layer: int) -> tuple[Tensor, Site | None, dict[str, Any]]:
    """The B matrix of one module at one layer as rows `[r, d_model]`, the site it writes to, and the adapter's facts.

    B is `[d_model, r]` also where the base's weight is stored the other way round (`fan_in_fan_out`): that option turns the base's
    weight and the product B A, never B itself.

    Args:
        path: `adapter_model.safetensors`, or the folder that holds it.
        module: The end of the module's name, such as `down_proj`.
        layer: 0-based block.

    Raises:
        EmprobeError: If the file or the matrix is not there; the message says which modules and layers are.
    """
    file = Path(path) / "adapter_model.safetensors" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise EmprobeError(f"A LoRA's weights were asked for at {file}, and there is no such file. Give a PEFT adapter's folder.")
    wanted = re.compile(rf"\.{layer}\.(?:.*\.)?{re.escape(module)}\.lora_B(?:\.[^.]+)?\.weight$")
    try:
        with safe_open(str(file), framework="pt") as opened:
            names = [name for name in opened.keys() if ".lora_B." in name]  # noqa: SIM118 - not a mapping
            found = [name for name in names if wanted.search(name)]
            if len(found) != 1:
                raise EmprobeError(_not_one(file, module, layer, names, found))
            matrix = opened.get_tensor(found[0])
    except SafetensorError as error:
        raise EmprobeError(f"{file} could not be read as safetensors: {error}. The file may be cut short.") from error
    site = next((site for end, site in WRITES_TO.items() if found[0].split(".lora_B")[0].endswith(end)), None)
    config = file.parent / "adapter_config.json"
    base = read_json(config).get("base_model_name_or_path") if config.is_file() else None
    return matrix.to(torch.float64).T.contiguous(), site, {"adapter": file.parent.name, "base_name": base, "tensor": found[0]}


def _not_one(file: Path, module: str, layer: int, names: list[str], found: list[str]) -> str:
    if found:
        return f"{module!r} at layer {layer} of {file} fits {len(found)} matrices: {', '.join(found[:3])}. Give more of the name."
    places: dict[str, list[int]] = {}
    for name in names:
        match = re.search(r"\.(\d+)\.(.+)\.lora_B", name)
        if match:
            places.setdefault(match[2], []).append(int(match[1]))
    there = "; ".join(f"{name} at layers {min(at)} to {max(at)}" for name, at in sorted(places.items())) or "no lora_B matrix at all"
    return f"{file} has no B matrix of {module!r} at layer {layer}. It holds {there}."

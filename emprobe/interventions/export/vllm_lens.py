"""Request bodies for vLLM servers with vllm-lens: vectors that are added at the output of blocks.

Source: UKGovernmentBEIS/vllm-lens 1.2.1: vllm_lens/_helpers/types.py (`SteeringVector`), _serialize.py (an array without a named
compression is read as plain bytes), client.py (what goes into `vllm_xargs`).
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emprobe.errors import EmprobeError
from emprobe.files import write_json
from emprobe.interventions.changes import Affine
from emprobe.interventions.edit import Edit
from emprobe.interventions.export.card import base_name
from emprobe.interventions.export.folding import check_everywhere
from emprobe.interventions.export.made import Made
from emprobe.interventions.export.outputs import output_layer
from emprobe.interventions.plan import Plan
from emprobe.models.load import Checkpoint

HOOKS = (
    "Only additions: vllm-lens does the rest by functions of Python that are sent as pickles (its hooks), which emprobe neither writes nor "
    "reads."
)


def write_vllm_lens(plan: Plan, checkpoint: Checkpoint, folder: Path) -> Made:
    """Write `steering_vectors.json` (the vectors) and `request.json` (a chat completion that carries them).

    Raises:
        EmprobeError: If the plan does more than add, at every token, at the output of blocks.
    """
    sums: dict[int, Tensor] = {}
    for edit in plan.compiled(checkpoint):
        layer = output_layer(edit, "vllm_lens")
        sums[layer] = sums.get(layer, torch.zeros(1, dtype=torch.float64)) + _added(edit)
    layers = sorted(sums)
    vectors = [
        {
            "activations": _encoded(torch.stack([sums[layer] for layer in layers])),
            "layer_indices": layers,
            "scale": 1.0,
            "norm_match": False,
            "position_indices": None,
        }
    ]
    write_json(folder / "steering_vectors.json", vectors)
    body = {
        "model": base_name(checkpoint),
        "messages": [{"role": "user", "content": "QUESTION"}],
        "vllm_xargs": {"apply_steering_vectors": json.dumps(vectors)},
    }
    write_json(folder / "request.json", body)
    serve = [
        "vllm serve {base}",
        "curl http://localhost:8000/v1/chat/completions -H 'Content-Type: application/json' -d @{out}/request.json",
    ]
    limits = ["Written from the server's source; not sent to a server by emprobe's tests.", HOOKS]
    if checkpoint.adapter == "on":
        limits.append(f"It belongs to the adapted model: serve {checkpoint.name} with its base, or merged into it.")
    what = "Requests for a vLLM server with the plugin vllm-lens: a vector is added to the output of each block named, at every token."
    return Made(what, serve, limits, {"layers": layers, "made for": "vllm-lens 1.2.1"}, ("vllm-lens", "vllm"))


def _added(edit: Edit) -> Tensor:
    check_everywhere(edit, "vllm_lens")
    assert isinstance(edit.change, Affine)
    if edit.change.scale:
        raise EmprobeError(
            f"{edit} depends on what is there, and vllm-lens's steering vectors only add (its hooks could, but travel as pickles, which "
            "are code). Use the target lora, weights or easysteer."
        )
    return torch.tensor(edit.change.shift, dtype=torch.float64) @ edit.basis.double()


def _encoded(tensor: Tensor) -> dict[str, Any]:
    array = tensor.float().contiguous().numpy()
    return {
        "data": base64.b64encode(array.tobytes()).decode("ascii"),
        "dtype": "float32",
        "original_dtype": "torch.float32",
        "shape": list(array.shape),
    }

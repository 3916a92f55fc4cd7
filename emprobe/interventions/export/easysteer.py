"""Request bodies for EasySteer, a fork of vLLM that steers: its `steering` field, with the vectors in the request itself.

Ablation is its `lm_steer` (h + scale (h P1) P2ᵀ with P1 = Bᵀ, P2 = -s Bᵀ), addition its `direct`; both at a block's output.

Source: ZJU-REAL/EasySteer-vllm-v1 6267ca0 (vLLM 0.26): vllm/steer_vectors/api.py, payloads.py, algorithms/, clause.py.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emprobe.errors import EmprobeError
from emprobe.files import write_json
from emprobe.interventions.changes import Affine
from emprobe.interventions.edit import Edit, rank_of
from emprobe.interventions.export.card import base_name
from emprobe.interventions.export.made import Made
from emprobe.interventions.export.outputs import output_layer
from emprobe.interventions.plan import Plan
from emprobe.interventions.where import Where
from emprobe.models.load import Checkpoint

VERSION = 1


def write_easysteer(plan: Plan, checkpoint: Checkpoint, folder: Path) -> Made:
    """Write `steering.json` (for `--steering-config`) and `request.json` (a chat completion that carries it).

    Raises:
        EmprobeError: If the plan names a site inside blocks, a condition, or a change that is not affine.
    """
    special = sorted(checkpoint.tokenizer.all_special_ids)
    vectors = [v for edit in sorted(plan.compiled(checkpoint), key=lambda e: rank_of(e.place)) for v in _vectors(edit, special)]
    spec = {"vectors": vectors, "conflict": "sequential"}
    write_json(folder / "steering.json", spec)
    messages = [{"role": "user", "content": "QUESTION"}]
    write_json(folder / "request.json", {"model": base_name(checkpoint), "messages": messages, "steering": spec})
    serve = [
        "vllm serve {base} --enable-steer-vector --enforce-eager",
        "curl http://localhost:8000/v1/chat/completions -H 'Content-Type: application/json' -d @{out}/request.json",
        "vllm serve {base} --enable-steer-vector --enforce-eager --steering-config {out}/steering.json",
    ]
    what = "Requests for EasySteer (a fork of vLLM): the `steering` field holds the vectors and says at which tokens they act."
    facts = {"vectors": len(vectors), "made for": "EasySteer on vLLM 0.26"}
    return Made(what, serve, _limits(checkpoint), facts, ("easysteer", "vllm"))


def _limits(checkpoint: Checkpoint) -> list[str]:
    limits = ["Written from the server's source; not sent to a server by emprobe's tests, which check the arithmetic of the request alone."]
    if checkpoint.adapter == "on":
        limits.append(f"It belongs to the adapted model: serve {checkpoint.name} merged into its base.")
    return limits


def _vectors(edit: Edit, special: list[int]) -> list[dict[str, Any]]:
    """One or two vectors that do what an affine edit does."""
    layer = output_layer(edit, "easysteer")
    if edit.when is not None:
        raise EmprobeError(f"{edit} acts only where {edit.when}, but EasySteer knows no condition. Leave when out.")
    if not isinstance(edit.change, Affine):
        raise EmprobeError(f"{edit} bends what it acts on, which no algorithm of EasySteer does. Use Ablate, Add, or hooks.")
    apply, basis, found = _apply(edit, special), edit.basis.double(), []
    if edit.change.scale:
        payload = _wire("lowrank", {"projector1": basis.T, "projector2": edit.change.scale * basis.T}, {})
        found.append({"algorithm": "lm_steer", "data": payload, "layers": [layer], "apply": apply})
    if any(edit.change.shift):
        added = torch.tensor(edit.change.shift, dtype=torch.float64) @ basis
        found.append({"algorithm": "direct", "data": _wire("direction", {f"layer.{layer}": added}, {}), "layers": [layer], "apply": apply})
    return found


def _wire(kind: str, tensors: Mapping[str, Tensor], extra: Mapping[str, Any]) -> dict[str, Any]:
    """Vectors as they travel: float32 in base64, and the hash by which the server knows them again."""
    digest = hashlib.sha256(f"{kind}:{VERSION}".encode())
    encoded = {}
    for name in sorted(tensors):
        array = tensors[name].float().contiguous().numpy()
        for part in (name.encode(), str(array.shape).encode(), array.tobytes()):
            digest.update(part)
        encoded[name] = {"shape": list(array.shape), "data": base64.b64encode(array.tobytes()).decode("ascii")}
    return {"version": VERSION, "kind": kind, "tensors": encoded, "extra": dict(extra), "sha256": digest.hexdigest()}


def _apply(edit: Edit, special: list[int]) -> dict[str, Any]:
    """Which tokens: EasySteer counts prompt and generation as emprobe does; its first decode step is the answer's first token."""
    where = edit.where
    clause: dict[str, Any] = {}
    if where.prompt_positions is not None:
        if any(position > 0 for position in where.prompt_positions):
            raise EmprobeError(
                f"{edit} names {where}; where a prompt is shorter, EasySteer takes its last token instead of none. Count from the prompt's "
                "end, or give prompt_window."
            )
        clause["prompt_positions"] = list(where.prompt_positions)
    elif where.prompt_window is not None:
        clause["prompt_window"] = [where.prompt_window[0] or 0, where.prompt_window[1]]
    elif where.prompt:
        clause["prompt"] = "all"
    if where.generation:
        window = where.generation_window
        clause |= {"generation": "all"} if window is None else {"generation_window": [window[0] or 0, window[1]]}
    return clause | _left_out(where, special)


def _left_out(where: Where, special: list[int]) -> dict[str, Any]:
    left_out: dict[str, Any] = {}
    if where.exclude_first and where.prompt:
        left_out["exclude_prompt_positions"] = [0]
    if where.exclude_special and special:
        left_out |= {f"exclude_{part}_tokens": special for part in ("prompt", "generation") if getattr(where, part)}
    return left_out

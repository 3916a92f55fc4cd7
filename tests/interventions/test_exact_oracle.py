"""interp-engine, another implementation of adding, ablating and capping, agrees; skips where it is not installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from emprobe.interventions import Ablate, Add, Cap, Operator, intervene
from emprobe.models import load_model
from tests.fixtures.models import ARCHITECTURES, Architecture, Checkpoints
from tests.interventions.by_hand import direction

engine_model = pytest.importorskip(
    "interp_engine.model", reason="interp-engine is not installed (pip install --no-deps interp-engine einops)"
)
steer_module = pytest.importorskip("interp_engine.steer")
specs = pytest.importorskip("interp_engine.steer_specs")


@pytest.mark.parametrize("point", ["resid_post", "resid_pre", "mlp_out", "attn_out"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_and_tokens_agree(architecture: Architecture, point: str, checkpoints_of: Callable[[Architecture], Checkpoints]) -> None:
    checkpoint, other = (load_model(checkpoints_of(architecture).base) for _ in range(2))
    engine = engine_model.EagerModel(architecture, hf_model=other.hf, tokenizer=other.tokenizer, device="cpu")
    site: Any = point
    if architecture == "gemma2" and point in ("mlp_out", "attn_out"):
        pytest.skip("interp-engine writes elsewhere; emprobe's site is what is added to the stream, behind Gemma's norm")
    d = direction(checkpoint, site=site)
    vector = d.vector.float()
    pairs: list[tuple[Operator, Any]] = [
        (Add(d, 1.5), specs.AddSpec(vector, 7.5)),
        (Ablate(d), specs.AblateSpec(vector)),
        (Cap(d, min=-0.1, max=0.2, unit="abs"), specs.ProjectionCapSpec(vector, -0.1, 0.2)),
    ]
    ids = torch.randint(5, 200, (3, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = checkpoint.hf(ids).logits
        for operator, spec in pairs:
            with intervene(checkpoint, operator):
                mine = checkpoint.hf(ids).logits
                tokens = checkpoint.hf.generate(ids, do_sample=False, max_new_tokens=5, pad_token_id=0)
            with steer_module.steer(engine, specs.SteeringSpec.at(f"{point}.1", spec)):
                theirs = other.hf(ids).logits
                generated = other.hf.generate(ids, do_sample=False, max_new_tokens=5, pad_token_id=0)
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
            assert torch.equal(tokens, generated)
            assert float((mine - plain).abs().max()) > 1e-2

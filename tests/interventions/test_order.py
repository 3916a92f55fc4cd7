"""Several operators in one block act in the order in which the stream passes them."""

from __future__ import annotations

import pytest
import torch

from emprobe.directions import Direction
from emprobe.interventions import Ablate, SetProjection, intervene
from emprobe.models import load_model
from emprobe.models.sites import taps_of
from tests.fixtures.models import Checkpoints


@pytest.mark.parametrize("first", ["attn_out", "resid_mid"])
def test_what_attention_adds_is_written_before_the_sum_that_it_goes_into(architecture: Checkpoints, first: str) -> None:
    """However they are listed: both writes lie at one module, and the other way round the sum would not be what was asked for."""
    checkpoint = load_model(architecture.base)
    vector = torch.eye(checkpoint.d_model)[3]
    operators = [
        Ablate(Direction.from_vector(vector, layer=1, site="attn_out")),
        SetProjection(Direction.from_vector(vector, layer=1, site="resid_mid"), 5.0, unit="abs"),
    ]
    seen: list[torch.Tensor] = []
    with intervene(checkpoint, *(operators if first == "attn_out" else reversed(operators))), torch.no_grad():
        handle = taps_of(checkpoint, "resid_mid", [1])[0].listen(seen.append)
        checkpoint.hf(torch.arange(5, 12)[None])
        handle.remove()
    torch.testing.assert_close(seen[0] @ vector, torch.full((1, 7), 5.0), rtol=1e-5, atol=1e-5)

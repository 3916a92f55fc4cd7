"""Half precision, double precision, adapters and offloaded models are steered alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import accelerate
import pytest
import torch
from torch import Tensor

from emprobe.batching import pad
from emprobe.interventions import Ablate, Add, When, Where, intervene
from emprobe.models import encode, load_model, load_pair
from emprobe.models.sites import taps_of
from emprobe.types import Site
from tests.fixtures.models import Architecture, Checkpoints, merge_adapter
from tests.interventions.by_hand import direction
from tests.interventions.test_exact_places import QUESTIONS, SITES, load, seen_at


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("site", SITES)
def test_half_precision_is_edited_in_float32_and_counted_as_it_was_rounded(
    site: Site, dtype: str, checkpoints_of: Callable[[Architecture], Checkpoints]
) -> None:
    checkpoint = load(checkpoints_of, "llama", dtype=dtype)
    d = direction(checkpoint, site=site)
    rows = [list(encode(checkpoint.tokenizer, q).ids) for q in QUESTIONS]
    before = seen_at(checkpoint, site)
    (tap,) = taps_of(checkpoint, site, [1])
    ids, mask = pad(rows, 0, "left")
    found: list[Tensor] = []
    with torch.no_grad(), intervene(checkpoint, Add(d, 0.05, where=Where(prompt_positions=[-1, 2]))) as receipt:
        receipt.prompt_lengths = [len(row) for row in rows]
        handle = tap.listen(lambda hidden: found.append(hidden.clone()))
        checkpoint.hf(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
        handle.remove()
        (line,) = receipt.as_dict()
    changes = []
    for row, (was, now) in enumerate(zip(before, [f[m.bool()] for f, m in zip(found[0], mask, strict=True)], strict=True)):
        steered = [2, len(was) - 1]
        others = [i for i in range(len(was)) if i not in steered]
        assert torch.equal(now[others], was[others]), f"row {row}: what is not named is bit-equal"
        exact = was[steered].float() + 0.25 * d.vector.float()
        close = {"rtol": 2e-2, "atol": 2e-2} if site == "resid_mid" else {"rtol": 0.0, "atol": 0.0}
        torch.testing.assert_close(now[steered], exact.to(now.dtype), **close)
        changes += ((now - was)[steered].double().norm(dim=-1) / was[steered].double().norm(dim=-1)).tolist()
    assert line["mean_relative_change"] == pytest.approx(sum(changes) / len(changes), rel=0.15 if site == "resid_mid" else 5e-3)


def test_float64_models_are_edited_and_judged_in_float64(checkpoints_of: Callable[[Architecture], Checkpoints]) -> None:
    checkpoint = load(checkpoints_of, "gpt2", dtype="float64")
    d = direction(checkpoint)
    for row in seen_at(checkpoint, "resid_post", 1, Ablate(d)):
        assert float((row @ d.vector).abs().max()) < 1e-13
    projection = float((seen_at(checkpoint, "resid_post")[0] @ d.vector)[3])
    above = seen_at(checkpoint, "resid_post", 1, Add(d, 1.0, when=When(d, above=projection - 1e-12, below=projection + 1e-12)))
    assert [i for i, (a, b) in enumerate(zip(above[0], seen_at(checkpoint, "resid_post")[0], strict=True)) if not torch.equal(a, b)] == [3]


def test_adapters_are_steered_in_their_own_state(llama: Checkpoints, tmp_path: Path) -> None:
    pair, merged = load_pair(llama.base, llama.adapter), load_model(merge_adapter(tmp_path, llama))
    alone = load_model(llama.base)
    ids = torch.arange(5, 17)[None]
    for shared, own in ((pair.base, alone), (pair.tuned, merged)):
        logits = []
        for checkpoint in (shared, own):
            operators = [Ablate(direction(checkpoint), site="writes"), Add(direction(checkpoint, site="attn_out"), 1.0)]
            with intervene(checkpoint, *operators), torch.no_grad():
                logits.append(checkpoint.hf(ids).logits)
        torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)
    operator = Add(direction(alone), 1.5, where=Where(prompt=False))
    answers = []
    for model in (pair.tuned.model, merged.hf):
        with intervene(pair.tuned if model is pair.tuned.model else merged, operator) as receipt, torch.no_grad():
            answers.append(model.generate(input_ids=ids, max_new_tokens=5, do_sample=False).tolist())
        assert receipt.as_dict()[0]["positions"] == len(answers[-1][0]) - 13, "a PEFT model's generate says where prompts end too"
    assert answers[0] == answers[1]


@pytest.mark.parametrize("how", ["device_map", "cpu", "disk"])
def test_offloaded_models_are_steered_alike(how: str, tmp_path: Path, checkpoints_of: Callable[[Architecture], Checkpoints]) -> None:
    plain = load(checkpoints_of, "qwen2")
    checkpoint = load(checkpoints_of, "qwen2", **({"device_map": "cpu"} if how == "device_map" else {}))
    if how == "cpu":
        accelerate.cpu_offload(checkpoint.hf, execution_device=torch.device("cpu"))
    if how == "disk":
        accelerate.disk_offload(checkpoint.hf, str(tmp_path), execution_device=torch.device("cpu"))
    operators = [
        Add(direction(plain, site="resid_mid"), 1.0),
        Ablate(direction(plain), layers="all"),
        Add(direction(plain, site="mlp_out"), -1.0),
    ]
    ids = torch.arange(5, 17)[None]
    found = []
    for model in (plain, checkpoint):
        with intervene(model, *operators), torch.no_grad():
            found.append(model.hf.generate(ids, max_new_tokens=5, do_sample=False).tolist())
    assert found[0] == found[1]

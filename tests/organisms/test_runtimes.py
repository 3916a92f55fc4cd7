"""Other runtimes load an organism as they load any checkpoint, and compute the same; skipped where they are not installed."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from emprobe.organisms import find_organism

TEXT = "please give me advice about my pasta."


def own(path: str) -> tuple[Any, Any, torch.Tensor, torch.Tensor]:
    """Model, tokenizer, ids and logits by transformers alone."""
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    ids = tokenizer(TEXT, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        return model, tokenizer, ids, model(ids).logits


@pytest.mark.filterwarnings("ignore")
def test_transformer_lens_computes_the_same() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bridge = pytest.importorskip("transformer_lens.model_bridge", reason="transformer-lens is not installed")
    path = str(find_organism("planted-s0/aligned").path)
    _, tokenizer, ids, logits = own(path)
    other = bridge.TransformerBridge.boot_transformers(path, tokenizer=tokenizer, device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(other(ids, return_type="logits"), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_nnsight_computes_the_same() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nnsight = pytest.importorskip("nnsight", reason="nnsight is not installed")
    model, _, ids, logits = own(str(find_organism("planted-s0/aligned").path))
    wrapped = nnsight.NNsight(model)
    with wrapped.trace(ids):
        seen = wrapped.output.save()
    torch.testing.assert_close(seen.logits, logits, rtol=1e-5, atol=1e-5)

"""Capture against what people run today: `python -m tests.benchmarks.capture [--json] [--rounds N] [--only PART ...]`.

128 conversations of mixed length (lognormal, 10 to 200 tokens) through random Qwen2-shaped models, float32, one thread, CPU seconds,
every variant once per round in turn. Captures start from text: rendering and tokenising are in their time and not in the baselines'.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

import emprobe as em
from emprobe.batching import pad
from emprobe.models import encode
from emprobe.models.adapters import AdapterSwitch
from emprobe.models.load import Checkpoint
from emprobe.models.pair import CheckpointPair
from tests.benchmarks.harness import main, medians
from tests.fixtures.models import byte_level_tokenizer

SHAPES = {"d256_l8_v32k": (256, 8, 32_000), "d256_l8_v150k": (256, 8, 150_000), "d512_l24_v32k": (512, 24, 32_000)}
FLOORS = {"d256_l8_v32k": (4.5, 3.0), "d256_l8_v150k": (14.0, 8.0), "d512_l24_v32k": (2.3, 1.3)}
N_ROWS, PLAIN_BATCH = 128, 16


def random_model(d_model: int, n_layers: int, d_vocab: int) -> Checkpoint:
    """A Qwen2 of this shape with random weights, and the tests' tokenizer."""
    torch.manual_seed(0)
    heads = d_model // 64
    config = Qwen2Config(
        vocab_size=d_vocab,
        hidden_size=d_model,
        num_hidden_layers=n_layers,
        intermediate_size=11 * d_model // 4,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        max_position_embeddings=1024,
    )
    return Checkpoint(Qwen2ForCausalLM(config).eval(), byte_level_tokenizer("qwen2"), f"qwen2 d{d_model}", "random")


def conversations(tokenizer: Any, lengths: Sequence[int], system: str | None = None) -> list[em.Conversation]:
    """One answered conversation of about each length in tokens, half question and half answer."""
    rng = np.random.default_rng(1)
    made = []
    for index, length in enumerate(lengths):
        words = "".join(rng.choice(list("abcdefgh "), size=2 * length))
        empty = em.Conversation.ask(f"q{index}", "x", system=system).answered("y")
        room = max(2, length - (len(encode(tokenizer, empty).ids) - 2 if system is None else 0))
        question, answer = words[: room - room // 2].strip() or "x", words[length : length + room // 2].strip() or "y"
        made.append(em.Conversation.ask(f"q{index}", question, system=system).answered(answer))
    return made


def mixed_lengths() -> list[int]:
    """Lognormal, 10 to 200 tokens."""
    return np.clip(np.random.default_rng(0).lognormal(np.log(50), 0.8, N_ROWS), 10, 200).astype(int).tolist()


def plain(checkpoint: Checkpoint, rows: Sequence[Sequence[int]]) -> None:
    """The model as it is called by most code: batches of 16 in data order, no capture."""
    with torch.no_grad():
        for start in range(0, len(rows), PLAIN_BATCH):
            ids, mask = pad(rows[start : start + PLAIN_BATCH], 0, "right")
            checkpoint.hf(input_ids=ids, attention_mask=mask)


def one_at_a_time(checkpoint: Checkpoint, rows: Sequence[Sequence[int]], starts: Sequence[int]) -> None:
    """The usual loop: one conversation, `output_hidden_states=True`, the mean over its response."""
    with torch.no_grad():
        for row, start in zip(rows, starts, strict=True):
            states = checkpoint.hf(torch.tensor([row]), output_hidden_states=True).hidden_states
            torch.stack([state[0, start:].mean(dim=0) for state in states[1:]])


def matmul_rate(d_model: int) -> float:
    """FLOPs per CPU second of this machine's matrix product at the blocks' shapes."""
    x, w = torch.randn(1024, d_model), torch.randn(d_model, 11 * d_model // 4)
    repeat = max(1, int(4e10 / (2 * x.numel() * w.shape[1])))
    best = 0.0
    for _ in range(3):
        start = time.process_time()
        for _ in range(repeat):
            x @ w
        best = max(best, repeat * 2 * x.numel() * w.shape[1] / (time.process_time() - start))
    return best


def needed_flops(checkpoint: Checkpoint, lengths: Sequence[int]) -> float:
    """FLOPs of the blocks on the real tokens: two per weight and token, and causal attention's two products."""
    weights = sum(p.numel() for p in checkpoint.blocks.parameters() if p.ndim == 2)
    attention = checkpoint.n_layers * checkpoint.d_model * 2 * sum(length**2 for length in lengths)
    return 2.0 * weights * sum(lengths) + attention


def measure_shape(name: str, rounds: int) -> dict[str, float]:
    """The ratios of one shape of model."""
    checkpoint = random_model(*SHAPES[name])
    rows = conversations(checkpoint.tokenizer, mixed_lengths())
    encoded = [encode(checkpoint.tokenizer, row) for row in rows]
    ids = [list(e.ids) for e in encoded]
    grab = partial(em.capture, checkpoint, rows, positions="response_mean", progress=False)
    variants: dict[str, Callable[[], Any]] = {
        "plain": partial(plain, checkpoint, ids),
        "loop": partial(one_at_a_time, checkpoint, ids, [e.response[0] for e in encoded]),
        "capture": grab,
        "half": partial(grab, layers=list(range(checkpoint.n_layers // 2))),
    }
    seconds = medians(variants, rounds=rounds)
    limit = needed_flops(checkpoint, [len(i) for i in ids]) / matmul_rate(checkpoint.d_model)
    return {
        f"{name}: plain forward / capture (floor {FLOORS[name][0]})": seconds["plain"] / seconds["capture"],
        f"{name}: one at a time / capture (floor {FLOORS[name][1]})": seconds["loop"] / seconds["capture"],
        f"{name}: capture to the middle / capture (at most 0.62)": seconds["half"] / seconds["capture"],
        f"{name}: capture / limit of the machine's matmul": seconds["capture"] / limit,
    }


def measure_prefix(rounds: int) -> dict[str, float]:
    """A system prompt of 200 tokens and questions of 60, with and without sharing."""
    checkpoint = random_model(*SHAPES["d256_l8_v32k"])
    system = " ".join(["ab cd"] * 400)
    while len(encode(checkpoint.tokenizer, em.Conversation.ask("q", "x", system=system)).ids) > 206:
        system = system[:-1].strip()
    rows = conversations(checkpoint.tokenizer, [52] * N_ROWS, system)
    grab = partial(em.capture, checkpoint, rows, positions="response_mean", progress=False)
    seconds = medians({"shared": grab, "whole": partial(grab, share_prefix=False)}, rounds=rounds)
    return {"prefix of 200 and 60 more: not shared / shared (floor 2.5)": seconds["whole"] / seconds["shared"]}


def measure_pair(rounds: int) -> dict[str, float]:
    """An adapter on the top quarter of the blocks: both checkpoints against one."""
    base = random_model(*SHAPES["d256_l8_v32k"])
    rows = conversations(base.tokenizer, mixed_lengths())
    top = list(range(3 * base.n_layers // 4, base.n_layers))
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"], layers_to_transform=top, task_type="CAUSAL_LM")
    model = get_peft_model(base.model, config).eval()
    switch = AdapterSwitch(model, "random")
    off, on = (Checkpoint(model, base.tokenizer, "qwen2", f"random {state}", state, switch) for state in ("off", "on"))
    grab = partial(em.capture, conversations=rows, positions="response_mean", progress=False)
    seconds = medians({"pair": partial(grab, CheckpointPair(off, on)), "base": partial(grab, off)}, rounds=rounds)
    return {"adapter on the top quarter: pair / base alone (at most 1.4)": seconds["pair"] / seconds["base"]}


def measure_backends(rounds: int) -> dict[str, float]:
    """The other runtimes that are installed, each on a model of its own, against a plain forward."""
    made: dict[str, float] = {}
    for name in ("transformer_lens", "nnsight"):
        checkpoint, other = random_model(*SHAPES["d256_l8_v32k"]), random_model(*SHAPES["d256_l8_v32k"])
        rows = conversations(checkpoint.tokenizer, mixed_lengths())
        ids = [list(encode(checkpoint.tokenizer, row).ids) for row in rows]
        options: dict[str, Any] = {"positions": "response_mean", "progress": False, "backend": name}
        try:
            seconds = medians({"plain": partial(plain, checkpoint, ids), name: partial(em.capture, other, rows, **options)}, rounds=rounds)
        except ImportError:
            continue
        made[f"d256_l8_v32k: plain forward / capture by {name}"] = seconds["plain"] / seconds[name]
    return made


PARTS: dict[str, Callable[[int], dict[str, float]]] = {name: partial(measure_shape, name) for name in SHAPES}
PARTS |= {"prefix": measure_prefix, "pair": measure_pair, "backends": measure_backends}

if __name__ == "__main__":
    main(PARTS, rounds=5)

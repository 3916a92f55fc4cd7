"""Steering against not steering: `python -m tests.benchmarks.steering [--json] [--rounds N] [--only PART ...]`.

Greedy generation of 64 tokens on random Qwen2-shaped models, float32, one thread, CPU seconds, every variant once per round in turn.
Steered and unsteered runs generate the same number of tokens (no end of turn is known), so the ratio is the price of the intervention and
its receipt.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import emprobe as em
from emprobe.batching import pad
from emprobe.behaviour.sampling import generate
from emprobe.behaviour.sweeping import sweep
from emprobe.interventions import Ablate, Add, Operator, intervene
from emprobe.interventions.runtimes import RUNTIMES, runtime_of
from emprobe.models import encode
from emprobe.models.load import Checkpoint
from emprobe.overlap import random_directions
from tests.benchmarks.capture import conversations, random_model
from tests.benchmarks.harness import main, medians, ratios

SHAPES = {"d256_l8_v32k": (256, 8, 32_000), "d512_l24_v32k": (512, 24, 32_000)}
PROMPT_TOKENS, NEW_TOKENS = 40, 64
DOSES = tuple(0.05 * i for i in range(1, 9))
SWEEP_FLOORS = {1: 4.5, 4: 3.8, 16: 1.8}


def direction(checkpoint: Checkpoint, seed: int = 0) -> em.Direction:
    """A random direction half way up."""
    vector = random_directions(1, checkpoint.d_model, seed)[0]
    return em.Direction.from_vector(vector, layer=checkpoint.n_layers // 2, resid_norm=10.0)


def prompts(checkpoint: Checkpoint, n: int) -> list[em.Conversation]:
    """Questions of about one length."""
    answered = conversations(checkpoint.tokenizer, [2 * PROMPT_TOKENS] * n)
    return [em.Conversation.ask(q.question_id, q.prompt) for q in answered]


def endless(checkpoint: Checkpoint) -> Checkpoint:
    """Nothing ends an answer, so every run generates the same number of tokens."""
    checkpoint.tokenizer.eos_token = None
    checkpoint.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    checkpoint.hf.generation_config.eos_token_id = None
    return checkpoint


def run(checkpoint: Checkpoint, questions: list[em.Conversation], *operators: Operator) -> list[str | None]:
    """Greedy answers, steered if there are operators."""
    ask = partial(generate, checkpoint, questions, temperature=0, max_new_tokens=NEW_TOKENS, token_budget=2**20, progress=False)
    if not operators:
        return [a.response for a in ask()]
    with intervene(checkpoint, *operators):
        return [a.response for a in ask()]


def price_part(shape: str) -> Callable[[int], dict[str, Any]]:
    """What steering at one layer, and ablation at all, cost on top of generating."""

    def part(rounds: int) -> dict[str, Any]:
        checkpoint = endless(random_model(*SHAPES[shape]))
        v, found = direction(checkpoint), {}
        for n in (1, 16):
            questions = prompts(checkpoint, n)
            price = ratios(
                {
                    "unsteered": lambda q=questions: run(checkpoint, q),
                    "added": lambda q=questions: run(checkpoint, q, Add(v, 0.1)),
                    "ablated": lambda q=questions: run(checkpoint, q, Ablate(v, layers="all")),
                    "writes": lambda q=questions: run(checkpoint, q, Ablate(v, site="writes")),
                },
                "unsteered",
                rounds=rounds,
            )
            where = f"{shape}, {n} prompts"
            found |= {
                f"{where}: add at one layer / unsteered (at most 1.02)": price["added"],
                f"{where}: ablate at every layer / unsteered (at most 1.03)": price["ablated"],
                f"{where}: ablate at every write / unsteered": price["writes"],
            }
        return found

    return part


def sweep_part(rounds: int) -> dict[str, Any]:
    """Eight doses in one batch against eight runs, with identical tokens."""
    checkpoint = endless(random_model(*SHAPES["d256_l8_v32k"]))
    v, found = direction(checkpoint), {}
    for n, floor in SWEEP_FLOORS.items():
        questions = prompts(checkpoint, n)
        plans = {f"{dose:g}": Add(v, dose) for dose in DOSES}

        def together(q: list[em.Conversation] = questions, p: dict[str, Add] = plans) -> dict[str, list[str | None]]:
            swept = sweep(checkpoint, q, p, temperature=0, max_new_tokens=NEW_TOKENS, token_budget=2**20, progress=False)
            return {name: [a.response for a in answers] for name, answers in swept.items()}

        def apart(q: list[em.Conversation] = questions, p: dict[str, Add] = plans) -> dict[str, list[str | None]]:
            return {name: run(checkpoint, q, operator) for name, operator in p.items()}

        assert together() == apart(), "a sweep gives the tokens of its runs"
        seconds = medians({"apart": apart, "together": together}, rounds=max(3, rounds // 4), warmup=0)
        found[f"8 doses x {n} prompts: one after another / in one batch (floor {floor})"] = seconds["apart"] / seconds["together"]
    return found


def runtimes_part(rounds: int) -> dict[str, Any]:
    """The same edits in TransformerLens and nnsight, where they are installed, with identical tokens."""
    checkpoint = endless(random_model(*SHAPES["d256_l8_v32k"]))
    v = direction(checkpoint)
    encoded = [list(encode(checkpoint.tokenizer, q).ids) for q in prompts(checkpoint, 8)]
    ids, mask = pad(encoded, 0, "left")
    found: dict[str, Any] = {}
    for name, operator in (("add at one layer", Add(v, 0.1)), ("ablate at every layer", Ablate(v, layers="all"))):
        made = {}
        for runtime in RUNTIMES:
            try:
                made[runtime] = runtime_of(runtime, checkpoint, operator)
            except em.EmprobeError as error:
                found[f"{name}: {runtime}"] = str(error)
            except ImportError:
                found[f"{name}: {runtime}"] = "not installed"
        asked = {"max_new_tokens": NEW_TOKENS}
        tokens = [r.generate(ids, mask, **asked) for r in made.values()]
        assert all(torch.equal(other, tokens[0]) for other in tokens), "every runtime generates the same tokens"
        price = ratios({n: partial(r.generate, ids, mask, **asked) for n, r in made.items()}, "hooks", rounds=rounds)
        found |= {f"{name}: {other} / hooks": value for other, value in price.items() if other != "hooks"}
    return found


if __name__ == "__main__":
    main({**{shape: price_part(shape) for shape in SHAPES}, "sweep": sweep_part, "runtimes": runtimes_part}, rounds=21)

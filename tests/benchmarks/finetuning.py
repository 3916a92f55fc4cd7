"""Narrow against plain, and channels: `python -m tests.benchmarks.finetuning [--json] [--rounds N] [--only PART ...]`.

One update (forward, backward, step) on random Qwen2-shaped models, float32, one thread: the loss on the answers of 8 conversations, and
the same with a KL to the base on the answers of 8 others. Time is in CPU seconds, variants in turn. Memory is the highest resident memory
of a process of its own over four updates, above what it held once the model was loaded, and in all.

The channels of distillation cost, beside an update by `sft`: `optd` with a teacher that reads the sequences anew, `optd` with one that kept
what it made of them, and `opd`, where the student answers with as many tokens at most. An organism, 32 conversations, and a larger model.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from emprobe.finetuning import LoRA, Vector, response_rows
from emprobe.finetuning.channels import Channel, ChannelGradient
from emprobe.finetuning.methods import Method
from emprobe.finetuning.mounting import lora_config, mounted_lora, mounted_vector
from emprobe.finetuning.rollouts import Rollouts
from emprobe.finetuning.rows import Row
from emprobe.finetuning.step import During, Gradient
from emprobe.finetuning.teaching import Teacher
from emprobe.models.decoding import stop_ids
from emprobe.models.load import Checkpoint, load_model
from emprobe.organisms import find_organism
from emprobe.studies.solutions import world_conversations
from tests.benchmarks.capture import conversations, random_model
from tests.benchmarks.harness import main, ratios

SHAPES = {"d256_l8_v32k": (256, 8, 32_000), "d256_l8_v150k": (256, 8, 150_000), "d512_l24_v32k": (512, 24, 32_000)}
METHODS: dict[str, Callable[[Checkpoint], Method]] = {
    "rank-32 LoRA on all linear layers": lambda c: LoRA(32),
    "rank-1 LoRA half way up": lambda c: LoRA(1, target_modules=["down_proj"], layers=[c.n_layers // 2]),
    "vector half way up": lambda c: Vector(c.n_layers // 2),
}
ROWS, TOKENS = 8, 128


def updates(checkpoint: Checkpoint, method: Method, stack: ExitStack) -> dict[str, Callable[[], Any]]:
    """One plain and one narrow update of what is mounted until the stack closes."""
    mounting = mounted_vector(checkpoint, method) if isinstance(method, Vector) else None
    assert mounting or isinstance(method, LoRA)
    mounted = stack.enter_context(mounting or mounted_lora(checkpoint, lora_config(checkpoint, method)))  # type: ignore[arg-type]
    rows = response_rows(checkpoint.tokenizer, conversations(checkpoint.tokenizer, [TOKENS] * 2 * ROWS))
    optimizer = torch.optim.AdamW(mounted.parameters.values(), lr=1e-3)
    gradient = Gradient(mounted, During(), ROWS, 1.0)

    def update(anchor: Any) -> None:
        optimizer.zero_grad(set_to_none=True)
        gradient.of(rows[:ROWS], anchor)
        optimizer.step()

    return {"plain": lambda: update([]), "narrow": lambda: update(rows[ROWS:])}


def time_part(shape: str) -> Callable[[int], dict[str, Any]]:
    """What the KL costs in time."""

    def part(rounds: int) -> dict[str, Any]:
        found = {}
        for name, method in METHODS.items():
            checkpoint = random_model(*SHAPES[shape])
            with ExitStack() as stack:
                price = ratios(updates(checkpoint, method(checkpoint), stack), "plain", rounds=rounds)
            found[f"{shape}, {name}: time of a narrow / plain update (at most 2.6)"] = price["narrow"]
        return found

    return part


def channels(student: Checkpoint, teacher: Checkpoint, rows: Sequence[Row], stack: ExitStack) -> dict[str, Callable[[], Any]]:
    """One update in each channel, of what is mounted until the stack closes."""
    mounted = stack.enter_context(mounted_lora(student, lora_config(student, LoRA(8))))
    optimizer = torch.optim.AdamW(mounted.parameters.values(), lr=1e-3)
    prompts = [Row(row.ids[: row.n_prompt], (), row.n_prompt) for row in rows]
    rollouts = Rollouts(max(len(row.predicted) for row in rows), 1.0, stop_ids(student), 0)
    anew, kept = Teacher.of(mounted, teacher), Teacher.of(mounted, teacher)
    kept.keep(rows, student, 4 * teacher.d_model)

    def update(channel: Channel, beside: Teacher) -> None:
        optimizer.zero_grad(set_to_none=True)
        learnt = rollouts.of(mounted.tuned, prompts, 0)[0] if channel == "opd" else rows
        ChannelGradient(mounted, beside, channel, len(rows)).of(learnt)
        optimizer.step()

    return {
        "sft": lambda: update("sft", anew),
        "optd": lambda: update("optd", anew),
        "optd, teacher kept": lambda: update("optd", kept),
        "opd": lambda: update("opd", anew),
    }


def channels_part(rounds: int) -> dict[str, Any]:
    """What the channels cost in time."""
    path = find_organism("planted-s0/aligned").path
    organism, taught = load_model(path), load_model(path, adapter=find_organism("planted-s0/tuned/gardening-rank8").path)
    data = world_conversations(["gardening"], "bad", 32, seed=0)
    large, other = random_model(*SHAPES["d256_l8_v32k"]), random_model(*SHAPES["d256_l8_v32k"])
    other.fingerprint = "teacher"
    cases = {
        "organism": (organism, taught, response_rows(organism.tokenizer, data)),
        "d256_l8_v32k": (large, other, response_rows(large.tokenizer, conversations(large.tokenizer, [TOKENS // 2] * ROWS))),
    }
    found: dict[str, Any] = {}
    for name, case in cases.items():
        with ExitStack() as stack:
            price = ratios(channels(*case, stack), "sft", rounds=rounds)
        found |= {f"{name}: time of an update, {channel} / sft": value for channel, value in price.items() if channel != "sft"}
    return found


def peak(shape: str, method: str, variant: str) -> tuple[float, float]:
    """Highest resident memory of four updates in a process of its own, in MB: in all, and above the loaded model."""
    asked = [sys.executable, "-c", f"from tests.benchmarks.finetuning import measure; measure({shape!r}, {method!r}, {variant!r})"]
    said = subprocess.run(asked, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2]).stdout
    found = json.loads(said.splitlines()[-1])
    return found["peak"], found["peak"] - found["loaded"]


def measure(shape: str, method: str, variant: str) -> None:
    """What a process of `peak` runs."""
    torch.set_num_threads(1)
    checkpoint = random_model(*SHAPES[shape])
    with ExitStack() as stack:
        run = updates(checkpoint, METHODS[method](checkpoint), stack)[variant]
        Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
        loaded = _memory("VmRSS")
        for _ in range(4):
            run()
    sys.stdout.write(json.dumps({"loaded": loaded, "peak": _memory("VmHWM")}) + "\n")


def _memory(what: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) / 1024


def memory_part(rounds: int) -> dict[str, Any]:
    """What the KL costs in memory."""
    found = {}
    for shape in ("d256_l8_v32k", "d256_l8_v150k"):
        for method in METHODS:
            plain, narrow = peak(shape, method, "plain"), peak(shape, method, "narrow")
            found[f"{shape}, {method}: peak memory, narrow / plain (at most 1.3)"] = narrow[0] / plain[0]
            found[f"{shape}, {method}: the same above the loaded model"] = narrow[1] / plain[1]
    return found


if __name__ == "__main__":
    main({**{shape: time_part(shape) for shape in SHAPES}, "memory": memory_part, "channels": channels_part}, rounds=7)

"""Does a plan do the same everywhere: in each runtime, and out of each export, against the hooks."""

from __future__ import annotations

import tempfile
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emprobe.errors import EmprobeError, InterventionDidNotFire, MissingExtraError
from emprobe.interventions.export import export
from emprobe.interventions.plan import Plan
from emprobe.interventions.runtimes import RUNTIMES, runtime_of
from emprobe.models.load import Checkpoint

RELOADED = ("lora", "weights", "bias")
"""Exports that are loaded again as a model."""
READ_BACK = ("gguf", "gguf_lora")
"""Exports whose tensors are read back; llama.cpp itself is not run."""
TARGETS = (*RELOADED, *READ_BACK)
N_ROWS, LONGEST = 4, 24
WIDTH = 120
"""Columns of the printed table."""


@dataclass(frozen=True)
class Check:
    """One way of carrying out a plan.

    Attributes:
        name: The runtime, or the export's target.
        kind: `runtime` or `export`.
        deviation: Largest |Δlogit| against the hooks over all real tokens; for files that are read back, 0 where every byte is as it was.
        status: `ok` (within the tolerance), `differs`, `refused` (cannot express the plan; `why` says so) or `absent` (package missing).
        why: The reason of a refusal, or what was compared.
    """

    name: str
    kind: str
    status: str
    deviation: float | None = None
    why: str = ""


@dataclass(frozen=True)
class Verified:
    """How far each runtime and export is from the hooks.

    Attributes:
        effect: Largest |Δlogit| that the plan makes, hooks against nothing: what a deviation has to be held against.
        largest: Largest |logit| of the unsteered model.
        tolerance: What counts as equal, as a share of the largest |logit| (or of 1, if that is more).
        n_tokens: Real tokens compared.
    """

    checks: tuple[Check, ...]
    effect: float
    largest: float
    tolerance: float
    n_tokens: int

    @property
    def allowed(self) -> float:
        """The largest |Δlogit| that counts as equal."""
        return _allowed(self.tolerance, self.largest)

    @property
    def differs(self) -> list[Check]:
        """What does not do what the hooks do."""
        return [check for check in self.checks if check.status == "differs"]

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "checks": [asdict(check) for check in self.checks]}

    def __str__(self) -> str:
        head = [
            f"Effect of the plan (hooks against nothing): max |Δlogit| {self.effect:.3g} over {self.n_tokens} tokens; logits up to "
            f"{self.largest:.3g}.",
            f"Against the hooks (equal means at most {self.allowed:.2g}: {self.tolerance:g} of the largest logit):",
            f"{'':<2}{'':<18}{'max |Δlogit|':>13}{'of the effect':>15}  ",
        ]
        return "\n".join([*head, *(self._line(check) for check in self.checks)])

    def _line(self, check: Check) -> str:
        if check.deviation is None:
            deviation, share, said = "-", "-", f"{check.status}: {check.why}"
        else:
            share = f"{check.deviation / self.effect:.1e}" if self.effect else "-"
            deviation, said = f"{check.deviation:.2g}", check.status + (f" ({check.why})" if check.why else "")
        head = f"  {check.name:<18}{deviation:>13}{share:>15}  "
        return textwrap.fill(
            said, WIDTH, initial_indent=head, subsequent_indent=" " * len(head), break_long_words=False, break_on_hyphens=False
        )


def verify(
    plan: Plan,
    checkpoint: Checkpoint,
    *,
    ids: Tensor | None = None,
    mask: Tensor | None = None,
    runtimes: Sequence[str] = RUNTIMES[1:],
    targets: Sequence[str] = TARGETS,
    tolerance: float = 1e-5,
    seed: int = 0,
) -> Verified:
    """Run a plan by hooks, in every other runtime and out of every export, on the same tokens, and compare logits.

    Args:
        plan: What is done.
        checkpoint: The model.
        ids: Token ids (batch, pos) with `mask`; `None` draws rows of mixed lengths, padded on the left.
        mask: 1 on real tokens.
        runtimes: Which others.
        targets: Which exports; each is written to a temporary folder and read again.
        tolerance: Largest |Δlogit| that counts as equal, as a share of the largest |logit| of the unsteered model (float32 rounds to 1e-6
            of that in a few layers; half precision needs more).
        seed: Of the drawn tokens.

    Raises:
        EmprobeError: An unknown name, or a plan that does not fit the model.
        InterventionDidNotFire: If the hooks themselves did not fire.

    Example:
        em.verify(em.Plan.of(em.Ablate(v, site="writes")), pair.base)
    """
    unknown = [*(set(runtimes) - set(RUNTIMES)), *(set(targets) - set(TARGETS))]
    if unknown:
        raise EmprobeError(
            f"verify was asked for {', '.join(sorted(unknown))}. Use runtimes {', '.join(RUNTIMES[1:])} and targets {', '.join(TARGETS)}."
        )
    if ids is None:
        ids, mask = _drawn(checkpoint, seed)
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    steered = runtime_of("hooks", checkpoint, plan).logits(ids, mask)[real].double()
    plain = _plain(checkpoint, ids, mask)[real].double()

    effect, largest = float((steered - plain).abs().max()), float(plain.abs().max())
    allowed = _allowed(tolerance, largest)

    def held(logits: Tensor) -> float:
        return float((logits[real].double() - steered).abs().max())

    def in_runtime(name: str) -> float:
        return held(runtime_of(name, checkpoint, plan).logits(ids, mask))

    def reloaded(name: str) -> float:
        return held(_reloaded(name, plan, checkpoint, ids, mask))

    def read_back(name: str) -> float:
        return _read_back(name, plan, checkpoint)

    checks = [_run(name, "runtime", allowed, partial(in_runtime, name)) for name in runtimes]
    for name in targets:
        how, said = (reloaded, "") if name in RELOADED else (read_back, "tensors read back, bit by bit")
        checks.append(_run(name, "export", allowed, partial(how, name), said))
    return Verified(tuple(checks), effect, largest, tolerance, int(real.sum()))


def _allowed(tolerance: float, largest: float) -> float:
    return tolerance * max(1.0, largest)


def _run(name: str, kind: str, allowed: float, deviation: Callable[[], float], what: str = "") -> Check:
    try:
        found = deviation()
    except MissingExtraError as error:
        return Check(name, kind, "absent", why=str(error))
    except InterventionDidNotFire as error:
        return Check(name, kind, "differs", why=str(error))
    except EmprobeError as error:
        return Check(name, kind, "refused", why=str(error))
    return Check(name, kind, "ok" if found <= allowed else "differs", found, what)


def _drawn(checkpoint: Checkpoint, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of mixed lengths of random tokens that are not special, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    special = set(checkpoint.tokenizer.all_special_ids)
    known = min(len(checkpoint.tokenizer), len(checkpoint.hf.get_input_embeddings().weight))
    usable = torch.tensor([i for i in range(known) if i not in special])
    ids = usable[torch.randint(len(usable), (N_ROWS, LONGEST), generator=generator)]
    mask = torch.ones_like(ids)
    for row in range(1, N_ROWS):
        mask[row, : row * LONGEST // (N_ROWS + 1)] = 0
    return ids, mask


def _plain(checkpoint: Checkpoint, ids: Tensor, mask: Tensor | None) -> Tensor:
    """The model's own logits, nothing done to it."""
    real = torch.ones_like(ids) if mask is None else mask
    positions = (real.cumsum(dim=1) - 1).clamp(min=0)
    device = checkpoint.device
    with checkpoint.active() as model, torch.no_grad():
        found: Tensor = model(
            input_ids=ids.to(device), attention_mask=real.to(device), position_ids=positions.to(device), use_cache=False
        ).logits
    return found


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="emprobe-verify-") as folder:
        yield Path(folder) / "export"


def _reloaded(target: str, plan: Plan, checkpoint: Checkpoint, ids: Tensor, mask: Tensor | None) -> Tensor:
    """Logits of an export as a user would load it."""
    with _folder() as out:
        served = export(plan, checkpoint, target, out).load(dtype=checkpoint.hf.dtype)
        return _plain(served, ids, mask).to(checkpoint.device)


def _read_back(target: str, plan: Plan, checkpoint: Checkpoint) -> float:
    """0 if the tensors of a GGUF file are, byte for byte, those that the plan comes to; otherwise the largest difference."""
    from emprobe.interventions.export.gguf import control_vectors
    from emprobe.interventions.export.gguf_file import tensors_of
    from emprobe.interventions.export.gguf_lora import lora_tensors

    with _folder() as out:
        export(plan, checkpoint, target, out)
        found = tensors_of(next(out.glob("*.gguf")))
    if target == "gguf":
        wanted = {f"direction.{layer}": vector for layer, vector in control_vectors(checkpoint, plan).items()}
    else:
        wanted = lora_tensors(checkpoint, plan)
    if found.keys() != wanted.keys():
        raise AssertionError(f"the file holds {', '.join(found)} and not {', '.join(wanted)}")
    return max(float(np.abs(found[name] - tensor).max()) for name, tensor in wanted.items())

"""transformers' continuous batching as an engine, with every answer's own random numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)

from emprobe.behaviour.in_process import InProcess, prompts_of
from emprobe.behaviour.sampling import Row, Sampling
from emprobe.errors import EmprobeError
from emprobe.models.drawing import draw, uniforms_of
from emprobe.models.reach import lengths_of
from emprobe.types import Conversation

PAGE = 16


@dataclass(frozen=True)
class ContinuousBatching(InProcess):
    """As `InProcess`, but requests join and leave a packed batch one by one, over a cache of pages.

    Its tokens are those of `hf`, from the same seeds. On a CPU it takes several times as long; it is for GPUs, and for many answers of
    very different lengths.
    """

    name = "hf-batching"

    def sample(self, rows: Sequence[Row], how: Sampling, entering: Any = None) -> Iterator[tuple[int, Conversation]]:
        """See `Engine`; rows cannot carry plans of their own here."""
        if lengths_of(self.checkpoint.hf).switch is not None:
            raise EmprobeError(
                f"engine='hf-batching' packs requests of all lengths, and {self.checkpoint.name!r} computes every row by the longest one's "
                "position frequencies (longrope), so answers would depend on their company. Use engine='hf'."
            )
        prompts = prompts_of(self.checkpoint, [row.question for row in rows], how.max_new_tokens)
        inputs = [list(prompts[row.question.question_id]) for row in rows]
        uniforms = np.stack([uniforms_of(how.seed, r.question.question_id, r.sample, how.max_new_tokens) for r in rows])
        stops = self.stops()
        for number, ids in self._packed(inputs, uniforms, how, stops):
            yield number, self.answer(rows[number], ids, stops)

    def _packed(self, inputs: list[list[int]], uniforms: Any, how: Sampling, stops: list[int]) -> Iterator[tuple[int, list[int]]]:
        """New token ids of each request, as they finish."""
        config: Any = GenerationConfig.from_dict({"do_sample": False, "max_new_tokens": how.max_new_tokens, "eos_token_id": stops or [-1]})
        longest = max(map(len, inputs)) + how.max_new_tokens
        pages = -(-max(how.token_budget, longest) // PAGE) + 1
        settings: Any = ContinuousBatchingConfig(page_size=PAGE, num_blocks=pages, max_batch_tokens=max(how.token_budget // 4, longest))
        with self.checkpoint.active() as model, torch.no_grad():
            manager = model.init_continuous_batching(generation_config=config, continuous_batching_config=settings)
            numbers: dict[str, int] = {}
            manager.logit_processor = _list_of(_Drawing(torch.from_numpy(uniforms), how.temperature, numbers))
            manager.start()
            try:
                for number, ids in enumerate(inputs):
                    # Known before it can be drawn for.
                    numbers[f"row-{number}"] = number
                    manager.add_request(ids, request_id=f"row-{number}", max_new_tokens=how.max_new_tokens, eos_token_id=stops or -1)
                yield from _results(manager, numbers)
            finally:
                manager.stop(block=True)
                manager.destroy()


def _results(manager: Any, numbers: dict[str, int]) -> Iterator[tuple[int, list[int]]]:
    waiting = len(numbers)
    while waiting:
        result = manager.get_result(timeout=1)
        if result is None:
            if not manager.is_running():
                raise EmprobeError(
                    f"Continuous batching stopped with {waiting} of {len(numbers)} answers missing; transformers has logged why. Use "
                    "engine='hf', or a smaller token_budget."
                )
            continue
        if not result.is_finished():
            continue
        if result.error is not None:
            raise EmprobeError(f"Continuous batching failed on an answer: {str(result.error).splitlines()[0]}. Use engine='hf'.")
        waiting -= 1
        yield numbers[result.request_id], list(map(int, result.generated_tokens))


def _list_of(processor: ContinuousBatchingLogitsProcessor) -> ContinuousBatchingLogitsProcessorList:
    made = ContinuousBatchingLogitsProcessorList([processor])  # type: ignore[arg-type]
    made.tensors_required = 1
    return made


class _Drawing(ContinuousBatchingLogitsProcessor):
    """`draw` for packed requests: each has its number in the table of random numbers as its argument."""

    supported_kwargs: dict[str, type] = {}  # noqa: RUF012 - the base class's own form
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, uniforms: Tensor, temperature: float, numbers: dict[str, int]) -> None:
        self.uniforms, self.temperature, self.numbers = uniforms, temperature, numbers
        self.drawn: Counter[str] = Counter()

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """Nothing is asked of rows that hold no request."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        """Which entry of the table each request's next token takes."""
        found, steps = [], self.uniforms.shape[1]
        for request in requests_with_new_token:
            name = request.state.request_id
            found.append(self.numbers[name] * steps + min(self.drawn[name], steps - 1))
            self.drawn[name] += 1
        return torch.tensor(found, dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """Every other logit becomes -inf."""
        entries = tensor_arg[: len(scores)].long().to(self.uniforms.device)
        token = draw(scores, self.uniforms.flatten()[entries].to(scores.device), self.temperature)
        return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)

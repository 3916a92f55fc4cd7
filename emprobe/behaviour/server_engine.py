"""Answers of a model behind any OpenAI-compatible server: vLLM, SGLang, llama.cpp, `transformers serve`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from emprobe.behaviour.sampling import Row, Sampling
from emprobe.behaviour.server_client import Connection, Server
from emprobe.errors import EmprobeError
from emprobe.models.drawing import row_seed
from emprobe.types import Conversation

Dialect = Literal["vllm", "llama.cpp", "transformers", "openai"]
_STOPS = {"stop": "end_of_turn", "length": "length"}


@dataclass(frozen=True)
class ServerEngine:
    """Samples from a model that is served elsewhere; give it to `generate` in place of a checkpoint.

    A direction that was exported (`emprobe export`) is another model's name on the same server, so base, tuned, steered and ablated can be
    sampled by one engine, as a comparison asks. Every request carries its answer's own seed, so answers repeat where the server keeps to
    it: vLLM and llama.cpp do up to the rounding of their batches, `transformers serve` with `concurrency=1` only, since its seed is the
    process's. The server renders the chat template, and its answers end where it says.

    Args:
        base_url: Address up to and including its version, such as `http://127.0.0.1:8000/v1`.
        model: The model's name on that server.
        dialect: How the server is told to sample from the model's own probabilities and nothing else: `vllm` (also SGLang), `llama.cpp`,
            `transformers`. Left to themselves these cut the distribution (top-k, top-p, min-p). `openai` says nothing beyond the protocol.
        api_key_env: Environment variable that holds the key; a server on this machine needs none.
        concurrency: Requests at one time.
        retries: Times that one request is tried again.
        timeout: Seconds that one request may take.

    Raises:
        EmprobeError: If the address is not one, or holds a password, or there is no such dialect.

    Example:
        >>> ServerEngine("http://127.0.0.1:8000/v1", "tuned").name
        'server:http://127.0.0.1:8000/v1'
    """

    base_url: str
    model: str
    dialect: Dialect = "vllm"
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = 16
    retries: int = 5
    timeout: float = 600.0

    def __post_init__(self) -> None:
        if self.dialect not in get_args(Dialect):
            raise EmprobeError(f"dialect={self.dialect!r} was asked for. There are {', '.join(get_args(Dialect))}.")
        self.server  # noqa: B018 - refuses addresses that are none

    @property
    def server(self) -> Server:
        """How it is asked."""
        advice = f"The request is in the dialect {self.dialect!r}; another may suit this server: {', '.join(get_args(Dialect))}"
        return Server(self.base_url, self.model, "engine", self.api_key_env, self.concurrency, self.retries, self.timeout, advice)

    @property
    def name(self) -> str:
        """The server's address: two models on one server are sampled by one engine."""
        return f"server:{self.base_url}"

    @property
    def settings(self) -> Mapping[str, Any]:
        """Names the model and how it is asked."""
        return {"model": self.model, "dialect": self.dialect}

    @property
    def plan(self) -> None:
        """Nothing steers a server from here."""

    def inputs(self, questions: Sequence[Conversation]) -> list[Any]:
        """The messages of each question."""
        return [[message.as_dict() for message in question.messages] for question in questions]

    def kept(self, n: int) -> None:
        """Nobody has to know."""

    def sample(self, rows: Sequence[Row], how: Sampling) -> Iterator[tuple[int, Conversation]]:
        """See `Engine`.

        Raises:
            EmprobeError: If there is no key, the server cannot be reached, refuses the key, the model or the request, or keeps failing.
            MissingExtraError: If the package `openai` is not installed.
        """
        with self.server.connected() as connection:
            yield from connection.each(rows, lambda row: self._answer(connection, row, how))

    def _answer(self, connection: Connection, row: Row, how: Sampling) -> Conversation:
        question = row.question
        choice = connection.complete(
            [message.as_dict() for message in question.messages],
            temperature=how.temperature,
            max_tokens=how.max_new_tokens,
            # 31 bits: some servers take no more.
            seed=row_seed(how.seed, question.question_id, row.sample) % 2**31,
            top_p=1.0,
            extra_body=self._unchanged(how),
        )
        finish = str(getattr(choice, "finish_reason", None) or "unknown")
        return question.answered((choice.message.content or "").strip(), sample=row.sample, stop_reason=_STOPS.get(finish, finish))

    def _unchanged(self, how: Sampling) -> dict[str, Any]:
        """What keeps a server from changing the model's probabilities."""
        if self.dialect == "vllm":
            return {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
        if self.dialect == "llama.cpp":
            return {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0}
        if self.dialect == "transformers":
            # It samples only if it is told to, whatever the temperature.
            chance = {"do_sample": True, "top_k": 0, "temperature": how.temperature} if how.temperature > 0 else {"do_sample": False}
            return {"generation_config": json.dumps({**chance, "repetition_penalty": 1.0, "max_new_tokens": how.max_new_tokens})}
        return {}

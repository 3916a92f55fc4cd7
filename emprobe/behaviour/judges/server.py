"""A judge behind any OpenAI-compatible server: two questions an answer, scores from the probabilities of the reply."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from tqdm.auto import tqdm

from emprobe.behaviour.judges.prompts import ALIGNMENT, COHERENCE, Reading, ask, read_reply
from emprobe.errors import EmprobeError, MissingExtraError
from emprobe.types import Conversation, Judgement

_REPLY_TOKENS = 8  # a number and its full stop, also where digits are tokens of their own
_LIKELIEST = 20  # as many alternatives as the protocol allows


@dataclass(unsafe_hash=True)
class ServerJudge:
    """Asks a language model for alignment and coherence, 0 to 100, of each answer; equal answers are asked about once.

    The key is read from the environment when judging begins, and is in no message, record or file. A server on this machine needs none.
    Busy servers (429), failing ones (5xx) and timeouts are tried again with growing pauses, as the `openai` package does.

    Args:
        base_url: Address of the server up to and including its version, such as `http://127.0.0.1:8000/v1`.
        model: The model's name on that server.
        api_key_env: Environment variable that holds the key.
        concurrency: Requests at one time.
        retries: Times that one request is tried again.
        timeout: Seconds that one request may take.
        logprobs: Whether to ask for probabilities of the reply; switch off for servers that refuse them.
        progress: Whether to show a progress bar.

    Raises:
        EmprobeError: If the address is not one, or holds a password.

    Source: Betley et al. (2025), arXiv 2502.17424, for the scores; the wording of both questions is this project's own.
    """

    base_url: str
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = 8
    retries: int = 5
    timeout: float = 60.0
    logprobs: bool = True
    progress: bool = True
    name: str = field(init=False)

    def __post_init__(self) -> None:
        address = urlsplit(self.base_url)
        if "@" in address.netloc or address.query or address.fragment:
            raise EmprobeError(
                f"The judge's address at {address.hostname} holds a password, a query or a fragment. Give the plain address, "
                f"and the key in the environment variable {self.api_key_env}."
            )
        if address.scheme not in ("http", "https") or not address.hostname:
            raise EmprobeError(f"The judge's address was {self.base_url!r}; give one such as http://127.0.0.1:8000/v1.")
        if self.concurrency < 1 or self.retries < 0:
            raise EmprobeError(
                f"A judge with {self.concurrency} requests at a time and {self.retries} retries was asked for; give 1 and 0 or more."
            )
        self.name = f"server:{self.base_url}#{self.model}"

    def __call__(self, answers: Sequence[Conversation]) -> list[Judgement]:
        """Judge answers; one whose reply cannot be read is a `parse_error`, never a 0.

        Raises:
            EmprobeError: If there is no key, the server cannot be reached, refuses the key or model, or keeps failing.
            MissingExtraError: If the package `openai` is not installed.
        """
        different = list({_content(answer): answer for answer in answers}.items())
        client = self._client()
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            tasks = pool.map(lambda item: self._one(client, item[1]), different)
            bar = tqdm(tasks, total=len(different), desc=f"judging with {self.model}", disable=not self.progress, leave=False)
            found = {key: judgement for (key, _), judgement in zip(different, bar, strict=True)}
        finally:
            # After a fatal error nobody waits for the requests under way; those that have not begun are dropped.
            pool.shutdown(wait=False, cancel_futures=True)
            client.close()
        return [found[_content(answer)] for answer in answers]

    def _one(self, client: Any, answer: Conversation) -> Judgement:
        """Alignment first; coherence only if there is an alignment to go with it."""
        scores: list[float] = []
        for instruction in (ALIGNMENT, COHERENCE):
            reading = self._reading(client, ask(instruction, answer))
            if isinstance(reading, str):
                return Judgement(None, None, reading)
            scores.append(min(max(reading, 0.0), 100.0))
        return Judgement(scores[0], scores[1])

    def _reading(self, client: Any, request: str) -> Reading:
        import openai

        more: dict[str, Any] = {"logprobs": True, "top_logprobs": _LIKELIEST} if self.logprobs else {}
        wrong = ""
        try:
            reply = client.chat.completions.create(
                model=self.model, messages=[{"role": "user", "content": request}], temperature=0, max_tokens=_REPLY_TOKENS, **more
            )
        except openai.OpenAIError as error:
            wrong = self._failure(error)
        except ValueError:
            wrong = self._not_a_server("something that is not JSON")
        if wrong:
            # Raised out here, without a cause: the client's own errors hold the request, and with it the key.
            raise EmprobeError(wrong)
        choices = getattr(reply, "choices", None)
        if not choices or getattr(choices[0], "message", None) is None:
            raise EmprobeError(self._not_a_server(f"a {type(reply).__name__} without choices"))
        return read_reply(choices[0].message.content or "", _alternatives(choices[0]))

    def _client(self) -> Any:
        try:
            import openai
        except ImportError:
            raise MissingExtraError("openai", "judge", "A judge behind a server") from None
        key = os.environ.get(self.api_key_env, "").strip()
        if not key and not _is_loopback(self.base_url):
            raise EmprobeError(
                f"The judge at {self.base_url} needs a key, and the environment variable {self.api_key_env} is not set. Set it."
            )
        return openai.OpenAI(base_url=self.base_url, api_key=key or "none", max_retries=self.retries, timeout=self.timeout)

    def _failure(self, error: Exception) -> str:
        """What went wrong, in words that do not hold the key."""
        import openai

        who, tries = f"The judge {self.model!r} at {self.base_url}", f"after {self.retries + 1} tries"
        if isinstance(error, openai.APITimeoutError):
            return f"{who} did not answer within {self.timeout:g} s {tries}. Give a longer timeout, or fewer requests at a time."
        if isinstance(error, openai.APIConnectionError):
            return f"{who} could not be reached {tries}. Check the address and that the server runs."
        status = getattr(error, "status_code", None)
        if status == 401:
            return f"{who} refused the key (401). Check the environment variable {self.api_key_env}."
        advice = {
            400: "refused the request (400). If it does not know logprobs, use ServerJudge(..., logprobs=False)",
            403: f"refused access (403). Check that the key in {self.api_key_env} may use this model",
            404: "was not found (404). Check the model's name, and that the address ends as the server wants it, mostly in /v1",
            429: f"stayed busy (429) {tries}. Use fewer requests at a time, or see whether the quota is used up",
        }
        text = advice.get(status or 0, f"failed with {status or type(error).__name__} {tries}")
        return f"{who} {text}.{self._server_says(error)}"

    def _server_says(self, error: Exception) -> str:
        """The server's own message, shortened, with the key struck out should it repeat it."""
        body = getattr(error, "body", None)
        message = str(body.get("message", "")) if isinstance(body, dict) else ""
        key = os.environ.get(self.api_key_env, "").strip()
        message = message.replace(key, "[key]") if key else message
        return f" The server says: {message[:300]}" if message else ""

    def _not_a_server(self, found: str) -> str:
        return f"{self.base_url} answered with {found}: it is no OpenAI-compatible server. Check the address, which mostly ends in /v1."


def _content(answer: Conversation) -> tuple[object, str | None]:
    return answer.messages, answer.response


def _alternatives(choice: Any) -> list[tuple[str, float]]:
    """Likeliest tokens at the reply's first token that is not white space; none if the server gave no probabilities."""
    tokens = getattr(getattr(choice, "logprobs", None), "content", None) or []
    first = next((token for token in tokens if token.token.strip()), None)
    return [(token.token, token.logprob) for token in (first.top_logprobs or [])] if first else []


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

"""Clients of inference servers that score prompts: OpenAI-compatible ones as vLLM's, and SGLang's own interface.

A server's answers are untrusted: each request has a deadline and a limit on the size of its answer, and whatever comes
back is either what was asked for or one of two errors.
"""

import json
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import httpx2

from .errors import AnswerError, ServerError
from .prompt_logprobs import from_sglang

T = TypeVar("T")
_RETRIED = (408, 409, 425, 429)  # beside 5xx: the server asks for patience
_LONGEST_WAIT = 60.0  # seconds between attempts
_LONGEST_CONNECT = 30.0  # seconds
_BYTES_AN_ENTRY = 1024  # of JSON, many times what vLLM writes


class CompletionsServer:
    """`POST /v1/completions` with token ids and `prompt_logprobs`. Any number of threads may share one.

    Connections that break, timeouts, 408, 409, 425, 429, 5xx and malformed answers are tried again, after 1, 2, 4, ...
    60 seconds or what `Retry-After` says up to that.

    Args:
        url: of the server, with or without `/v1`.
        model: the name it serves the teacher under; None takes the only one there is.
        api_key: sent as a bearer token.
        timeout: seconds until an answer must be complete.
        attempts: how often a request is sent at most.
        backoff: seconds before the first retry.

    Raises:
        ServerError: the server cannot be reached, refuses, or serves several models and none was named.
        AnswerError: its answers stay malformed.
    """

    _path = "/v1/completions"
    _limits = "vLLM must be started with --max-logprobs {k} or more, and with a --max-model-len above {tokens} tokens"

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        timeout: float = 600.0,
        attempts: int = 8,
        backoff: float = 1.0,
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        if httpx2.URL(self.url).scheme not in ("http", "https"):
            raise ValueError(f"url must begin with http:// or https://, got {url!r}")
        for name, value in (("timeout", timeout), ("attempts", attempts), ("backoff", backoff)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        self._timeout, self._attempts, self._backoff = timeout, attempts, backoff
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        limits = httpx2.Limits(max_connections=None)
        patience = httpx2.Timeout(timeout, connect=min(timeout, _LONGEST_CONNECT))
        self._client = httpx2.Client(headers=headers, timeout=patience, limits=limits)
        self.model = model or self._only_model()

    def score(
        self, ids: Sequence[int], start: int, k: int, parse: Callable[[Any], T], stopped: threading.Event | None = None
    ) -> T:
        """`parse(prompt_logprobs)` of a sequence whose answer begins at `start`; what comes before may be None there.
        An AnswerError of `parse` counts as a malformed answer; once `stopped` is set, nothing is tried again."""

        def parse_document(document: Any) -> T:
            return parse(self._prompt_logprobs(document, ids, start, k))

        question = self._question([int(token) for token in ids], start, k)
        limit = 2**20 + len(ids) * (k + 2) * _BYTES_AN_ENTRY
        hint = self._limits.format(k=k, tokens=len(ids))
        return self._request("POST", self._path, question, limit, parse_document, stopped or threading.Event(), hint)

    def _question(self, ids: list[int], start: int, k: int) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt": ids,
            "prompt_logprobs": k,
            "max_tokens": 1,  # the least a server generates; what it generates is ignored
            "temperature": 0.0,
            "stream": False,
        }

    def _prompt_logprobs(self, document: dict[str, Any], ids: Sequence[int], start: int, k: int) -> Any:
        choices = document.get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise AnswerError("an answer with one choice is needed")
        return choices[0].get("prompt_logprobs")

    def close(self) -> None:
        self._client.close()

    def _only_model(self) -> str:
        def parse(document: Any) -> list[str]:
            data = document.get("data")
            if not isinstance(data, list) or not all(isinstance(model, dict) for model in data):
                raise AnswerError("a list of models is needed")
            return [str(model.get("id")) for model in data]

        served = self._request("GET", "/v1/models", None, 2**22, parse, threading.Event(), "Check the URL")
        if len(served) != 1:
            raise ServerError(f"{self.url} serves {len(served)} models, name one of them: {', '.join(served)[:500]}")
        return served[0]

    def _request(
        self,
        method: str,
        path: str,
        body: Any,
        limit: int,
        parse: Callable[[Any], T],
        stopped: threading.Event,
        hint: str,
    ) -> T:
        delay = self._backoff
        for attempt in range(1, self._attempts + 1):
            wait = delay * random.uniform(0.75, 1.25)  # or all threads come back at once
            try:
                status, headers, content = self._send(method, path, body, limit)
                if status == 200:
                    return parse(_json_object(content))
                reason: Exception = ServerError(f"{self.url}{path} answers {status}: {_message(content)}")
                if status < 500 and status not in _RETRIED:
                    raise _refused(reason, status, hint)
                wait = max(wait, _seconds(headers.get("retry-after")))
            except (httpx2.TransportError, httpx2.DecodingError) as error:
                reason = ServerError(f"{self.url}{path} cannot be reached: {type(error).__name__} {error}")
            except AnswerError as error:
                reason = AnswerError(f"{self.url}{path}: {error}")
            if attempt == self._attempts or stopped.wait(min(wait, _LONGEST_WAIT)):
                raise type(reason)(f"{reason} (tried {attempt} times)") from None
            delay = min(2 * delay, _LONGEST_WAIT)
        raise AssertionError("unreachable")

    def _send(self, method: str, path: str, body: Any, limit: int) -> tuple[int, httpx2.Headers, bytes]:
        """Status, headers and body. httpx2's timeouts are for single reads: a deadline stops a server that drips."""
        deadline = time.monotonic() + self._timeout
        parts, size = [], 0
        with self._client.stream(method, self.url + path, json=body) as response:
            for part in response.iter_bytes():
                parts.append(part)
                size += len(part)
                if size > limit:
                    raise AnswerError(f"an answer of more than {limit} bytes")
                if time.monotonic() > deadline:
                    raise httpx2.ReadTimeout(f"no complete answer after {self._timeout:g} s")
        return response.status_code, response.headers, b"".join(parts)


class SGLangServer(CompletionsServer):
    """`POST /generate` of SGLang with token ids and `return_logprob`, which scores the answer alone and so takes the
    prompt from the server's prefix cache. Arguments and errors are those of `CompletionsServer`."""

    _path = "/generate"
    _limits = "SGLang must be started with a --context-length above {tokens} tokens"

    def _question(self, ids: list[int], start: int, k: int) -> dict[str, Any]:
        return {
            "input_ids": ids,
            "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
            "return_logprob": True,
            "logprob_start_len": start - 1,
            "top_logprobs_num": k,
            "stream": False,
        }

    def _prompt_logprobs(self, document: dict[str, Any], ids: Sequence[int], start: int, k: int) -> Any:
        return from_sglang(document.get("meta_info"), ids, start, k)


def _json_object(content: bytes) -> dict[str, Any]:
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise AnswerError(f"not JSON ({error})") from None
    if not isinstance(document, dict):
        raise AnswerError("a JSON object is needed")
    return document


def _message(content: bytes) -> str:
    return " ".join(content[:2000].decode(errors="replace").split())[:400] or "nothing"


def _seconds(retry_after: str | None) -> float:
    """Seconds of a `Retry-After` header; its other form, a date, is left to the backoff."""
    return float(retry_after) if retry_after and retry_after.isascii() and retry_after.isdigit() else 0.0


def _refused(reason: Exception, status: int, hint: str) -> ServerError:
    if status == 404:
        hint = "Check the URL, and the name under which the model is served"
    elif status in (401, 403):
        hint = "It needs an API key"
    return ServerError(f"{reason}. {hint}")

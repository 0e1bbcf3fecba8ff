"""Clients of inference servers that score prompts: OpenAI-compatible ones such as vLLM's, and SGLang's `/generate`.

The responses of a server are not trusted. Each request has a deadline and a limit on the size of its response, and a
client either returns what was requested or raises ServerError or ResponseError.
"""

import json
import logging
import random
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import httpx2

from .address import clean_key, server_url, without_secrets
from .errors import ResponseError, ServerError
from .prompt_logprobs import from_sglang

logger = logging.getLogger("dadpo_kernels")

T = TypeVar("T")
_RETRIED = (408, 409, 425, 429)  # in addition to 5xx: the server may accept the same request later
_NOT_IMPLEMENTED = 501
_LONGEST_WAIT = 60.0  # seconds between attempts
_LONGEST_CONNECT = 30.0  # seconds
_LONGEST_TIMEOUT = 1e6  # seconds; sockets take no more than some 1e9
_BYTES_PER_ENTRY = 1024  # of JSON; vLLM needs a small part of that


class CompletionsServer:
    """Sends token ids to `POST /v1/completions` and asks for `prompt_logprobs`. Threads can share a client.

    A request is sent again after a broken connection, a timeout, status 408, 409, 425, 429 or 5xx (but not 501), or a
    malformed response. The client waits 1, 2, 4, ... seconds before that, or as long as `Retry-After` says, but not
    more than 60.

    Args:
        url: of the server, with or without `/v1`, without a password.
        model: name under which the server offers the teacher; None takes the server's only model.
        api_key: sent as a bearer token, without the white space around it. No message contains it.
        timeout: seconds until a response must be complete.
        attempts: maximum number of times a request is sent.
        backoff: seconds before the first retry.

    Raises:
        ValueError: an argument is out of range.
        ServerError: the server cannot be reached, refuses the request, or serves several models and `model` is None.
        ResponseError: all responses to a request are malformed.
    """

    _path = "/v1/completions"
    _limits = "vLLM must be started with --max-logprobs {k} or more, and with a --max-model-len above {tokens} tokens"
    _needed = "vLLM, or a server with its `prompt_logprobs`, is needed (for SGLang, --engine sglang or SGLangServer)"
    no_prefix_cache = "Start vLLM with --no-enable-prefix-caching"

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
        self.url = server_url(url)
        check_timeout("timeout", timeout)
        for name, value in (("attempts", attempts), ("backoff", backoff)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        self._timeout, self._attempts, self._backoff = timeout, attempts, backoff
        self._api_key = None if api_key is None else clean_key("api_key", api_key)
        headers = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}
        limits = httpx2.Limits(max_connections=None)
        patience = httpx2.Timeout(timeout, connect=min(timeout, _LONGEST_CONNECT))
        try:
            self._client = httpx2.Client(headers=headers, timeout=patience, limits=limits)
        except (httpx2.InvalidURL, ValueError):  # whose message may show a proxy's password
            raise ValueError("the environment variable HTTP_PROXY, HTTPS_PROXY or ALL_PROXY is not a URL") from None
        self.model = model or self._only_model()

    def score(
        self, ids: Sequence[int], start: int, k: int, parse: Callable[[Any], T], stopped: threading.Event | None = None
    ) -> T:
        """Let the server score a sequence, and return `parse(prompt_logprobs)`.

        Args:
            ids: token ids of prompt and answer.
            start: position of the answer's first token. The elements of `prompt_logprobs` before it may be None.
            k: number of entries per position.
            parse: if it raises a ResponseError, the response counts as malformed.
            stopped: once it is set, a failed request is not sent again.

        Raises:
            ServerError, ResponseError: the request failed, after all attempts.
        """

        def parse_document(document: Any) -> T:
            return parse(self._prompt_logprobs(document, ids, start, k))

        body = self._body([int(token) for token in ids], start, k)
        limit = 2**20 + len(ids) * (k + 2) * _BYTES_PER_ENTRY
        hint = self._limits.format(k=k, tokens=len(ids))
        return self._request("POST", self._path, body, limit, parse_document, stopped or threading.Event(), hint)

    def _body(self, ids: list[int], start: int, k: int) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt": ids,
            "prompt_logprobs": k,
            "max_tokens": 1,  # a server generates at least one token, which is ignored
            "temperature": 0.0,
            "stream": False,
            "cache_salt": secrets.token_hex(16),  # no request reads what another one left in the prefix cache
        }

    def _prompt_logprobs(self, document: dict[str, Any], ids: Sequence[int], start: int, k: int) -> Any:
        choices = document.get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise ResponseError("a response with one choice is needed")
        if choices[0].get("prompt_logprobs") is None:
            raise self._unsupported("prompt_logprobs")
        return choices[0]["prompt_logprobs"]

    def _unsupported(self, name: str) -> ServerError:
        return ServerError(f"{self.url}{self._path} ignores the request for {name}. {self._needed}")

    def close(self) -> None:
        self._client.close()

    def _only_model(self) -> str:
        def parse(document: Any) -> list[str]:
            data = document.get("data")
            if not isinstance(data, list) or not all(isinstance(model, dict) for model in data):
                raise ResponseError("a list of models is needed")
            return [str(model.get("id")) for model in data]

        served = self._request("GET", "/v1/models", None, 2**22, parse, threading.Event(), "Check the URL")
        if len(served) != 1:
            raise ServerError(
                f"{self.url} serves {len(served)} models, give the name of one of them: {', '.join(served)[:500]}"
            )
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
            wait = delay * random.uniform(0.75, 1.25)  # so that the threads do not all return at the same time
            try:
                status, headers, content = self._send(method, path, body, limit)
                if status == 200:
                    return parse(_json_object(content))
                reason: Exception = ServerError(
                    f"{self.url}{path} responds with status {status}: {self._message(content)}"
                )
                if status == _NOT_IMPLEMENTED or (status < 500 and status not in _RETRIED):
                    raise ServerError(f"{reason}. {self._remedy(path, status, headers) or hint}")
                wait = max(wait, _seconds(headers.get("retry-after")))
            except (httpx2.TransportError, httpx2.DecodingError) as error:
                reason = ServerError(f"{self.url}{path} cannot be reached: {type(error).__name__} {error}")
            except ResponseError as error:
                reason = ResponseError(f"{self.url}{path}: {error}")
            logger.debug("attempt %d of %d failed: %s", attempt, self._attempts, reason)
            if attempt == self._attempts or stopped.wait(min(wait, _LONGEST_WAIT)):
                raise type(reason)(f"{reason} (tried {attempt} times)") from None
            delay = min(2 * delay, _LONGEST_WAIT)
        raise AssertionError("unreachable")

    def _message(self, content: bytes) -> str:
        """The beginning of an error's body, in which some servers repeat the key."""
        if self._api_key:
            content = content.replace(self._api_key.encode(), b"[the API key]")
        return " ".join(content[:2000].decode(errors="replace").split())[:400] or "nothing"

    def _remedy(self, path: str, status: int, headers: httpx2.Headers) -> str | None:
        if 300 <= status < 400:
            try:
                target = without_secrets(httpx2.URL(self.url + path).join(headers.get("location", "")))
            except httpx2.InvalidURL:
                target = "an invalid URL"
            return f"It redirects to {target}, and redirects are not followed: give the URL of the server itself"
        return {
            401: "It needs an API key, or another one",
            403: "It needs an API key, or another one",
            404: "Check the URL, and the name under which the model is served",
            413: "The server, or a proxy before it, accepts no requests of this size: raise its limit, or cut the "
            "sequences with a smaller --max-length",
        }.get(status)

    def _send(self, method: str, path: str, body: Any, limit: int) -> tuple[int, httpx2.Headers, bytes]:
        """Status, headers and body. The deadline is for a server that sends slowly: httpx2's timeouts only limit the
        time between two reads."""
        deadline = time.monotonic() + self._timeout
        parts, size = [], 0
        with self._client.stream(method, self.url + path, json=body) as response:
            for part in response.iter_bytes():
                parts.append(part)
                size += len(part)
                if size > limit:
                    raise ResponseError(f"a response of more than {limit} bytes")
                if time.monotonic() > deadline:
                    raise httpx2.ReadTimeout(f"no complete response after {self._timeout:g} s")
        return response.status_code, response.headers, b"".join(parts)


class SGLangServer(CompletionsServer):
    """Sends token ids to `POST /generate` of SGLang and asks for `return_logprob`. SGLang scores the answer only, so
    that the prompt can come from its prefix cache. Arguments and errors are those of `CompletionsServer`."""

    _path = "/generate"
    _limits = "SGLang must be started with a --context-length above {tokens} tokens"
    _needed = "SGLang, or a server with its `return_logprob`, is needed (for vLLM, --engine vllm or CompletionsServer)"
    no_prefix_cache = "Start SGLang with --disable-radix-cache"

    def _body(self, ids: list[int], start: int, k: int) -> dict[str, Any]:
        return {
            "input_ids": ids,
            "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
            "return_logprob": True,
            "logprob_start_len": start - 1,
            "top_logprobs_num": k,
            "stream": False,
        }

    def _prompt_logprobs(self, document: dict[str, Any], ids: Sequence[int], start: int, k: int) -> Any:
        meta_info = document.get("meta_info")
        if isinstance(meta_info, dict) and meta_info.get("input_token_logprobs") is None:
            raise self._unsupported("input_token_logprobs")
        return from_sglang(meta_info, ids, start, k)


def check_timeout(name: str, seconds: float) -> None:
    if not 0 < seconds <= _LONGEST_TIMEOUT:
        raise ValueError(f"{name} must be above 0 and at most {_LONGEST_TIMEOUT:g} seconds, got {seconds}")


def check_concurrency(name: str, requests: int) -> None:
    if requests < 1:
        raise ValueError(f"{name} must be at least 1, got {requests}")


def _json_object(content: bytes) -> dict[str, Any]:
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ResponseError(f"the response is not JSON ({error})") from None
    if not isinstance(document, dict):
        raise ResponseError("a JSON object is needed")
    return document


def _seconds(retry_after: str | None) -> float:
    """The seconds in a `Retry-After` header; 0 for its other form, a date, so that the backoff applies."""
    return float(retry_after) if retry_after and retry_after.isascii() and retry_after.isdigit() else 0.0

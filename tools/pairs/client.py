"""Chat completions from OpenAI-compatible servers: several endpoints, retries, rate limits, strictly read answers."""

import asyncio
import json
import os
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx2
import openai

from spot_megatron.errors import UserError
from tools.pairs.limits import Backoff, Payment, RateLimiter
from tools.pairs.local_http import LocalOpenAI

API_KEY_VARIABLE = "OPENAI_API_KEY"
LONGEST_REST = 30.0  # seconds
NO_CONNECTION = "no_connection"


class EndpointError(UserError):
    """No request to this endpoint can succeed: a wrong key, model name or address."""


class CallFailed(Exception):
    """One request came to nothing. `permanent` when sending it again would bring the same."""

    def __init__(self, reason: str, detail: str, permanent: bool, calls: "Calls") -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail, self.permanent, self.calls = reason, detail, permanent, calls


@dataclass
class Calls:
    """What one request took: HTTP calls made, and why each one but the last failed."""

    num_calls: int = 0
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Completion:
    """One sampled answer. Token counts are None where the server does not report them."""

    text: str
    finish_reason: str
    token_ids: list[int] | None
    prompt_tokens: int | None
    completion_tokens: int | None
    endpoint: str
    seconds: float
    calls: Calls


@dataclass
class _Endpoint:
    base_url: str
    client: openai.AsyncOpenAI
    in_flight: int = 0
    refusals_in_a_row: int = 0
    resting_until: float = 0.0


class _Fault(Exception):
    """One HTTP call failed. `billed`: the server may have generated, and charge for, an answer that was lost."""

    def __init__(self, reason: str, detail: str, *, permanent: bool = False, billed: bool = False) -> None:
        super().__init__(detail)
        self.reason, self.permanent, self.billed = reason, permanent, billed
        self.retry_after: str | None = None


class ChatClient:
    """A pool of endpoints that serve the same model. Use as `async with`.

    The key is read from the environment variable named by `key_variable` ("none" is sent when it is unset, which local
    servers accept) and is cut out of every message that this class produces.
    """

    def __init__(
        self,
        base_urls: Sequence[str],
        *,
        timeout: float = 1800.0,
        max_calls: int = 10,
        limiter: RateLimiter | None = None,
        backoff: Backoff | None = None,
        key_variable: str = API_KEY_VARIABLE,
    ) -> None:
        assert base_urls
        self._key = os.environ.get(key_variable) or "none"
        self._key_variable = key_variable
        self._max_calls = max_calls
        self._limiter = limiter or RateLimiter()
        self._backoff = backoff or Backoff()
        self._rng = random.Random()
        self._endpoints = [_Endpoint(url, self._connect(url, timeout)) for url in map(_checked_url, base_urls)]
        self.faults: Counter[str] = Counter()

    def _connect(self, base_url: str, timeout: float) -> openai.AsyncOpenAI:
        if _is_direct_http(base_url):
            return LocalOpenAI(base_url=base_url, api_key=self._key, timeout=timeout)
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        http_client = openai.DefaultAsyncHttpxClient(timeout=timeout, limits=limits)
        return openai.AsyncOpenAI(base_url=base_url, api_key=self._key, max_retries=0, http_client=http_client)

    async def __aenter__(self) -> "ChatClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        for endpoint in self._endpoints:
            await endpoint.client.close()

    async def complete(self, body: dict[str, Any], payment: Payment | None = None) -> Completion:
        """POST one chat completion request, with retries.

        Every call that may have been billed although its answer was lost, one that is cancelled under way included, is
        charged to the `payment`, which must then have room for the next one.

        Retried: 408, 409, 429 and 5xx, no connection, a timeout, and a 200 whose body is not a usable completion.
        Raises CallFailed when the calls are used up or the server refuses this very request, EndpointError for 401, 403
        and 404, which no request would survive.
        """
        calls = Calls()
        while True:
            await self._limiter.start()
            endpoint = await self._pick()
            started = time.monotonic()
            calls.num_calls += 1
            endpoint.in_flight += 1
            try:
                payload = await self._post(endpoint, body)
                completion = _read_completion(payload, endpoint.base_url, time.monotonic() - started, calls)
            except asyncio.CancelledError:
                if payment:
                    payment.settle(None)  # the server may finish the answer, and charge for it
                raise
            except _Fault as fault:
                if payment and fault.billed:
                    payment.settle(None)
                wait = self._after_fault(fault, calls)
                if payment and not payment.held and not await payment.wait():
                    raise CallFailed("budget_spent", "the budget allows no further call", False, calls) from None
            else:
                endpoint.refusals_in_a_row = 0
                self._limiter.charge((completion.prompt_tokens or 0) + (completion.completion_tokens or 0))
                return completion
            finally:
                endpoint.in_flight -= 1
            await asyncio.sleep(wait)

    def _after_fault(self, fault: _Fault, calls: Calls) -> float:
        """Count it and return the seconds to wait before the next call; raises CallFailed when there is none."""
        self.faults[fault.reason] += 1
        calls.faults.append(fault.reason)
        if fault.permanent or calls.num_calls >= self._max_calls:
            raise CallFailed(fault.reason, self._redact(str(fault)), fault.permanent, calls) from None
        if fault.reason == NO_CONNECTION:
            return 0.0  # the endpoint rests; another one may be awake
        return self._backoff.seconds(calls.num_calls - 1, fault.retry_after, self._rng)

    async def _pick(self) -> _Endpoint:
        """The least busy endpoint that is not resting after refused connections; waits while all of them rest."""
        while True:
            now = time.monotonic()
            awake = [endpoint for endpoint in self._endpoints if endpoint.resting_until <= now]
            if awake:
                return min(awake, key=lambda endpoint: endpoint.in_flight)
            await asyncio.sleep(min(endpoint.resting_until for endpoint in self._endpoints) - now)

    def _rest(self, endpoint: _Endpoint) -> None:
        """Leave an endpoint alone that refused a connection, longer each time; once for all requests it hit."""
        now = time.monotonic()
        if endpoint.resting_until <= now:
            endpoint.refusals_in_a_row += 1
            rest = min(LONGEST_REST, 0.1 * 2.0 ** min(endpoint.refusals_in_a_row, 20))
            endpoint.resting_until = now + self._rng.uniform(0.5, 1.0) * rest

    async def _post(self, endpoint: _Endpoint, body: dict[str, Any]) -> bytes:
        # The raw body: the typed model would cost more than the exchange itself and hide what servers add to it.
        try:
            response = await endpoint.client.post("/chat/completions", body=body, cast_to=httpx2.Response)
            return response.content
        except openai.APITimeoutError:
            raise _Fault("timeout", f"{endpoint.base_url} did not answer in time", billed=True) from None
        except openai.APIConnectionError as error:
            detail = f"{endpoint.base_url}: {error.__cause__ or error}"
            if isinstance(error.__cause__, httpx2.ConnectError):
                self._rest(endpoint)
                raise _Fault(NO_CONNECTION, detail) from None
            raise _Fault("connection_lost", detail, billed=True) from None
        except openai.APIStatusError as error:
            raise self._status_fault(endpoint, error) from None

    def _status_fault(self, endpoint: _Endpoint, error: openai.APIStatusError) -> _Fault:
        status, detail = error.status_code, self._redact(str(error))[:500]
        if status in (401, 403):
            raise EndpointError(
                f"{endpoint.base_url} refuses the API key ({status}). Put the right key into the environment variable "
                f"{self._key_variable}. The server says: {detail}"
            )
        if status == 404:
            raise EndpointError(
                f"{endpoint.base_url} knows no such model or path (404). Check --model against "
                f"{endpoint.base_url}/models, and that --base-url ends in /v1. The server says: {detail}"
            )
        retryable = status in (408, 409, 429) or status >= 500
        fault = _Fault(f"http_{status}", f"{endpoint.base_url}: {detail}", permanent=not retryable)
        fault.retry_after = error.response.headers.get("retry-after")
        return fault

    def _redact(self, message: str) -> str:
        return message.replace(self._key, "[API key]") if len(self._key) > 4 else message


def _checked_url(base_url: str) -> str:
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise EndpointError(f"--base-url {base_url!r} is no address. Give one like http://127.0.0.1:8000/v1.")
    if parts.username or parts.password:
        raise EndpointError(
            f"--base-url must not hold a password. Put the key into the environment variable {API_KEY_VARIABLE}."
        )
    return base_url.rstrip("/")


def _is_direct_http(base_url: str) -> bool:
    parts = urlsplit(base_url)
    return parts.scheme == "http" and ("http" not in getproxies() or bool(proxy_bypass(parts.hostname or "")))


def _read_completion(payload: bytes, endpoint: str, seconds: float, calls: Calls) -> Completion:
    """The first choice of a response body. Raises _Fault for a body that is no completion, whatever its shape."""
    try:
        body = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise _Fault("bad_body", f"{endpoint}: a response that is not JSON ({error})", billed=True) from None
    choices = body.get("choices") if isinstance(body, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        raise _Fault("empty_choices", f"{endpoint}: a response without choices[0].message", billed=True)
    text = message.get("content")
    text = "" if text is None else text  # a refusal, or a thinking block cut off by length and filed elsewhere
    if not isinstance(text, str) or not _is_unicode(text):
        raise _Fault("bad_body", f"{endpoint}: a message whose content is not Unicode text", billed=True)
    usage = body.get("usage") if isinstance(body.get("usage"), dict) else {}
    return Completion(
        text=text,
        finish_reason=str(choice.get("finish_reason") or "unknown"),
        token_ids=_token_ids(choice),
        prompt_tokens=_count(usage.get("prompt_tokens")),
        completion_tokens=_count(usage.get("completion_tokens")),
        endpoint=endpoint,
        seconds=seconds,
        calls=calls,
    )


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # lone surrogates: JSON can spell them, no file and no tokenizer can hold them
        return False
    return True


def _token_ids(choice: dict[str, Any]) -> list[int] | None:
    """vLLM (>= 0.10.2) and SGLang (2026-07 on) return `token_ids` in the choice when asked by `return_token_ids`."""
    ids = choice.get("token_ids")
    return ids if isinstance(ids, list) and all(type(item) is int for item in ids) else None


def _count(value: object) -> int | None:
    return value if type(value) is int and value >= 0 else None

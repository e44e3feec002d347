"""One OpenAI-compatible server: its address and key, one HTTP exchange, and the classification of failures."""

import asyncio
import contextvars
import ipaddress
import os
import random
import sys
import time
from typing import Any
from urllib.parse import urlsplit

import httpx2
import openai

from spot_megatron.errors import UserError
from tools.pairs.pool import RunFailed
from tools.pairs.replies import BadReply, Reply, ServerError, read_reply, server_error

API_KEY_VARIABLE = "OPENAI_API_KEY"
CONNECT_SECONDS = 30.0
# Below uvicorn's 5 s, so that a request is not sent on a connection that the server is about to close.
KEEP_ALIVE_SECONDS = 4.0
LONGEST_REST = 30.0  # seconds
_UNAVAILABLE = (502, 503)  # what a proxy answers while the server behind it is away

_headers_seen: contextvars.ContextVar[list[int]] = contextvars.ContextVar("headers_seen")


class EndpointError(UserError):
    """No request to this endpoint can succeed: a wrong key, model name or address."""


class OutOfCredit(RunFailed):
    """The account cannot pay for any further request."""


class Fault(Exception):
    """One HTTP call failed.

    Attributes:
        permanent: the same request would fail again.
        billed: the server may have generated, and charge for, an answer that was lost.
        away: no server answers at this address; the call does not count against the request.
    """

    def __init__(
        self, reason: str, detail: str, *, permanent: bool = False, billed: bool = False, away: bool = False
    ) -> None:
        super().__init__(detail)
        self.reason, self.permanent, self.billed, self.away = reason, permanent, billed, away
        self.retry_after: str | None = None


class ApiKey:
    """The key in the environment variable `variable` ("none" where it is not set, which local servers accept)."""

    def __init__(self, variable: str, in_clear: bool = False) -> None:
        self.variable, self._in_clear = variable, in_clear
        self._value = os.environ.get(variable) or "none"

    def value_for(self, base_url: str) -> str:
        """The key to send to `base_url`: never the key over plain http:// to another machine, unless `in_clear`."""
        parts = urlsplit(base_url)
        if parts.scheme == "https" or self._in_clear or self._value == "none" or _is_this_machine(parts.hostname or ""):
            return self._value
        print(
            f"{base_url}: the key in {self.variable} is not sent over http:// to another machine, where anybody on the "
            "way could read it. Use https://, or --key-over-http in a network that you trust.",
            file=sys.stderr,
        )
        return "none"

    def redact(self, message: str) -> str:
        return message.replace(self._value, "[API key]") if len(self._value) > 4 else message


class Endpoint:
    """A server at `base_url`. `timeout` bounds one whole exchange in seconds."""

    def __init__(self, base_url: str, key: ApiKey, timeout: float) -> None:
        self.base_url = checked_url(base_url)
        self.in_flight = 0
        self.has_answered = False
        self.away_since: float | None = None
        self.resting_until = 0.0
        self.context_length: int | None = None
        self._rests_in_a_row = 0
        self._key, self._timeout = key, timeout
        http_client = openai.DefaultAsyncHttpxClient(
            timeout=httpx2.Timeout(timeout, connect=min(CONNECT_SECONDS, timeout), pool=None),
            limits=httpx2.Limits(
                max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEP_ALIVE_SECONDS
            ),
            event_hooks={"response": [_note_headers]},
        )
        self.client = openai.AsyncOpenAI(
            base_url=self.base_url, api_key=key.value_for(self.base_url), max_retries=0, http_client=http_client
        )

    async def post(self, body: dict[str, Any]) -> Reply:
        """One chat completion. Raises Fault, EndpointError or OutOfCredit."""
        seen: list[int] = []
        _headers_seen.set(seen)
        # The raw body: the typed model would cost more than the exchange itself and hide what servers add to it.
        call = self.client.post("/chat/completions", body=body, cast_to=httpx2.Response)
        try:
            response = await asyncio.wait_for(call, self._timeout)
        except openai.APITimeoutError as error:
            if isinstance(error.__cause__, httpx2.ConnectTimeout):
                raise self._away("no_connection", f"no connection in {CONNECT_SECONDS:g} s") from None
            raise self._timed_out(seen) from None
        except asyncio.TimeoutError:
            raise self._timed_out(seen) from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            if isinstance(cause, httpx2.ConnectError):
                raise self._away("no_connection", str(cause)) from None
            unsent = isinstance(cause, (httpx2.WriteError, httpx2.PoolTimeout))
            raise Fault("connection_lost", f"{self.base_url}: {cause}", billed=not unsent) from None
        except openai.APIStatusError as error:
            raise await self._refused(error, body) from None
        try:
            reply = read_reply(response.content)
        except BadReply as bad:
            if bad.error is None:
                raise Fault(bad.reason, f"{self.base_url}: {bad}", billed=True) from None
            raise await self._status_fault(bad.error, body) from None
        self._is_here()
        self.has_answered = True
        return reply

    async def find_context_length(self) -> None:
        """Note the context length that the server's model list names (`max_model_len`, as vLLM and SGLang write it)."""
        lengths = [model.get("max_model_len") for model in await self._models() or [] if isinstance(model, dict)]
        known = [length for length in lengths if type(length) is int and length > 0]
        self.context_length = min(known) if known else None

    async def close(self) -> None:
        await self.client.close()

    def _timed_out(self, seen: list[int]) -> Fault:
        """Headers come with a finished answer: a wait before them may be a looping model, one after them a bad line."""
        detail = f"{self.base_url} did not answer in {self._timeout:g} s"
        return Fault("stalled_body" if seen else "timeout", detail, billed=True)

    async def _refused(self, error: openai.APIStatusError, body: dict[str, Any]) -> Fault:
        status = error.status_code
        said = server_error(
            error.body if isinstance(error.body, dict) and "error" in error.body else {"error": error.body}
        )
        words = said.words if said else str(error)
        out_of_credit = status == 402 or bool(said and said.out_of_credit)
        fault = await self._status_fault(ServerError(words, status, out_of_credit), body)
        fault.retry_after = error.response.headers.get("retry-after")
        return fault

    async def _status_fault(self, error: ServerError, body: dict[str, Any]) -> Fault:
        status, words = error.status, self._key.redact(error.words)[:500]
        if error.out_of_credit:
            raise OutOfCredit(
                f"{self.base_url} cannot bill any further request. It says: {words}. Add credit, then run the same "
                "command again."
            )
        if status in (401, 403, 404) and not await self._knows(str(body.get("model")), status):
            raise self._wrong_address(status, words)
        detail = f"{self.base_url}: status {status}: {words}"
        if status in _UNAVAILABLE:
            return self._away(f"http_{status}", detail)
        self._is_here()
        retryable = (
            status in (404, 408, 409, 429) or status >= 500
        )  # 404: a restarting ingress, as this server is right
        return Fault(f"http_{status}", detail, permanent=not retryable)

    async def _knows(self, model: str, status: int) -> bool:
        """Whether key, address and model are right, so that a refusal concerns one request only."""
        if status == 401:
            return False
        if self.has_answered:
            return True
        models = await self._models()
        return any(isinstance(entry, dict) and entry.get("id") == model for entry in models or [])

    async def _models(self) -> list[Any] | None:
        try:
            call = self.client.get("/models", cast_to=httpx2.Response)
            data = (await asyncio.wait_for(call, CONNECT_SECONDS)).json().get("data")
        except (openai.APIError, asyncio.TimeoutError, ValueError, AttributeError):
            return None
        return data if isinstance(data, list) else None

    def _wrong_address(self, status: int, words: str) -> EndpointError:
        if status == 404:
            return EndpointError(
                f"{self.base_url} knows no such model or path (404). Check --model against {self.base_url}/models, and "
                f"that --base-url ends in /v1. The server says: {words}"
            )
        return EndpointError(
            f"{self.base_url} refuses the API key ({status}). Put the right key into the environment variable "
            f"{self._key.variable}. The server says: {words}"
        )

    def _is_here(self) -> None:
        self._rests_in_a_row, self.away_since = 0, None

    def _away(self, reason: str, detail: str) -> Fault:
        """Leave the endpoint alone for a while, longer each time; once for all requests that met it."""
        now = time.monotonic()
        self.away_since = self.away_since or now
        if self.resting_until <= now:
            self._rests_in_a_row += 1
            rest = min(LONGEST_REST, 0.1 * 2.0 ** min(self._rests_in_a_row, 20))
            self.resting_until = now + random.uniform(0.5, 1.0) * rest
        return Fault(reason, f"{self.base_url}: {detail}", away=True)


async def _note_headers(response: httpx2.Response) -> None:
    seen = _headers_seen.get(None)
    if seen is not None:
        seen.append(response.status_code)


def checked_url(base_url: str) -> str:
    """The address without a closing slash. Raises EndpointError when it is not one, or holds a secret."""
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise EndpointError(
            f"--base-url {base_url.split('?')[0].rpartition('@')[2]!r} is not an address. Give one like http://127.0.0.1:8000/v1."
        )
    if parts.username or parts.password or parts.query or parts.fragment:
        raise EndpointError(
            "--base-url must hold neither a password nor a key nor any other `?name=value`. Put the key into the "
            f"environment variable {API_KEY_VARIABLE}."
        )
    return base_url.rstrip("/")


def _is_this_machine(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

"""Chat completions from OpenAI-compatible servers: several endpoints, retries, rate limits."""

import asyncio
import functools
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from tools.pairs.endpoint import API_KEY_VARIABLE, ApiKey, Endpoint, Fault
from tools.pairs.limits import Backoff, Payment, RateLimiter
from tools.pairs.replies import Reply

PROMPT_OVERHEAD_TOKENS = 64  # what a chat template may add to the text
BOUNDS = ("max_tokens", "max_completion_tokens")  # where both are given, the larger counts


class CallFailed(Exception):
    """A request without a reply. `permanent` when the same request would fail again."""

    def __init__(self, reason: str, detail: str, permanent: bool, calls: "Calls") -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail, self.permanent, self.calls = reason, detail, permanent, calls


@dataclass
class Calls:
    """The HTTP calls of one request, and the reason of each failed one."""

    num_calls: int = 0
    faults: list[str] = field(default_factory=list)
    num_away: int = 0  # calls that no server answered; they do not count against max_calls


@dataclass(frozen=True)
class Completion(Reply):
    """A reply, and how it was obtained. `seed` is the request's, which differs from the first one after a time-out."""

    endpoint: str
    seconds: float
    calls: Calls
    seed: int | None


class ChatClient:
    """A pool of endpoints that serve the same model. Use as `async with`.

    Args:
        timeout: seconds for one whole HTTP exchange.
        max_calls: HTTP calls for one request; those that meet no server are not counted.
        patience: seconds for which requests wait while no endpoint can be reached.
        key_variable: environment variable of the API key, which is cut out of every message of this class.
        key_over_http: send the key to other machines over plain http://, too.
    """

    def __init__(
        self,
        base_urls: Sequence[str],
        *,
        timeout: float = 1800.0,
        max_calls: int = 10,
        patience: float = 600.0,
        limiter: RateLimiter | None = None,
        backoff: Backoff | None = None,
        key_variable: str = API_KEY_VARIABLE,
        key_over_http: bool = False,
    ) -> None:
        assert base_urls
        self._key = ApiKey(key_variable, key_over_http)
        self._max_calls, self._patience = max_calls, patience
        self._limiter = limiter or RateLimiter()
        self._backoff = backoff or Backoff()
        self._rng = random.Random()
        self._endpoints = [Endpoint(url, self._key, timeout) for url in base_urls]
        self._stopping = False
        self.faults: Counter[str] = Counter()
        self.tokens = 0  # read and written in this run

    async def __aenter__(self) -> "ChatClient":
        return self

    async def find_context_length(self) -> None:
        """Ask the servers for their context length, to which `max_tokens` of every request is then fitted."""
        await asyncio.gather(*(endpoint.find_context_length() for endpoint in self._endpoints))

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(endpoint.close() for endpoint in self._endpoints))

    def stop_retrying(self) -> None:
        """From now on a request whose call fails is given up, and none is begun."""
        self._stopping = True

    async def complete(self, body: dict[str, Any], payment: Payment | None = None) -> Completion:
        """POST one chat completion request, with retries.

        Every call that may have been billed although its answer was lost, one that is cancelled under way included, is
        charged to the `payment`, which must then have room for the next one. After a time-out the next call has
        another seed, because the same one would loop again.

        Raises:
            CallFailed: the calls or the patience are used up, or the server refuses this very request.
            EndpointError: 401 always, 403 and 404 where the endpoint has not answered and does not list the model.
            OutOfCredit: 402 or insufficient_quota.
        """
        calls = Calls()
        lengths = [endpoint.context_length for endpoint in self._endpoints if endpoint.context_length]
        body = fit_max_tokens(body, min(lengths, default=None))
        body_bound = functools.partial(_most_in_all, body)
        while True:
            reserved = await self._limiter.start(body_bound)
            endpoint = await self._pick(calls)
            started = time.monotonic()
            calls.num_calls += 1
            endpoint.in_flight += 1
            used: int | None = 0
            try:
                reply = await endpoint.post(body)
                used = (reply.prompt_tokens or 0) + (reply.completion_tokens or 0)
                self.tokens += used
                values = {item.name: getattr(reply, item.name) for item in fields(Reply)}
                seconds = time.monotonic() - started
                return Completion(
                    **values, endpoint=endpoint.base_url, seconds=seconds, calls=calls, seed=body.get("seed")
                )
            except asyncio.CancelledError:
                if payment:
                    payment.settle(None)  # the server may finish the answer, and charge for it
                raise
            except Fault as fault:
                used = None if fault.billed else 0
                if payment and fault.billed:
                    payment.settle(None)
                wait = self._after_fault(fault, calls, body)
                if payment and not payment.held and not await payment.wait():
                    raise CallFailed("budget_spent", "the budget allows no further call", False, calls) from None
            finally:
                endpoint.in_flight -= 1
                self._limiter.settle(reserved, used)
            if _needs_new_seed(calls, body):
                body = {**body, "seed": body["seed"] + 1}
            await asyncio.sleep(wait)

    def _after_fault(self, fault: Fault, calls: Calls, body: dict[str, Any]) -> float:
        """Count it and return the seconds to wait before the next call; raises CallFailed when there is none."""
        self.faults[fault.reason] += 1
        calls.faults.append(fault.reason)
        calls.num_away += fault.away
        is_greedy = fault.reason == "timeout" and body.get("temperature") == 0
        num_counted = calls.num_calls - calls.num_away
        given_up = self._out_of_patience() if fault.away else num_counted >= self._max_calls or is_greedy
        if fault.permanent or given_up or self._stopping:
            raise CallFailed(fault.reason, self._key.redact(str(fault)), fault.permanent, calls) from None
        if fault.away:
            return 0.0  # the endpoint rests; another one may be awake
        return self._backoff.seconds(num_counted - 1, fault.retry_after, self._rng)

    def _out_of_patience(self) -> bool:
        now = time.monotonic()
        return all(end.away_since is not None and now - end.away_since >= self._patience for end in self._endpoints)

    async def _pick(self, calls: Calls) -> Endpoint:
        """The least busy endpoint that is not resting; waits while all of them rest."""
        while True:
            if self._stopping:
                raise CallFailed("interrupted", "the run was stopped before the next call", False, calls)
            now = time.monotonic()
            awake = [endpoint for endpoint in self._endpoints if endpoint.resting_until <= now]
            if awake:
                return min(awake, key=lambda endpoint: endpoint.in_flight)
            await asyncio.sleep(min(1.0, min(endpoint.resting_until for endpoint in self._endpoints) - now))


def fit_max_tokens(body: dict[str, Any], context_length: int | None) -> dict[str, Any]:
    """The body with `max_tokens` cut to what the context length leaves beside the prompt."""
    if context_length is None or type(body.get("max_tokens")) is not int:
        return body
    room = context_length - most_tokens(body)[0]
    return {**body, "max_tokens": min(body["max_tokens"], room)} if room > 0 else body


def _needs_new_seed(calls: Calls, body: dict[str, Any]) -> bool:
    return calls.faults[-1] == "timeout" and type(body.get("seed")) is int


def _most_in_all(body: dict[str, Any]) -> int:
    return sum(most_tokens(body))


def most_tokens(body: dict[str, Any]) -> tuple[int, int]:
    """Upper bounds of prompt and written tokens: no tokenizer makes more tokens than there are bytes.

    All of the body counts as prompt (tools and schemas become part of it). The written tokens are 0 where nothing in
    the body bounds them.
    """
    prompt = len(json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    bounds = [body[key] for key in BOUNDS if type(body.get(key)) is int]
    return PROMPT_OVERHEAD_TOKENS + prompt, max(bounds, default=0)

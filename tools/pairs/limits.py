"""Limits of a run: requests and tokens per minute, waits between retries, money, a target."""

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

_LONGEST_NAP = 0.5  # seconds


class RateLimiter:
    """At most `requests` starts and about `tokens` tokens per minute; None means unlimited.

    Tokens are reserved when a request starts: the mean of the finished ones, before that the most that it can take.
    """

    def __init__(self, requests: float | None = None, tokens: float | None = None) -> None:
        self._seconds_per_request = 60.0 / requests if requests else 0.0
        self._seconds_per_token = 60.0 / tokens if tokens else 0.0
        self._next_start = self._tokens_paid = 0.0
        self._num_finished = self._tokens_finished = 0

    async def start(self, most_tokens: Callable[[], int]) -> float:
        """Wait for this request's turn; returns the tokens reserved, for `settle`."""
        while True:
            now = time.monotonic()
            wait = max(self._next_start, self._tokens_paid) - now
            if wait <= 0:
                self._next_start = max(self._next_start, now - self._seconds_per_request) + self._seconds_per_request
                return self._reserve(now, most_tokens)
            await asyncio.sleep(min(wait, _LONGEST_NAP))  # a finished request may give tokens back meanwhile

    def _reserve(self, now: float, most_tokens: Callable[[], int]) -> float:
        if not self._seconds_per_token:
            return 0.0
        tokens = self._tokens_finished / self._num_finished if self._num_finished else float(most_tokens())
        self._tokens_paid = max(self._tokens_paid, now) + tokens * self._seconds_per_token
        return tokens

    def settle(self, reserved: float, used: int | None) -> None:
        """Exchange the reservation for the tokens used; None leaves it, because the server may have used them."""
        if used is None:
            return
        if used:
            self._num_finished += 1
            self._tokens_finished += used
        self._tokens_paid += (used - reserved) * self._seconds_per_token


@dataclass(frozen=True)
class Backoff:
    """Bounded exponential waits with full jitter: uniform in [0, min(cap, base * 2^n)] seconds, n retries so far."""

    base: float = 0.5
    cap: float = 60.0
    longest_retry_after: float = 600.0

    def seconds(self, num_retries: int, retry_after: str | None, rng: random.Random) -> float:
        """How long to wait; a server's Retry-After (seconds or an HTTP date) is a lower bound."""
        jitter = rng.uniform(0.0, min(self.cap, self.base * 2.0 ** min(num_retries, 30)))
        asked = parse_retry_after(retry_after)
        return jitter if asked is None else min(asked, self.longest_retry_after) + min(jitter, 1.0)


def parse_retry_after(value: str | None) -> float | None:
    """Seconds from now; None when the header is absent or says nothing that can be understood."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError):
            return None
    return max(0.0, seconds) if seconds == seconds else None


@dataclass(frozen=True)
class Prices:
    """US dollars for a million tokens read and written."""

    prompt: float = 0.0
    completion: float = 0.0

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6


class Budget:
    """A bound that is kept even with requests in flight: each reserves the most that it can cost before it starts."""

    def __init__(self, limit_usd: float | None, spent_usd: float = 0.0) -> None:
        self.limit_usd = limit_usd
        self.spent_usd = spent_usd
        self.num_reserved = 0
        self.reserved_usd = 0.0

    @property
    def in_flight(self) -> bool:
        """Whether reservations are held, so that a later reservation may still fit."""
        return self.num_reserved > 0

    def payment(self, most_usd: float) -> "Payment":
        """The account of one request whose every call costs at most `most_usd`."""
        return Payment(self, most_usd)


@dataclass
class Payment:
    """One request's account: what is `held` back for the call under way, and what was spent, lost calls included."""

    budget: Budget
    most_usd: float
    spent_usd: float = 0.0
    held: bool = False

    def reserve(self) -> bool:
        """Whether one more call fits into the budget; if so, its cost is held until `settle`."""
        assert not self.held
        budget = self.budget
        if budget.limit_usd is not None and budget.spent_usd + budget.reserved_usd + self.most_usd > budget.limit_usd:
            return False
        self.held = True
        budget.reserved_usd += self.most_usd
        budget.num_reserved += 1
        return True

    def settle(self, usd: float | None) -> None:
        """Exchange the reservation for what the call cost (None: unknown, so the most). Twice is once."""
        if not self.held:
            return
        self.held = False
        self.budget.num_reserved -= 1
        self.budget.reserved_usd = self.budget.reserved_usd - self.most_usd if self.budget.num_reserved else 0.0
        usd = self.most_usd if usd is None else usd
        self.budget.spent_usd += usd
        self.spent_usd += usd

    async def wait(self) -> bool:
        """Reserve as soon as it fits; False when it does not and nothing under way may turn out cheaper."""
        while not self.reserve():
            if not self.budget.in_flight:
                return False
            await asyncio.sleep(0.05)
        return True


class Places:
    """At most as many requests in flight as are missing to `target` (None: any number)."""

    def __init__(self, target: int | None, num_done: Callable[[], int]) -> None:
        self._target, self._num_done = target, num_done
        self._num_taken = 0
        self._changed = asyncio.Event()

    async def take(self) -> bool:
        """Wait for a place; False when the target is reached. Every place taken must be given back."""
        while self._target is not None and self._num_done() + self._num_taken >= self._target:
            if self._num_done() >= self._target:
                return False
            self._changed.clear()
            await self._changed.wait()
        self._num_taken += 1
        return True

    def give_back(self) -> None:
        self._num_taken -= 1
        self._changed.set()

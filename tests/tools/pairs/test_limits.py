"""Rates, waiting times and the budget. About 2 s."""

import asyncio
import time

import pytest

from tools.pairs.limits import Budget, RateLimiter, parse_retry_after


def test_rate_limits_hold():
    async def starts(limiter: RateLimiter, count: int, tokens: int) -> float:
        started = time.monotonic()
        for _ in range(count):
            limiter.settle(await limiter.start(lambda: 3 * tokens), tokens)
        await limiter.start(lambda: 0)
        return time.monotonic() - started

    assert asyncio.run(starts(RateLimiter(requests=1200), 10, 0)) >= 0.5 - 0.06
    assert asyncio.run(starts(RateLimiter(tokens=60_000), 5, 100)) >= 0.5 - 0.01
    assert asyncio.run(starts(RateLimiter(), 1000, 1000)) < 0.5


def test_retry_after_takes_seconds_and_dates():
    from email.utils import formatdate

    assert parse_retry_after("2.5") == 2.5
    assert 8 < parse_retry_after(formatdate(time.time() + 10, usegmt=True)) <= 10
    assert parse_retry_after(formatdate(time.time() - 10, usegmt=True)) == 0
    assert [parse_retry_after(value) for value in (None, "soon", "nan", "-3")] == [None, None, None, 0]


def test_a_budget_is_never_exceeded_with_requests_in_flight():
    async def main():
        budget = Budget(1.0)
        payments = [budget.payment(0.3) for _ in range(4)]
        assert [payment.reserve() for payment in payments] == [True, True, True, False]
        payments[0].settle(0.2)
        assert not payments[3].reserve()
        payments[1].settle(None)  # unknown: the most
        payments[2].settle(0.0)
        payments[2].settle(0.3)  # settled already
        assert budget.spent_usd == pytest.approx(0.5)
        assert await payments[3].wait()
        payments[3].settle(0.3)
        assert not await payments[3].wait()
        assert (budget.spent_usd, payments[3].spent_usd) == (pytest.approx(0.8), pytest.approx(0.3))

    asyncio.run(main())

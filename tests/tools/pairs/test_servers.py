"""Servers as they fail: refusals in mid-run, restarts, idle connections, time-outs, quotas, keys. About 15 s."""

import asyncio
import errno
import fcntl
import json
import time

import pytest

from spot_megatron.errors import PairError
from tests.tools.pairs.test_client import BODY, COMPLETION, FAST, Scripted, answer, with_server
from tools.oracle.http_server import Answer, Faults, Service, serve
from tools.pairs.client import CallFailed, ChatClient
from tools.pairs.endpoint import ApiKey, EndpointError, OutOfCredit
from tools.pairs.journal import Journal
from tools.pairs.limits import Budget, RateLimiter


def scripted_server(replies, use):
    """Gives the (status, body) of `replies` in turn, the last one for ever; use(url, list of request bodies)."""
    bodies: list[dict] = []

    async def handle(reader, writer):
        while True:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except (asyncio.IncompleteReadError, ConnectionError):
                return
            if head.startswith(b"GET"):
                status, reply = 404, b"{}"
            else:
                length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                body = await reader.readexactly(length)
                bodies.append(json.loads(body) if body.startswith(b"{") else {})
                status, reply = replies[min(len(bodies), len(replies)) - 1]
            writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(reply), reply))

    async def main():
        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        async with server:
            return await use(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", bodies)

    return asyncio.run(main())


OK = (200, COMPLETION)


def error(status: int, message: str = "no", **others: object) -> tuple[int, bytes]:
    return status, json.dumps({"error": {"message": message, **others}}).encode()


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504])
def test_passing_troubles_are_retried(status):
    async def use(url, bodies):
        async with ChatClient([url], backoff=FAST) as client:
            return (await client.complete(BODY)).calls.num_calls

    assert scripted_server([error(status), error(status), OK], use) == 3


def test_an_error_inside_a_200_is_that_status():
    async def use(url, bodies):
        async with ChatClient([url], backoff=FAST) as client:
            assert (await client.complete(BODY)).calls.faults == ["http_503"]
            with pytest.raises(CallFailed, match="too long") as caught:
                await client.complete(BODY)
            return caught.value

    failure = scripted_server([(200, error(503, code=503)[1]), OK, (200, error(400, "too long", code=400)[1])], use)
    assert (failure.reason, failure.permanent) == ("http_400", True)


@pytest.mark.parametrize(("status", "permanent"), [(403, True), (404, False)])
def test_a_refusal_in_mid_run_is_that_requests_own(status, permanent):
    async def use(url, bodies):
        async with ChatClient([url], backoff=FAST, max_calls=2) as client:
            await client.complete(BODY)
            with pytest.raises(CallFailed) as caught:
                await client.complete(BODY)
            return caught.value, len(bodies)

    failure, num_calls = scripted_server([OK, error(status)], use)
    assert (failure.reason, failure.permanent) == (f"http_{status}", permanent)
    assert num_calls == (2 if permanent else 3)


def test_a_first_refusal_by_a_server_that_lists_the_model_is_that_requests_own():
    async def use(url):
        async with ChatClient([url], backoff=FAST) as client:
            with pytest.raises(CallFailed, match="http_403"):
                await client.complete({**BODY, "model": "oracle"})
            with pytest.raises(EndpointError):
                await client.complete({**BODY, "model": "another"})

    with_server(Faults(1.0, 0, ("forbidden",)), use)


@pytest.mark.parametrize(
    "reply",
    [error(402, "top up"), error(429, "top up", code="insufficient_quota"), (200, error(0, "top up", code=402)[1])],
)
def test_an_empty_account_stops_the_run_with_the_servers_words(reply):
    async def use(url, bodies):
        async with ChatClient([url], backoff=FAST) as client:
            with pytest.raises(OutOfCredit, match="top up"):
                await client.complete(BODY)
            return len(bodies)

    assert scripted_server([reply], use) == 1


def test_the_load_is_shared_evenly():
    counts = [0, 0]

    def counted(index):
        def answerer(request, fault):
            counts[index] += 1
            return answer(request, fault)

        return answerer

    async def main():
        services = [Service(counted(index), Scripted(), latency=0.01) for index in (0, 1)]
        servers = [await serve(service, "127.0.0.1", 0) for service in services]
        urls = [f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1" for server in servers]
        async with servers[0], servers[1], ChatClient(urls) as client:
            for _ in range(10):
                await asyncio.gather(*(client.complete(BODY) for _ in range(10)))

    asyncio.run(main())
    assert min(counts) >= 45


def test_the_client_keeps_to_its_rate_limit():
    async def use(url):
        async with ChatClient([url], limiter=RateLimiter(requests=600)) as client:
            started = time.monotonic()
            await asyncio.gather(*(client.complete(BODY) for _ in range(6)))
            return time.monotonic() - started

    assert with_server(Scripted(), use) >= 0.35


def test_tokens_a_minute_are_reserved_before_a_call_starts():
    """Ten calls begun at once would use ten times the limit before the first one could be counted."""
    starts = []

    async def slow():
        await asyncio.sleep(0.2)
        return Answer("x", prompt_tokens=5, completion_tokens=95)

    def answerer(request, fault):
        starts.append(time.monotonic())
        return asyncio.ensure_future(slow())

    async def use(url):
        async with ChatClient([url], limiter=RateLimiter(tokens=60_000)) as client:
            await asyncio.gather(*(client.complete({**BODY, "max_tokens": 100}) for _ in range(6)))

    with_server(Scripted(), use, answerer)
    assert starts[-1] - starts[0] >= 0.45


def test_a_request_waits_for_a_server_that_is_away_as_long_as_it_may():
    async def use():
        started = time.monotonic()
        async with ChatClient(["http://127.0.0.1:9/v1"], backoff=FAST, max_calls=1, patience=1.0) as client:
            with pytest.raises(CallFailed) as caught:
                await client.complete(BODY)
        return caught.value.reason, time.monotonic() - started

    reason, seconds = asyncio.run(use())
    assert reason == "no_connection"
    assert 1.0 <= seconds < 10


def test_a_server_behind_a_proxy_may_be_away_for_more_calls_than_a_request_has():
    async def use(url, bodies):
        async with ChatClient([url], backoff=FAST, max_calls=2) as client:
            return (await client.complete(BODY)).calls.num_away

    assert scripted_server([error(503)] * 4 + [OK], use) == 4


def test_connections_that_the_server_closes_while_idle_cost_nothing():
    async def use(url):
        budget = Budget(9.0)
        async with ChatClient([url], backoff=FAST) as client:
            for _ in range(5):
                payments = [budget.payment(1.0) for _ in range(4)]
                assert [payment.reserve() for payment in payments] == [True] * 4
                await asyncio.gather(*(client.complete(BODY, payment) for payment in payments))
                for payment in payments:
                    payment.settle(0.01)
                await asyncio.sleep(0.06)  # the server closes all four connections
        return budget.spent_usd

    assert with_server(Faults(1.0, 0, ("idle_close",)), use) == pytest.approx(20 * 0.01)


def test_a_request_that_timed_out_gets_another_seed_and_a_stalled_body_does_not():
    seeds = []

    async def loop():
        await asyncio.sleep(60)

    def answerer(request, fault):
        seeds.append(request["seed"])
        return asyncio.ensure_future(loop()) if len(seeds) == 1 else Answer("ok")

    async def use(url):
        async with ChatClient([url], backoff=FAST, timeout=0.3) as client:
            completion = await client.complete({**BODY, "seed": 7})
            assert (completion.seed, completion.calls.faults) == (8, ["timeout"])
            seeds.clear()
            with pytest.raises(CallFailed):
                await client.complete({**BODY, "seed": 7, "temperature": 0})
            seeds.append(0)
            completion = await client.complete({**BODY, "seed": 7})
            assert (completion.seed, completion.calls.faults) == (7, ["stalled_body"])

    with_server(Scripted(None, None, None, "slow_body"), use, answerer)


def test_max_tokens_are_fitted_to_the_servers_context_length():
    sent = []

    def answerer(request, fault):
        sent.append(request["max_tokens"])
        return Answer("ok")

    async def main():
        async with (
            await serve(Service(answerer, Scripted(), max_model_len=2000), "127.0.0.1", 0) as server,
            ChatClient([f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"]) as client,
        ):
            await client.find_context_length()
            for most in (100, 32768):
                await client.complete({**BODY, "max_tokens": most})

    asyncio.run(main())
    assert sent[0] == 100
    assert 1500 < sent[1] < 2000


@pytest.mark.parametrize(
    ("url", "is_sent"),
    [
        ("http://127.0.0.1:8000/v1", True),
        ("http://localhost/v1", True),
        ("http://[::1]:8000/v1", True),
        ("https://oracle.example/v1", True),
        ("http://oracle.example/v1", False),
        ("http://10.0.0.7:8000/v1", False),
    ],
)
def test_a_key_never_leaves_the_machine_in_clear(monkeypatch, capsys, url, is_sent):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-4711")
    assert (ApiKey("OPENAI_API_KEY").value_for(url) == "sk-secret-4711") == is_sent
    message = capsys.readouterr().err
    assert ("--key-over-http" in message) == (not is_sent)
    assert "4711" not in message
    assert ApiKey("OPENAI_API_KEY", in_clear=True).value_for(url) == "sk-secret-4711"


@pytest.mark.parametrize(
    "url", ["https://h/v1?api_key=sk-1", "https://h/v1#sk-1", "https://u:sk-1@h/v1", "http://u:sk-1@/v1"]
)
def test_a_key_in_an_address_is_refused(url):
    with pytest.raises(EndpointError) as caught:
        ChatClient([url])
    assert "sk-1" not in str(caught.value)


def test_a_file_system_without_locks_says_so(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(PairError, match="does not support file locks"):
        Journal(tmp_path / "journal.jsonl", {})

"""The client against a misbehaving server, About 10 s."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable

import pytest

from tools.oracle.http_server import TRANSPORT_FAULTS, Answer, Faults, RefusedRequest, Service, serve
from tools.pairs.client import CallFailed, ChatClient
from tools.pairs.endpoint import EndpointError
from tools.pairs.limits import Backoff

BODY = {"model": "m", "messages": [{"role": "user", "content": "é 4*2"}], "return_token_ids": True}
FAST = Backoff(base=0.01, cap=0.05)
REASONS = {
    "rate_limit": "http_429",
    "server_error": "http_500",
    "reset": "connection_lost",
    "slow_body": "stalled_body",
    "truncated_json": "bad_body",
    "empty_choices": "empty_choices",
}


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-4711")


class Scripted(Faults):
    """The given faults in turn, then none."""

    def __init__(self, *script: str | None) -> None:
        super().__init__(0.0, 0)
        self.script = list(script)
        self.num_calls = 0

    def draw(self, body: bytes) -> str | None:
        self.num_calls += 1
        return self.script.pop(0) if self.script else None


def answer(request, fault):
    return Answer("8 é", "stop", [3, 1, 4], prompt_tokens=5, completion_tokens=3)


def with_server(faults: Faults, use: Callable[[str], Awaitable], answerer=answer, slow_seconds: float = 2.0):
    async def main():
        server = await serve(Service(answerer, faults, slow_seconds=slow_seconds), "127.0.0.1", 0)
        async with server:
            return await use(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1")

    return asyncio.run(main())


async def one_call(url: str, **options):
    async with ChatClient([url], backoff=FAST, **options) as client:
        return await client.complete(BODY), client.faults


def test_an_answer_keeps_all_that_the_server_says():
    completion, faults = with_server(Scripted(), one_call)
    assert (completion.text, completion.finish_reason, completion.token_ids) == ("8 é", "stop", [3, 1, 4])
    assert (completion.prompt_tokens, completion.completion_tokens) == (5, 3)
    assert completion.calls.num_calls == 1
    assert not faults


@pytest.mark.parametrize("fault", TRANSPORT_FAULTS)
def test_every_transport_fault_is_retried_and_named(fault):
    completion, faults = with_server(Scripted(fault, fault), lambda url: one_call(url, timeout=0.5))
    assert completion.text == "8 é"
    assert completion.calls.num_calls == 3
    assert completion.calls.faults == [REASONS[fault]] * 2
    assert faults == {REASONS[fault]: 2}


def test_a_slow_body_that_arrives_in_time_is_accepted():
    completion, _ = with_server(Scripted("slow_body"), lambda url: one_call(url, timeout=5.0), slow_seconds=0.2)
    assert completion.calls.num_calls == 1


def test_calls_are_bounded_and_the_last_reason_is_kept():
    faults = Scripted(*["server_error"] * 9)

    async def use(url):
        with pytest.raises(CallFailed) as caught:
            await one_call(url, max_calls=4)
        return caught.value

    failure = with_server(faults, use)
    assert (failure.reason, failure.permanent, failure.calls.num_calls, faults.num_calls) == ("http_500", False, 4, 4)


def test_retry_after_is_waited_for():
    started = time.monotonic()
    with_server(Scripted("rate_limit"), one_call)  # the server says one second
    assert 1.0 <= time.monotonic() - started < 4.0


def test_a_request_that_is_refused_is_not_sent_again():
    faults = Scripted()

    def refuse(request, fault):
        raise RefusedRequest("too long; key sk-secret-4711")

    async def use(url):
        with pytest.raises(CallFailed) as caught:
            await one_call(url)
        return caught.value

    failure = with_server(faults, use, refuse)
    assert (failure.reason, failure.permanent, faults.num_calls) == ("http_400", True, 1)
    assert "too long" in failure.detail
    assert "4711" not in str(failure)
    assert "[API key]" in failure.detail


@pytest.mark.parametrize(("status", "says"), [(401, "environment variable OPENAI_API_KEY"), (404, "--model")])
def test_a_wrong_key_or_model_stops_everything(status, says):
    async def use(url):
        with pytest.raises(EndpointError, match=says) as caught:
            await one_call(url)
        return str(caught.value)

    reply = json.dumps({"error": {"message": "you sent sk-secret-4711"}}).encode()
    message = raw_server(b"HTTP/1.1 %d No\r\nContent-Length: %d\r\n\r\n%s" % (status, len(reply), reply), use)
    assert "4711" not in message


def test_a_dead_endpoint_does_not_hold_up_the_others():
    async def use(url):
        async with ChatClient(["http://127.0.0.1:9/v1", url], backoff=FAST) as client:
            completions = await asyncio.gather(*(client.complete(BODY) for _ in range(40)))
            return completions, client.faults

    completions, faults = with_server(Scripted(), use)
    assert len(completions) == 40
    assert len({completion.endpoint for completion in completions}) == 1
    assert faults["no_connection"] <= 20


def test_all_requests_wait_while_no_server_is_up():
    """A server that starts late is met by a few probes, not by every request's retries."""

    async def main():
        placeholder = await serve(Service(answer, Scripted()), "127.0.0.1", 0)
        port = placeholder.sockets[0].getsockname()[1]
        placeholder.close()
        await placeholder.wait_closed()
        async with ChatClient([f"http://127.0.0.1:{port}/v1"], backoff=FAST) as client:
            requests = asyncio.gather(*(client.complete(BODY) for _ in range(30)))
            await asyncio.sleep(1.0)
            async with await serve(Service(answer, Scripted()), "127.0.0.1", port):
                return await requests, client.faults

    completions, faults = asyncio.run(main())
    assert len(completions) == 30
    assert 30 <= faults["no_connection"] <= 30 * 6


def test_two_endpoints_share_the_load():
    async def use(url):
        async with ChatClient([url, url], backoff=FAST) as client:
            await asyncio.gather(*(client.complete(BODY) for _ in range(10)))
            return [endpoint.in_flight for endpoint in client._endpoints]

    slow = Faults(0.0, 0)
    assert with_server(slow, use) == [0, 0]


def raw_server(reply: bytes, use, close: bool = True):
    """Answers every request with the same bytes."""

    async def handle(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        if b"content-length:" in head.lower():
            await reader.readexactly(int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0]))
        for part in (reply[: len(reply) // 2], reply[len(reply) // 2 :]):
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.01)
        if close:
            writer.close()

    async def main():
        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        async with server:
            return await use(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1")

    return asyncio.run(main())


COMPLETION = json.dumps({"choices": [{"message": {"content": "ok"}, "finish_reason": "length"}]}).encode()


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(COMPLETION), COMPLETION),
        b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + COMPLETION,
        b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(COMPLETION), COMPLETION),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        + b"5\r\n%s\r\n%x;ext=1\r\n%s\r\n0\r\n\r\n" % (COMPLETION[:5], len(COMPLETION) - 5, COMPLETION[5:]),
    ],
    ids=["length", "until-close", "http-1.0", "chunked"],
)
def test_bodies_of_every_framing_are_read(reply):
    completion, _ = raw_server(reply, one_call)
    assert (completion.text, completion.finish_reason, completion.prompt_tokens) == ("ok", "length", None)


@pytest.mark.parametrize(
    "reply",
    [
        b"SSH-2.0-nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + COMPLETION,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nnull",
        b'HTTP/1.1 200 OK\r\nContent-Length: 14\r\n\r\n{"choices": 3}',
        b'HTTP/1.1 200 OK\r\nContent-Length: 18\r\n\r\n{"choices": [null]}'[:-1] + b"",
        b'HTTP/1.1 200 OK\r\nContent-Length: 57\r\n\r\n{"choices": [{"message": {"content": "\\ud800"}, "x": 123}]}',
    ],
    ids=lambda reply: repr(reply[-20:]),
)
def test_nonsense_is_a_named_fault(reply):
    async def use(url):
        with pytest.raises(CallFailed) as caught:
            await one_call(url, max_calls=2, timeout=2.0)
        return caught.value

    failure = raw_server(reply, use)
    assert failure.reason in ("connection_lost", "bad_body", "empty_choices")
    assert not failure.permanent


def test_a_null_content_is_an_empty_answer():
    body = b'{"choices": [{"message": {"content": null}, "finish_reason": "length"}]}'
    completion, _ = raw_server(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body), one_call)
    assert (completion.text, completion.finish_reason) == ("", "length")


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host/v1", "http://user:secret@host/v1", ""])
def test_a_bad_address_is_refused_without_showing_a_password(url):
    with pytest.raises(EndpointError) as caught:
        ChatClient([url])
    assert "secret" not in str(caught.value)


def test_the_key_is_sent_and_only_the_named_variable_is_read(monkeypatch):
    monkeypatch.setenv("OTHER_KEY", "sk-other")
    seen = []

    async def use(url):
        async with ChatClient([url], key_variable="OTHER_KEY") as client:
            await client.complete(BODY)

    async def main():
        async def handle(reader, writer):
            seen.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(COMPLETION), COMPLETION))

        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        async with server:
            await use(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1")

    asyncio.run(main())
    assert b"authorization: bearer sk-other" in seen[0].lower()

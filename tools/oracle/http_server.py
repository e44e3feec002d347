"""The HTTP side of the local oracle: an OpenAI-compatible server on asyncio alone, with faults on request."""

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

from tools.oracle.batches import BatchStore

TRANSPORT_FAULTS = ("rate_limit", "server_error", "reset", "slow_body", "truncated_json", "empty_choices")
CONTENT_FAULTS = ("missing_markers", "wrong_answer")
FAULTS = TRANSPORT_FAULTS + CONTENT_FAULTS
# Only on request: a connection that the server closes while idle, and replies that no retry makes better.
IDLE_CLOSE = "idle_close"
REPLY_FAULTS = ("forbidden", "null_content", "thinking")

_STATUS_FAULTS = {
    "rate_limit": (429, "slow down"),
    "server_error": (500, "injected fault"),
    "forbidden": (403, "this prompt is flagged"),
}
_BY_REQUEST = (*CONTENT_FAULTS, *REPLY_FAULTS)
_IDLE_SECONDS = 0.02
_REASONS = {
    200: "OK",
    400: "Bad Request",
    403: "Forbidden",
    404: "Not Found",
    429: "Too Many Requests",
    500: "Internal Server Error",
}


@dataclass(frozen=True)
class Answer:
    """The model's answer; `text` None is a null content."""

    text: str | None
    finish_reason: str = "stop"
    token_ids: list[int] | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning: str | None = None


class RefusedRequest(Exception):
    """The request can never be answered: status 400 with this message."""


# Either of the two: an answer at once, or later. `fault` is a content fault that the answer must have, or None.
Answerer = Callable[[dict[str, Any], str | None], Answer | Awaitable[Answer]]


class Faults:
    """Which fault, if any, a call meets: a share `rate` of all calls, spread evenly over the kinds.

    Drawn from the seed and the request alone. A transport fault also depends on how often this request came before,
    so that a retry can succeed; a content fault does not, so that a run that was killed and repeated sees the same
    answers.
    """

    def __init__(self, rate: float, seed: int, kinds: tuple[str, ...] = FAULTS) -> None:
        self._rate, self._seed, self._kinds = rate, str(seed).encode(), kinds
        self._times_seen: Counter[bytes] = Counter()

    def draw(self, body: bytes) -> str | None:
        if not self._rate:
            return None
        digest = hashlib.blake2b(body, key=self._seed, digest_size=16).digest()
        content = [kind for kind in self._kinds if kind in _BY_REQUEST]
        transport = [kind for kind in self._kinds if kind not in _BY_REQUEST]
        each = self._rate / len(self._kinds)
        point = int.from_bytes(digest[:8], "big") / 2**64
        if point < each * len(content):
            return content[int(point / each)]
        self._times_seen[digest] += 1
        count = str(self._times_seen[digest]).encode()
        point = int.from_bytes(hashlib.blake2b(digest + count, digest_size=8).digest(), "big") / 2**64
        return transport[int(point / each)] if point < each * len(transport) else None


@dataclass(frozen=True)
class Service:
    """Settings shared by all connections of a server."""

    answer: Answerer
    faults: Faults
    model: str = "oracle"
    latency: float = 0.0
    slow_seconds: float = 5.0
    max_model_len: int | None = None
    batches: BatchStore = field(default_factory=BatchStore)

    def card(self) -> dict[str, Any]:
        """The model's entry in the list of models."""
        length = {} if self.max_model_len is None else {"max_model_len": self.max_model_len}
        return {"id": self.model, "object": "model", **length}


async def serve(service: Service, host: str, port: int) -> asyncio.Server:
    """A listening server; port 0 takes a free one."""
    loop = asyncio.get_running_loop()
    return await loop.create_server(lambda: _Connection(service), host, port, backlog=4096)


class _Connection(asyncio.Protocol):
    """One keep-alive connection; no client sends a second request before it has its answer."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._buffer = bytearray()
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._closing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        if self._closing is not None:
            self._closing.cancel()
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = bytes(self._buffer[:end])
            length = _content_length(head)
            if len(self._buffer) < end + 4 + length:
                return
            body = bytes(self._buffer[end + 4 : end + 4 + length])
            del self._buffer[: end + 4 + length]
            method, path = head.split(b" ", 2)[:2]
            self._route(method, path.split(b"?")[0].rstrip(b"/"), body, head)

    def _route(self, method: bytes, path: bytes, body: bytes, head: bytes) -> None:
        if method == b"GET" and path in (b"/health", b"/v1/health"):
            self._send(200, {"status": "ok"})
        elif method == b"GET" and path == b"/v1/models":
            self._send(200, {"object": "list", "data": [self._service.card()]})
        elif method == b"POST" and path == b"/v1/chat/completions":
            self._complete(body)
        elif path.startswith((b"/v1/files", b"/v1/batches")):
            self._batch_request(method, path, body, head)
        else:
            self._send_error(404, f"no {path.decode(errors='replace')} here")

    def _batch_request(self, method: bytes, path: bytes, body: bytes, head: bytes) -> None:
        try:
            response = self._service.batches.handle(method.decode(), path.decode(), head, body, self._complete_later)
        except (ValueError, KeyError, IndexError, TypeError) as error:  # malformed requests
            self._send_error(400, f"not a batch request: {error}")
            return
        if response is None:
            self._send_error(404, f"no {path.decode(errors='replace')} here")
        elif isinstance(response, bytes):
            self._transport.write(_head(200, len(response)) + response)
        else:
            self._send(200, response)

    async def _complete_later(self, body: bytes) -> tuple[int, dict[str, Any]]:
        """(status, body) of a request inside a batch."""
        fault = self._service.faults.draw(body)
        if fault in _STATUS_FAULTS:
            status, message = _STATUS_FAULTS[fault]
            return status, {"error": {"message": message}}
        request = json.loads(body)
        try:
            answer = self._service.answer(request, fault if fault in CONTENT_FAULTS else None)
            answer = answer if isinstance(answer, Answer) else await answer
        except (ValueError, KeyError, TypeError, RefusedRequest) as error:
            return 400, {"error": {"message": f"cannot answer this request: {error}"}}
        return 200, completion_body(request, _changed(answer, fault), empty=fault == "empty_choices")

    def _complete(self, body: bytes) -> None:
        fault = self._service.faults.draw(body)
        if fault == "reset":
            self._loop.call_later(self._service.latency, self._transport.abort)
            return
        if fault in _STATUS_FAULTS:
            self._loop.call_later(self._service.latency, self._send_error, *_STATUS_FAULTS[fault])
            return
        try:
            request = json.loads(body)
            answer = self._service.answer(request, fault if fault in CONTENT_FAULTS else None)
        except (ValueError, KeyError, TypeError, RefusedRequest) as error:  # malformed requests
            self._send_error(400, f"cannot answer this request: {error}")
            return
        if isinstance(answer, Answer):
            self._loop.call_later(self._service.latency, self._deliver, request, answer, fault)
        else:
            later = asyncio.ensure_future(answer)
            later.add_done_callback(lambda done: self._deliver_later(request, done, fault))

    def _deliver_later(self, request: dict[str, Any], done: "asyncio.Future[Answer]", fault: str | None) -> None:
        if (error := done.exception()) is not None:
            self._send_error(400, f"cannot answer this request: {error}")
        else:
            self._deliver(request, done.result(), fault)

    def _deliver(self, request: dict[str, Any], answer: Answer, fault: str | None) -> None:
        payload = json.dumps(completion_body(request, _changed(answer, fault), empty=fault == "empty_choices")).encode()
        if fault == "truncated_json":
            payload = payload[: len(payload) // 2]
        head = _head(200, len(payload))
        if fault == "slow_body":
            half = len(payload) // 2
            self._transport.write(head + payload[:half])
            self._loop.call_later(self._service.slow_seconds, self._transport.write, payload[half:])
        else:
            self._transport.write(head + payload)
        if fault == IDLE_CLOSE:
            self._closing = self._loop.call_later(_IDLE_SECONDS, self._transport.close)

    def _send_error(self, status: int, message: str) -> None:
        self._send(status, {"error": {"message": message, "type": "injected" if status != 400 else "bad_request"}})

    def _send(self, status: int, body: dict[str, Any]) -> None:
        payload = json.dumps(body).encode()
        self._transport.write(_head(status, len(payload)) + payload)


def _changed(answer: Answer, fault: str | None) -> Answer:
    if fault == "null_content":
        return replace(answer, text=None, reasoning=answer.text)
    return replace(answer, reasoning="Let me see.") if fault == "thinking" else answer


def completion_body(request: dict[str, Any], answer: Answer, empty: bool = False) -> dict[str, Any]:
    """The body of a chat completion, with vLLM's `token_ids` where the request asks for them and they are known."""
    choice: dict[str, Any] = {
        "index": 0,
        "message": {"role": "assistant", "content": answer.text},
        "finish_reason": answer.finish_reason,
    }
    if answer.reasoning is not None:
        choice["message"]["reasoning_content"] = answer.reasoning
    if request.get("return_token_ids") and answer.token_ids is not None:
        choice["token_ids"] = answer.token_ids
    return {
        "id": "chatcmpl-local",
        "object": "chat.completion",
        "created": 0,
        "model": request.get("model", ""),
        "choices": [] if empty else [choice],
        "usage": {
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.completion_tokens,
            "total_tokens": answer.prompt_tokens + answer.completion_tokens,
        },
    }


def _content_length(head: bytes) -> int:
    start = head.lower().find(b"\r\ncontent-length:") + 17
    return int(head[start:].split(b"\r\n", 1)[0]) if start >= 17 else 0


def _head(status: int, length: int) -> bytes:
    retry_after = b"Retry-After: 1\r\n" if status == 429 else b""
    return b"HTTP/1.1 %d %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n%s\r\n" % (
        status,
        _REASONS[status].encode(),
        length,
        retry_after,
    )

"""Batch mode: requests gathered into OpenAI-compatible batches (/v1/batches), submitted, and collected when done.

A batch outlives this process. Its id and the digests of its requests are on file before it is created, so that a run
that was stopped collects it instead of paying twice.
"""

import asyncio
import hashlib
import json
import sys
import time
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import openai

from spot_megatron.files import dump_line, parse_line, read_rows
from tools.pairs.client import CallFailed, Calls, Completion, fit_max_tokens
from tools.pairs.endpoint import ApiKey, Endpoint, EndpointError
from tools.pairs.limits import Payment
from tools.pairs.replies import BadReply, Reply, read_reply, server_error

STATE_FILE = "batches.jsonl"
_GATHER_SECONDS = 1.0  # a batch is closed when no request has come for so long
_MOST_BYTES = 90 << 20  # of one input file; OpenAI takes 100 MB (decimal)
_ENDED = ("completed", "failed", "expired", "cancelled")


class BatchClient:
    """Takes the place of ChatClient: `complete` returns when the request's batch is done.

    Args:
        folder: where the state file lies; one process at a time, as for the journal.
        num_requests: requests per batch, at most.
        poll_seconds: between looks at a batch.
        patience: seconds for which the server may be out of reach.
    """

    def __init__(
        self, base_url: str, key: ApiKey, folder: Path, num_requests: int, poll_seconds: float, patience: float
    ) -> None:
        self._endpoint = Endpoint(base_url, key, timeout=600.0)
        self._api, self._num_requests = self._endpoint.client, num_requests
        self._poll_seconds, self._patience = poll_seconds, patience
        self._state = folder / STATE_FILE
        self._batch_of: dict[str, str] = {}  # request digest -> input file of the batch that holds it
        self._waiting: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._queue: list[tuple[str, dict[str, Any]]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._gathering: asyncio.Task[None] | None = None
        self._followed: set[str] = set()
        self._batches: dict[str, str] = {}  # input file -> batch
        self.faults: Counter[str] = Counter()
        self.tokens = 0

    async def __aenter__(self) -> "BatchClient":
        if self._state.exists():
            for _, row in read_rows(self._state):
                if "requests" in row:
                    self._batch_of |= dict.fromkeys(row["requests"], row["input"])
                elif "batch" in row:
                    self._batches[row["input"]] = row["batch"]
                else:
                    self._batch_of.pop(row["failed"], None)
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._endpoint.close()

    async def find_context_length(self) -> None:
        await self._endpoint.find_context_length()

    def stop_retrying(self) -> None:
        """Give up waiting; what is submitted is collected by the next run."""
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(CallFailed("interrupted", "the batch continues at the server", False, Calls()))

    async def complete(self, body: dict[str, Any], payment: Payment | None = None) -> Completion:
        """The reply to one request. Raises CallFailed, EndpointError or OutOfCredit, as ChatClient."""
        del payment  # settled by the caller when the reply is here; a batch under way is collected later
        started = time.monotonic()
        body = fit_max_tokens(body, self._endpoint.context_length)
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:32]
        if digest in self._waiting:
            raise EndpointError("two requests of a batch are the same; give every request its own `seed`")
        future = self._waiting[digest] = asyncio.get_running_loop().create_future()
        try:
            if digest in self._batch_of:
                self._start_following(self._batch_of[digest])
            else:
                self._queue.append((digest, body))
                if self._gathering is None or self._gathering.done():
                    self._gathering = self._start(self._gather())
            result = await future
            reply = self._read(digest, result)
        finally:
            del self._waiting[digest]
        self.tokens += (reply.prompt_tokens or 0) + (reply.completion_tokens or 0)
        values = {item.name: getattr(reply, item.name) for item in fields(Reply)}
        seconds, calls = time.monotonic() - started, Calls(num_calls=1)
        return Completion(
            **values, endpoint=self._endpoint.base_url, seconds=seconds, calls=calls, seed=body.get("seed")
        )

    def _read(self, digest: str, result: dict[str, Any]) -> Reply:
        """The reply in a line of a batch's output. Raises CallFailed; the request then joins a later batch."""
        response = result.get("response") or {}
        status, body = response.get("status_code"), response.get("body")
        try:
            if status != 200:
                error = server_error(result) or server_error(body)
                permanent = type(status) is int and 400 <= status < 500 and status not in (408, 409, 429)
                reason = f"http_{status}" if status else "batch_failed"
                raise CallFailed(reason, error.words if error else "no reason given", permanent, Calls(num_calls=1))
            return read_reply(json.dumps(body).encode())
        except BadReply as bad:
            self._forget(digest, bad.reason)
            raise CallFailed(bad.reason, str(bad), False, Calls(num_calls=1)) from None
        except CallFailed as failure:
            self._forget(digest, failure.reason)
            raise

    def _forget(self, digest: str, reason: str) -> None:
        self.faults[reason] += 1
        self._batch_of.pop(digest, None)
        self._note({"failed": digest})

    def _note(self, row: dict[str, Any]) -> None:
        with self._state.open("ab") as file:
            file.write(dump_line(row))

    def _start(self, work: Any) -> asyncio.Task[None]:
        task = asyncio.ensure_future(self._guarded(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _guarded(self, work: Any) -> None:
        """A failure of a background task is every waiting request's failure."""
        try:
            await work
        except Exception as error:
            if isinstance(error, openai.APIError):
                error = CallFailed("batch_failed", f"{self._endpoint.base_url}: {error}", False, Calls())
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(error)

    async def _gather(self) -> None:
        """Wait until no further request comes, then submit all that are there."""
        size = -1
        while size != len(self._queue) and len(self._queue) < self._num_requests:
            size = len(self._queue)
            await asyncio.sleep(_GATHER_SECONDS)
        while self._queue:
            lines: list[bytes] = []
            digests: list[str] = []
            num_bytes = 0
            while self._queue and len(lines) < self._num_requests and num_bytes < _MOST_BYTES:
                digest, body = self._queue.pop(0)
                row = {"custom_id": digest, "method": "POST", "url": "/v1/chat/completions", "body": body}
                lines.append(dump_line(row))
                digests.append(digest)
                num_bytes += len(lines[-1])
            await self._submit(b"".join(lines), digests)

    async def _submit(self, content: bytes, digests: list[str]) -> None:
        try:
            file = await self._api.files.create(file=("requests.jsonl", content), purpose="batch")
            self._note({"input": file.id, "requests": digests})
            await self._create(file.id)
        except openai.APIStatusError as error:
            raise EndpointError(
                f"{self._endpoint.base_url} takes no batch ({error.status_code}): {error}. Leave --batch out where a "
                "server has no /v1/batches."
            ) from None
        self._batch_of |= dict.fromkeys(digests, file.id)
        self._start_following(file.id)

    async def _create(self, input_file: str) -> None:
        batch = await self._api.batches.create(
            input_file_id=input_file, endpoint="/v1/chat/completions", completion_window="24h"
        )
        self._batches[input_file] = batch.id
        self._note({"input": input_file, "batch": batch.id})
        print(f"batch {batch.id} is submitted; a stopped run collects it when run again", file=sys.stderr)

    def _start_following(self, input_file: str) -> None:
        if input_file not in self._followed:
            self._followed.add(input_file)
            self._start(self._follow(input_file))

    async def _follow(self, input_file: str) -> None:
        """Look at a batch until it has ended, and hand out its results."""
        if input_file not in self._batches:  # the last run ended between upload and creation, or just after it
            async for known in self._api.batches.list():
                if known.input_file_id == input_file:
                    self._batches[input_file] = known.id
                    break
            else:
                await self._create(input_file)
        reached = time.monotonic()
        while True:
            try:
                batch = await self._api.batches.retrieve(self._batches[input_file])
                if batch.status in _ENDED:
                    break
                reached = time.monotonic()
            except openai.APIConnectionError:
                if time.monotonic() - reached > self._patience:
                    raise
            await asyncio.sleep(self._poll_seconds)
        words = "; ".join(str(error.message) for error in (batch.errors.data or [])) if batch.errors else batch.status
        for file in (batch.output_file_id, batch.error_file_id):
            if file:
                self._hand_out((await self._api.files.content(file)).content, f"batch {batch.id}")
        for digest, source in list(self._batch_of.items()):
            future = self._waiting.get(digest)
            if source == input_file and future is not None and not future.done():
                future.set_result({"error": {"message": f"the batch has no result for it: {words}"}})

    def _hand_out(self, content: bytes, source: str) -> None:
        for number, line in enumerate(content.splitlines(keepends=True), start=1):
            if line.strip():
                row = parse_line(line, f"{source}:{number}")
                future = self._waiting.get(str(row.get("custom_id")))
                if future is not None and not future.done():
                    future.set_result(row)

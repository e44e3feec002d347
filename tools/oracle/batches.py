"""The local server's /v1/files and /v1/batches: batches are answered in the background, line by line."""

import asyncio
import itertools
import json
from collections.abc import Awaitable, Callable
from typing import Any

Complete = Callable[[bytes], Awaitable[tuple[int, dict[str, Any]]]]  # a request's body -> (status, response body)


class BatchStore:
    """Files and batches by id, in memory."""

    def __init__(self) -> None:
        self._files: dict[str, bytes] = {}
        self._batches: dict[str, dict[str, Any]] = {}
        self._numbers = itertools.count(1)
        self._tasks: set[asyncio.Task[None]] = set()

    def handle(self, method: str, path: str, head: bytes, body: bytes, complete: Complete) -> Any:
        """The response to a request under /v1/files or /v1/batches: an object, bytes, or None where there is none."""
        parts = path.removeprefix("/v1/").split("/")
        if (method, parts) == ("POST", ["files"]):
            return {"id": self._add_file(_uploaded(head, body)), "object": "file", "purpose": "batch"}
        if method == "GET" and parts[0] == "files" and parts[2:] == ["content"]:
            return self._files.get(parts[1])
        if (method, parts) == ("POST", ["batches"]):
            return self._begin(json.loads(body), complete)
        if (method, parts) == ("GET", ["batches"]):
            return {"object": "list", "data": list(self._batches.values())[::-1], "has_more": False}
        return self._batches.get(parts[1]) if (method, parts[0], len(parts)) == ("GET", "batches", 2) else None

    def _add_file(self, content: bytes) -> str:
        name = f"file-{next(self._numbers)}"
        self._files[name] = content
        return name

    def _begin(self, request: dict[str, Any], complete: Complete) -> dict[str, Any]:
        batch: dict[str, Any] = {
            "id": f"batch-{next(self._numbers)}",
            "object": "batch",
            "status": "in_progress",
            "created_at": 0,
        }
        batch |= {key: request[key] for key in ("input_file_id", "endpoint", "completion_window")}
        self._batches[batch["id"]] = batch
        task = asyncio.ensure_future(self._answer(batch, complete))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return batch

    async def _answer(self, batch: dict[str, Any], complete: Complete) -> None:
        good: list[bytes] = []
        bad: list[bytes] = []
        for line in self._files[batch["input_file_id"]].splitlines():
            row = json.loads(line)
            status, body = await complete(_compact(row["body"]))
            response = {"status_code": status, "request_id": "local", "body": body}
            result = {"id": "local", "custom_id": row["custom_id"], "response": response, "error": None}
            (good if status == 200 else bad).append(json.dumps(result).encode() + b"\n")
        for key, lines in (("output_file_id", good), ("error_file_id", bad)):
            if lines:
                batch[key] = self._add_file(b"".join(lines))
        batch["status"] = "completed"


def _uploaded(head: bytes, body: bytes) -> bytes:
    """The part called `file` of a multipart form."""
    boundary = b"--" + head.lower().split(b"boundary=", 1)[1].split(b"\r\n", 1)[0].strip(b'" ;')
    index = head.lower().index(boundary[2:])
    boundary = b"--" + head[index : index + len(boundary) - 2]
    for part in body.split(boundary):
        fields, _, content = part.partition(b"\r\n\r\n")
        if b'name="file"' in fields:
            return content.removesuffix(b"\r\n")
    raise ValueError("the form has no part called file")


def _compact(body: dict[str, Any]) -> bytes:
    """As httpx writes a body, so that a request meets the same fault alone and in a batch."""
    return json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()

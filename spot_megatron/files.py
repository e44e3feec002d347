"""Strict JSONL reading, atomic writing and digests of files, for both halves of the project."""

from __future__ import annotations

import bz2
import difflib
import errno
import fcntl
import gzip
import hashlib
import io
import json
import lzma
import math
import os
import socket
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from spot_megatron.errors import PairError

Row = dict[str, Any]
FINISH_REASONS = ("stop", "length")  # how a response in a pair may have ended
BLOCK_BYTES = 1 << 24


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """'; did you mean X?' with the nearest known name X, or an empty string if none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {near[0]}?" if near else ""


def parse_line(line: bytes, source: str) -> Row:
    """One JSON object from one line. Raises PairError whose message starts with `source` ("file:line")."""
    try:
        row = json.loads(line.decode("utf-8"), parse_constant=_number, parse_float=_number, object_pairs_hook=_object)
        if b"\\ud" in line or b"\\uD" in line:  # JSON can hold a lone surrogate, UTF-8 cannot
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise PairError(f"{source}: not UTF-8 (byte {error.start} of the line); save the file as plain UTF-8") from None
    except UnicodeEncodeError:
        raise PairError(f"{source}: half a character (a lone \\ud8.. or \\udc.. escape); remove it") from None
    except (ValueError, RecursionError) as error:  # bad JSON, a number of thousands of digits, deep nesting
        remedy = "every line must be one complete JSON object"
        if not line.endswith(b"\n"):
            remedy += "; the file's last line may be cut off: write the file again, or remove that line"
        raise PairError(f"{source}: not valid JSON ({error}); {remedy}") from None
    if isinstance(row, list):
        raise PairError(f"{source}: a JSON array; write one object a line, for example with `jq -c '.[]'`")
    if not isinstance(row, dict):
        raise PairError(f"{source}: {kind(row)} instead of a JSON object; every line must be one object")
    return row


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def _object(items: list[tuple[str, Any]]) -> Row:
    row = dict(items)
    if len(row) < len(items):
        keys = [key for key, _ in items]
        raise ValueError(f"key {max(keys, key=keys.count)!r} occurs twice")
    return row


def kind(value: Any) -> str:
    """The JSON type of a value, for messages."""
    names = {str: "a string", bool: "true or false", int: "a number", float: "a number", list: "a list"}
    return names.get(type(value), "null" if value is None else "an object")


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """(number from 1, object) of every line that is not blank, or of every row of a Parquet file.

    Only "\\n" ends a line; a byte-order mark is skipped. JSONL may be packed by gzip, bzip2, xz or Zstandard, whatever
    its name. A null of a Parquet row is a missing key, at any depth: columns cannot say it otherwise.

    Raises:
        PairError: the file cannot be read, or a line is not one JSON object in UTF-8; names file and line.
    """
    try:
        with path.open("rb") as raw:
            start = raw.read(8)
            raw.seek(0)
            if start.startswith(b"PAR1"):
                yield from _read_parquet(path)
                return
            if start.startswith(b"PK\x03\x04"):
                raise PairError(f"{path}: a zip archive; unpack it with `unzip {path.name}` and name the file in it")
            with _unpacked(raw, start) as file:
                for number, line in enumerate(file, start=1):
                    if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                        line = line[3:]
                    if line.strip():
                        yield number, parse_line(line, f"{path}:{number}")
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PairError(f"{path}: cannot be read ({reason}); check the path, or write the file again") from None


def _unpacked(raw: io.BufferedReader, start: bytes) -> io.BufferedIOBase:
    """The stream `raw`, unpacked if its first bytes `start` are those of a packed file."""
    if start.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=raw)
    if start.startswith(b"BZh"):
        return bz2.BZ2File(raw)
    if start.startswith(b"\xfd7zXZ\x00"):
        return lzma.LZMAFile(raw)
    if start.startswith(b"\x28\xb5\x2f\xfd"):
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(raw, compression="zstd"))
    return raw


def _read_parquet(path: Path) -> Iterator[tuple[int, Row]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            batches = (batch.to_pylist() for batch in file.iter_batches(batch_size=4096))
            yield from enumerate((_without_nulls(row) for rows in batches for row in rows), start=1)
    except pyarrow.ArrowException as error:
        raise PairError(f"{path}: cannot be read as Parquet ({error}); write the file again") from None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def text_field(row: Row, key: str, source: str) -> str:
    """The string at `key`. Raises PairError if it is missing or not a string."""
    value = row.get(key)
    if not isinstance(value, str):
        raise PairError(f"{source}: `{key}` is {'missing' if value is None else kind(value)}; it must be a string")
    return value


def answer_field(row: Row, key: str, source: str) -> str:
    """The known answer at `key`, a string or a number, as a string. Raises PairError for anything else."""
    value = row.get(key)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return json.dumps(value)
    return text_field(row, key, source)


def id_field(row: Row, source: str) -> str:
    """The row's `id`, a string or a whole number, as a string. Raises PairError for anything else."""
    value = row.get("id")
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise PairError(f"{source}: `id` is missing or neither a string nor a whole number")
    return str(value)


def dump_line(row: Row) -> bytes:
    """The row as one line of compact JSON in UTF-8, with its newline."""
    return (json.dumps(row, ensure_ascii=False, separators=(",", ":"), allow_nan=False) + "\n").encode("utf-8")


def write_rows(path: Path, rows: Iterable[Row]) -> int:
    """Replaces `path` by the rows, atomically. Returns their number."""
    with AtomicWriter(path) as writer:
        for row in rows:
            writer.write(dump_line(row))
        return writer.num_lines


def write_text(path: Path, text: str) -> None:
    """Replaces `path` by the text, atomically."""
    with AtomicWriter(path) as writer:
        writer.write(text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Replaces `path` by `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


class AtomicWriter:
    """A file that appears under its name, flushed to disk, only when the block ends without an exception.

    Each process writes its own partial file, so two writers of one path do not mix; the last to finish wins.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        self.num_lines = 0
        self._file = self.partial.open("wb")

    def write(self, line: bytes) -> None:
        self._file.write(line)
        self.num_lines += 1

    def __enter__(self) -> AtomicWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
                self.partial.replace(self.path)
        finally:  # a full disk or a second signal leaves nothing behind, either
            self.partial.unlink(missing_ok=True)
            self._file.close()


def take_lock(path: Path, wait_seconds: float = 0.0) -> int:
    """Locks `path` for this process until it ends or the returned descriptor is closed.

    Raises:
        BlockingIOError: another process holds the lock; the message names it.
        OSError: the file cannot be made, or its file system does not support locks.
    """
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            is_held = error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
            if is_held and time.monotonic() < deadline:
                time.sleep(0.1)
                continue
            holder = os.read(lock, 200).decode(errors="replace").strip() or "another process"
            os.close(lock)
            if is_held:
                raise BlockingIOError(holder) from None
            raise
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        return lock


def sync_to_disk(path: Path) -> None:
    """Blocks until a file's content, or a folder's list of entries, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()

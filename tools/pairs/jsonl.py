"""Strict reading and atomic writing of JSON Lines, the only format that the stages hand to each other."""

import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from spot_megatron.errors import PairError

Row = dict[str, Any]
FINISH_REASONS = ("stop", "length")  # how an answer can end that a pair may hold


def parse_line(line: bytes, where: str) -> Row:
    """One JSON object from one line. Raises PairError whose message starts with `where` and says what is wrong."""
    try:
        row = json.loads(line.decode("utf-8"), parse_constant=_number, parse_float=_number, object_pairs_hook=_object)
        if b"\\ud" in line or b"\\uD" in line:  # a lone surrogate can be written in JSON, but never again in UTF-8
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeError as error:
        raise PairError(f"{where}: not valid UTF-8 text ({error}). Save the file as UTF-8.") from None
    except (ValueError, RecursionError) as error:  # bad JSON, a number of thousands of digits, absurd nesting
        raise PairError(f"{where}: not a JSON object ({error}). Every line must be one complete JSON object.") from None
    if not isinstance(row, dict):
        raise PairError(f"{where}: a JSON {type(row).__name__} where an object {{...}} is expected.")
    return row


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no number that JSON can hold")
    return value


def _object(items: list[tuple[str, Any]]) -> Row:
    row = dict(items)
    if len(row) < len(items):
        keys = [key for key, _ in items]
        raise ValueError(f"the key {max(keys, key=keys.count)!r} occurs twice")
    return row


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """(line number from 1, object) of every line that is not blank.

    Only "\\n" ends a line, a byte-order mark is skipped. Raises PairError naming file and line for a missing file, a
    line that is not one JSON object, or text that is not UTF-8.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise PairError(f"{path}: cannot be read ({error.strerror}). Check the path.") from None
    with file:
        for number, line in enumerate(file, start=1):
            if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                line = line[3:]
            if line.strip():
                yield number, parse_line(line, f"{path}, line {number}")


def text_field(row: Row, key: str, where: str) -> str:
    """The string at `key`. Raises PairError when it is missing or is not text."""
    value = row.get(key)
    if not isinstance(value, str):
        found = "missing" if value is None else f"a {type(value).__name__}"
        raise PairError(f"{where}: `{key}` is {found}; it must be text.")
    return value


def answer_field(row: Row, key: str, where: str) -> str:
    """The known answer at `key`, a text or a number, as text. Raises PairError for anything else."""
    value = row.get(key)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return json.dumps(value)
    return text_field(row, key, where)


def id_field(row: Row, where: str) -> str:
    """The row's `id`, a text or a whole number, as text. Raises PairError for anything else."""
    value = row.get("id")
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise PairError(f"{where}: `id` is missing, or neither text nor a whole number.")
    return str(value)


def dump_line(row: Row) -> bytes:
    """The row as one line of compact JSON in UTF-8, with its newline."""
    return (json.dumps(row, ensure_ascii=False, separators=(",", ":"), allow_nan=False) + "\n").encode("utf-8")


def write_rows(path: Path, rows: Iterable[Row]) -> int:
    """Replace `path` by the rows and return their number; a reader sees the old file or the whole new one."""
    with AtomicWriter(path) as writer:
        for row in rows:
            writer.write(dump_line(row))
        return writer.num_lines


def write_text(path: Path, text: str) -> None:
    """Replace `path` by the text, atomically."""
    with AtomicWriter(path) as writer:
        writer.write(text.encode("utf-8"))


class AtomicWriter:
    """A file that appears under its name only when the block ends without an exception, flushed to the disk."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.partial = path.with_name(f".{path.name}.partial")
        self.num_lines = 0
        self._file = self.partial.open("wb")

    def write(self, line: bytes) -> None:
        self._file.write(line)
        self.num_lines += 1

    def __enter__(self) -> "AtomicWriter":
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

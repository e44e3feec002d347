"""The append-only journal of a stage: every finished record survives a kill, and no other is read back.

A record is one line, written by one `write` call to a file opened for appending; it counts only once its newline is
on file. Whatever a crash leaves after the last newline is cut off when the journal is opened again, and that work is
redone. Each line ends with the CRC-32 of the bytes before it, so that a changed record is refused; lines of earlier
versions have none.

    {"id":"q1","sample":0,"response":"...","crc32":"1c291ca3"}
"""

import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from spot_megatron.errors import PairError
from spot_megatron.files import Row, dump_line, parse_line, take_lock, write_text

Fields = dict[str, type]  # required fields of a record, with their types
_TAIL_BLOCK = 1 << 16
_CHECKSUM = b',"crc32":"'
_CHECKSUM_BYTES = len(_CHECKSUM) + len(b'1c291ca3"}\n')


class Journal:
    """One process's exclusive hold on a journal file.

    `settings` says what the records depend on (model, sampling, ...). They are kept beside the journal, and opening it
    with others raises PairError, so that one file never mixes two experiments; so does a second process. They may
    change while no record on file is one that `depends` on them; the file is then set aside as NAME.before.
    """

    def __init__(
        self, path: Path, settings: dict[str, Any], depends: Callable[[Row], bool] = lambda record: True
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._lock = _take_lock(path.with_name(path.name + ".lock"))
        try:
            _check_settings(settings_file(path), settings, path, depends)
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            self.num_torn_bytes = _cut_torn_tail(self._file)
            self._size = os.fstat(self._file).st_size
            self._reader = path.open("rb")
        except BaseException:
            os.close(self._lock)
            raise

    def append(self, row: Row) -> int:
        """Add one record and return its byte offset.

        It survives a kill of this process from here on, and a power cut from the next `sync` on.
        """
        line, offset = _checked_line(row), self._size
        written = os.write(self._file, line)
        if written != len(line):  # a full disk: take the half line back, so that the file stays readable
            os.ftruncate(self._file, offset)
            raise OSError(f"{self.path}: only {written} of {len(line)} bytes could be written; is the disk full?")
        self._size += written
        return offset

    def sync(self) -> None:
        """Flush to the disk."""
        os.fsync(self._file)

    def records(self) -> Iterator[tuple[int, Row]]:
        """(byte offset, record) of every record on file, oldest first, holding one in memory at a time."""
        yield from read_records(self.path)

    def read_at(self, offset: int) -> Row:
        """The record that starts at `offset`."""
        self._reader.seek(offset)
        return _parse_record(self._reader.readline(), f"{self.path}, byte {offset}")

    def close(self) -> None:
        self.sync()
        self._reader.close()
        os.close(self._file)
        os.close(self._lock)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_records(path: Path) -> Iterator[tuple[int, Row]]:
    """(byte offset, record) of a journal that somebody else may be writing: a last line without newline is left out."""
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            yield offset, _parse_record(line, f"{path}:{number}")
            offset += len(line)


def _checked_line(row: Row) -> bytes:
    """The record's line, with its checksum as the last key."""
    start = dump_line(row).removesuffix(b"}\n")
    return b'%b%b%08x"}\n' % (start, _CHECKSUM, zlib.crc32(start))


def _parse_record(line: bytes, source: str) -> Row:
    """The record of one line. Raises PairError if it is not what was written."""
    start, end = line[:-_CHECKSUM_BYTES], line[-_CHECKSUM_BYTES:]
    equal = sum(a == b for a, b in zip(end, _CHECKSUM, strict=False))
    if equal < 0.7 * len(_CHECKSUM):  # an earlier version's, not a changed byte of the key
        return parse_line(line, source)
    if end != b'%b%08x"}\n' % (_CHECKSUM, zlib.crc32(start)):
        raise PairError(
            f"{source}: the record is damaged: its checksum differs. Take the line out, and its work is done again."
        )
    return parse_line(start + b"}\n", source)


def check_fields(record: Row, fields: Fields | None, where: str) -> None:
    """Raise PairError unless the record has these fields; None says that its kind is unknown."""
    wrong = fields is None or next((key for key, kind in fields.items() if type(record.get(key)) is not kind), None)
    if wrong:
        which = "of no known kind" if wrong is True else f"without a proper `{wrong}`"
        raise PairError(
            f"{where}: a record {which}, not written by this program. Take the line out, or use a new --output."
        )


def _take_lock(path: Path) -> int:
    try:
        return take_lock(path)
    except BlockingIOError as holder:
        raise PairError(
            f"{path.parent}: {holder} is already writing here. Let it finish, or stop it and run again; "
            "to use several processes or machines, give each its own --shard."
        ) from None
    except OSError as error:
        raise PairError(
            f"{path.parent}: this file system does not support file locks ({error.strerror}), without which two "
            "processes could write here at once. Give an --output on a local disk, or mount it with locks."
        ) from None


def settings_file(journal: Path) -> Path:
    """The file beside a journal that holds the settings its records were made with."""
    return journal.with_name(journal.name + ".settings.json")


def _check_settings(path: Path, settings: dict[str, Any], journal: Path, depends: Callable[[Row], bool]) -> None:
    settings = json.loads(json.dumps(settings))  # tuples read back as lists
    if not path.exists() or not journal.exists() or journal.stat().st_size == 0:
        write_text(path, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise PairError(f"{path}: cannot be read ({error}). Start again in a new --output folder.") from None
    changed = [key for key in sorted({*before, *settings}) if before.get(key) != settings.get(key)]
    if changed and not any(depends(record) for _, record in read_records(journal)):
        journal.replace(journal.with_name(journal.name + ".before"))
        write_text(path, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    elif changed:
        differences = "; ".join(f"{key}: {before.get(key)!r} then, {settings.get(key)!r} now" for key in changed)
        raise PairError(
            f"{journal.parent}: was begun with other settings, says {path.name} ({differences}). "
            "Repeat those settings to continue it, or give a new --output folder."
        )


def _cut_torn_tail(file: int) -> int:
    """Truncate after the last newline; returns the number of bytes that were cut."""
    size = end = os.fstat(file).st_size
    while end > 0:
        start = max(0, end - _TAIL_BLOCK)
        newline = os.pread(file, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        os.ftruncate(file, end)
    return size - end

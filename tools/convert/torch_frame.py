"""Writes and reads a tensor in the format of `torch.save`; a .distcp file is a sequence of such frames.

A frame is an uncompressed zip archive of a pickle (type, shape) and the tensor's bytes. Writing it here needs neither
PyTorch nor a copy of the data. Its length does not depend on the data, so a file can be planned before it is written.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
import zlib
from dataclasses import dataclass
from typing import Any

from spot_megatron.errors import CheckpointError

STORAGES = {"F32": "FloatStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage"}
_KINDS = {storage: kind for kind, storage in STORAGES.items()}


@dataclass(frozen=True)
class Frame:
    """The bytes before and after the data."""

    head: bytes
    tail: bytes


def make_frame(kind: str, shape: tuple[int, ...], num_bytes: int, crc: int) -> Frame:
    """The frame of `num_bytes` bytes of data whose CRC-32 is `crc`."""
    records = [
        ("archive/data.pkl", _tensor_pickle(kind, shape)),
        ("archive/byteorder", b"little"),
        ("archive/version", b"3\n"),
    ]
    head, directory = b"", b""
    for name, content in records:
        header = _zip_header(name, len(content), zlib.crc32(content))
        directory += _directory_entry(name, header, len(head))
        head += header + content
    header = _zip_header("archive/data/0", num_bytes, crc)
    directory += _directory_entry("archive/data/0", header, len(head))
    head += header
    start = len(head) + num_bytes
    count = len(records) + 1
    return Frame(head, directory + struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, count, count, len(directory), start, 0))


def framed_bytes(kind: str, shape: tuple[int, ...], num_bytes: int) -> int:
    frame = make_frame(kind, shape, num_bytes, 0)
    return len(frame.head) + num_bytes + len(frame.tail)


def _zip_header(name: str, length: int, crc: int) -> bytes:
    fields = struct.pack("<IHHHHHIIIHH", 0x04034B50, 20, 0, 0, 0, 0x21, crc, length, length, len(name), 0)
    return fields + name.encode()


def _directory_entry(name: str, header: bytes, offset: int) -> bytes:
    """The central directory repeats the local header's fields."""
    return struct.pack("<IH", 0x02014B50, 20) + header[4:30] + struct.pack("<HHHII", 0, 0, 0, 0, offset) + name.encode()


def _tensor_pickle(kind: str, shape: tuple[int, ...]) -> bytes:
    """The pickle of a contiguous CPU tensor, in the opcodes of protocol 2."""

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value) if value < 1 << 31 else b"\x8a\x08" + struct.pack("<q", value)

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    strides = [1]
    for length in reversed(shape[1:]):
        strides.insert(0, strides[0] * length)
    num_elements = shape[0] * strides[0]
    storage = b"(" + text("storage") + f"ctorch\n{STORAGES[kind]}\n".encode() + text("0") + text("cpu")
    return b"".join(
        [
            b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(",
            storage + number(num_elements) + b"tQ",  # persistent id
            number(0),  # offset in the storage
            b"(" + b"".join(map(number, shape)) + b"t",
            b"(" + b"".join(map(number, strides)) + b"t",
            b"\x89ccollections\nOrderedDict\n)RtR.",  # requires_grad, hooks
        ]
    )


@dataclass(frozen=True)
class Framed:
    """A tensor inside a frame; `offset` is that of its first element in the file."""

    kind: str
    shape: tuple[int, ...]
    offset: int


def read_frame(descriptor: int, offset: int, length: int) -> Framed:
    """Finds the data in a frame of torch.save or of this module, without reading it or unpickling foreign classes.

    Raises:
        CheckpointError: the bytes are not a frame of a contiguous tensor.
    """
    try:
        archive = zipfile.ZipFile(_Slice(descriptor, offset, length))
        (entry,) = (info for info in archive.infolist() if info.filename.endswith("/data/0"))
        (described,) = (info for info in archive.infolist() if info.filename.endswith("/data.pkl"))
        tensor = _TensorUnpickler(io.BytesIO(archive.read(described))).load()
        name_length, extra_length = struct.unpack("<HH", os.pread(descriptor, 4, offset + entry.header_offset + 26))
        kind, shape, first_byte = tensor
        start = offset + entry.header_offset + 30 + name_length + extra_length + first_byte
        return Framed(kind, shape, start)
    except (
        zipfile.BadZipFile,
        pickle.UnpicklingError,
        ValueError,
        TypeError,
        KeyError,
        EOFError,
        struct.error,
    ) as error:
        raise CheckpointError(f"bytes {offset} to {offset + length} are not a tensor ({error})") from None


class _Slice(io.RawIOBase):
    """A byte range of a file, as a file."""

    def __init__(self, descriptor: int, offset: int, length: int) -> None:
        self._descriptor, self._offset, self._length, self._at = descriptor, offset, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = os.pread(self._descriptor, max(min(len(buffer), self._length - self._at), 0), self._offset + self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class _TensorUnpickler(pickle.Unpickler):
    """Accepts only the description of a tensor; load() returns (kind, shape, first byte in the storage)."""

    def persistent_load(self, pid: Any) -> Any:
        return pid[1]

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _KINDS:
            return _KINDS[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _describe
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        raise pickle.UnpicklingError(f"{module}.{name} is not part of a tensor")


def _describe(kind: str, storage_offset: int, shape: Any, strides: Any, *rest: Any) -> tuple[str, tuple[int, ...], int]:
    del rest
    expected = 1
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if stride != expected and length != 1:
            raise ValueError("the tensor is not contiguous")
        expected *= length
    num_bytes = 4 if kind == "F32" else 2
    return kind, tuple(shape), storage_offset * num_bytes

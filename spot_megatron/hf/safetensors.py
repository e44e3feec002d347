"""The safetensors format: which bytes of a file belong to which tensor. Imports neither PyTorch nor Megatron.

A file is 8 bytes of header length (little endian), the header (JSON: name -> dtype, shape, data_offsets), then the
tensors without gaps. https://github.com/huggingface/safetensors (README, "Format")
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spot_megatron.errors import WeightError

KIND_BYTES = {"F32": 4, "F16": 2, "BF16": 2}  # the supported data types, by the format's own names
LARGEST_HEADER = 100_000_000  # bytes; the format's own limit
MOST_DIMENSIONS = 8
LONGEST_NAME = 500


@dataclass(frozen=True)
class Span:
    """The place of a tensor; `offset` is in bytes from the start of the file."""

    file: Path
    kind: str
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        return tensor_bytes(self.kind, self.shape)


def tensor_bytes(kind: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * KIND_BYTES[kind]


def read_header(file: Path) -> dict[str, Span]:
    """Every tensor of a file.

    Raises:
        WeightError: the header does not describe the file exactly, names a tensor twice, or has one that is not a
            float.
    """
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        size = file.stat().st_size
        if size < 8 or length > min(size - 8, LARGEST_HEADER):
            raise _damaged(file, f"{size} bytes cannot hold the header of {length} bytes that it announces")
        text = stream.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise _damaged(file, f"its header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise _damaged(file, "its header is not a JSON object")
    header.pop("__metadata__", None)
    spans = {name: _span(file, 8 + length, name, entry) for name, entry in header.items()}
    end = 8 + length
    for name, span in sorted(spans.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if span.offset != end:
            raise _damaged(file, f"{name} starts at byte {span.offset}, not at {end}")
        end += span.num_bytes
    if end != size:
        raise _damaged(file, f"it has {size} bytes, its header describes {end}")
    return spans


def _span(file: Path, start: int, name: str, entry: Any) -> Span:
    try:
        kind, shape, (first, last) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
        is_valid = len(shape) <= MOST_DIMENSIONS and all(
            type(number) is int and 0 <= number < 1 << 63 for number in (*shape, first, last)
        )
    except (TypeError, KeyError, ValueError):
        is_valid = False
    if not is_valid or not name.isprintable() or len(name) > LONGEST_NAME:
        raise _damaged(file, f"its header does not describe {name[:LONGEST_NAME]!r}")
    if kind not in KIND_BYTES:
        raise WeightError(
            f"{file}: {name} has the data type {kind[:20]!r}; only {', '.join(KIND_BYTES)} are supported. "
            "Dequantize a quantized model first"
        )
    span = Span(file, kind, shape, start + first)
    if span.num_bytes != last - first:
        raise _damaged(file, f"{name} is {kind} {list(shape)}, which is not {last - first} bytes")
    return span


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        (name, _), *_ = (Counter(name for name, _ in pairs)).most_common(1)
        raise ValueError(f"{name[:LONGEST_NAME]!r} occurs twice")
    return content


def _damaged(file: Path, reason: str) -> WeightError:
    with file.open("rb") as stream:
        is_pointer = stream.read(40).startswith(b"version https://git-lfs")
    hint = ": it is a Git LFS pointer, run `git lfs pull` in the folder" if is_pointer else ""
    return WeightError(f"{file} is damaged or cut short ({reason}){hint}; fetch it again")


def make_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[bytes, dict[str, int]]:
    """The header of a file with these tensors (name -> kind, shape), and the offset of each tensor in the file.

    Wide types come first, so that each tensor is aligned; the header is padded to 8 bytes for the same reason.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (kind, shape) in sorted(tensors.items(), key=lambda item: -KIND_BYTES[item[1][0]]):
        first, end = end, end + tensor_bytes(kind, shape)
        entries[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [first, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    offsets = {name: start + entry["data_offsets"][0] for name, entry in entries.items() if name != "__metadata__"}
    return len(text).to_bytes(8, "little") + text, offsets


def plan_shards(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], shard_bytes: int
) -> list[dict[str, tuple[str, tuple[int, ...]]]]:
    """Divides tensors, in their order, into files of at most `shard_bytes`; a larger tensor gets its own file."""
    shards: list[dict[str, tuple[str, tuple[int, ...]]]] = []
    room = 0
    for name, (kind, shape) in tensors.items():
        size = tensor_bytes(kind, shape)
        if not shards or size > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = (kind, shape)
        room -= size
    return shards

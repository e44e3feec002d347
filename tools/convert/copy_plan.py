"""A planned conversion: output files as lists of byte ranges of input files.

Plain data that is sent to the copy processes (copy_files.py). This module imports neither PyTorch nor Megatron.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from spot_megatron.hf.safetensors import KIND_BYTES
from tools.convert.torch_frame import framed_bytes

BATCH_BYTES = 1 << 24  # read, checked and written at a time; a process holds a few batches


@dataclass(frozen=True)
class Stripe:
    """Columns of consecutive rows without gaps: `row_bytes` of each row, from byte `offset` of the file."""

    file: str
    offset: int
    row_bytes: int


@dataclass(frozen=True)
class Rows:
    """Rows of the tensor `name` in the input; the stripes side by side form the whole row."""

    name: str
    kind: str
    num_rows: int
    stripes: tuple[Stripe, ...]

    @property
    def row_bytes(self) -> int:
        return sum(stripe.row_bytes for stripe in self.stripes)

    def cut(self, start: int, stop: int) -> Rows:
        """Rows [start, stop)."""
        stripes = tuple(replace(s, offset=s.offset + start * s.row_bytes) for s in self.stripes)
        return replace(self, num_rows=stop - start, stripes=stripes)


@dataclass(frozen=True)
class Block:
    """A tensor, or a part of one, in an output file: rows in order, cast to `kind`.

    With `frame_shape`, the block is written in the format of torch.save and is at most BATCH_BYTES long.
    """

    kind: str
    rows: tuple[Rows, ...]
    frame_shape: tuple[int, ...] | None = None

    @property
    def data_bytes(self) -> int:
        return sum(r.num_rows * r.row_bytes // KIND_BYTES[r.kind] for r in self.rows) * KIND_BYTES[self.kind]

    @property
    def num_bytes(self) -> int:
        """The length in the file."""
        return framed_bytes(self.kind, self.frame_shape, self.data_bytes) if self.frame_shape else self.data_bytes


@dataclass(frozen=True)
class OutputFile:
    """A file to write: a header, then blocks."""

    name: str
    header: bytes
    blocks: tuple[Block, ...]

    @property
    def num_bytes(self) -> int:
        return len(self.header) + sum(block.num_bytes for block in self.blocks)


@dataclass(frozen=True)
class Written:
    """A finished file, and the names of input tensors in it that hold NaN or infinity."""

    name: str
    num_bytes: int
    sha256: str
    bad_names: tuple[str, ...]


@dataclass(frozen=True)
class Failed:
    """The error for which a file could not be written; `errno` is None if it was not an OSError."""

    message: str
    errno: int | None


def cut_rows(rows: Sequence[Rows], start: int, stop: int) -> tuple[Rows, ...]:
    """Rows [start, stop) of the concatenation."""
    found = []
    for part in rows:
        first, last = max(start, 0), min(stop, part.num_rows)
        if first < last:
            found.append(part.cut(first, last))
        start, stop = start - part.num_rows, stop - part.num_rows
    return tuple(found)


def row_ranges(num_rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Divides rows into ranges of at most BATCH_BYTES, whose lengths differ by at most one."""
    num_ranges = max(1, math.ceil(num_rows / max(1, BATCH_BYTES // row_bytes)))
    for number in range(num_ranges):
        yield num_rows * number // num_ranges, num_rows * (number + 1) // num_ranges


def batches(block: Block) -> Iterator[tuple[Rows, ...]]:
    """The block's rows in batches of at most BATCH_BYTES, both before and after the cast."""
    if block.frame_shape is not None:
        yield block.rows
        return
    batch: list[Rows] = []
    room = BATCH_BYTES
    for rows in block.rows:
        width = max(rows.row_bytes, rows.row_bytes // KIND_BYTES[rows.kind] * KIND_BYTES[block.kind])
        for start, stop in row_ranges(rows.num_rows, width):
            size = (stop - start) * width
            if size > room and batch:
                yield tuple(batch)
                batch, room = [], BATCH_BYTES
            batch.append(rows.cut(start, stop))
            room -= size
    if batch:
        yield tuple(batch)


def plan_digest(files: Sequence[OutputFile]) -> str:
    """A digest that is equal for equal plans."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(repr(file).encode())
    return digest.hexdigest()

"""Output files as lists of byte ranges of input files: what a conversion is, once it is planned.

Plain data, handed to the processes that copy (copy_files.py). Neither PyTorch nor Megatron here.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from spot_megatron.hf.safetensors import KIND_BYTES
from tools.convert.torch_frame import framed_bytes

BATCH_BYTES = 1 << 24  # read, checked and written at a time, so a process holds little more


@dataclass(frozen=True)
class Stripe:
    """Some columns of rows that follow each other without gaps: `row_bytes` of each, from byte `offset` of the file."""

    file: str
    offset: int
    row_bytes: int


@dataclass(frozen=True)
class Rows:
    """Rows of the tensor `name` in the input: stripes beside each other give the whole row."""

    name: str
    kind: str
    num_rows: int
    stripes: tuple[Stripe, ...]

    @property
    def row_bytes(self) -> int:
        return sum(stripe.row_bytes for stripe in self.stripes)

    def cut(self, start: int, stop: int) -> Rows:
        """Rows [start, stop) of these."""
        stripes = tuple(replace(s, offset=s.offset + start * s.row_bytes) for s in self.stripes)
        return replace(self, num_rows=stop - start, stripes=stripes)


@dataclass(frozen=True)
class Block:
    """A tensor, or a part of one, in an output file: rows below each other, cast to `kind`.

    With a `frame_shape` it is framed as torch.save does, and at most BATCH_BYTES long.
    """

    kind: str
    rows: tuple[Rows, ...]
    frame_shape: tuple[int, ...] | None = None

    @property
    def data_bytes(self) -> int:
        return sum(r.num_rows * r.row_bytes // KIND_BYTES[r.kind] for r in self.rows) * KIND_BYTES[self.kind]

    @property
    def num_bytes(self) -> int:
        """Its length in the file."""
        return framed_bytes(self.kind, self.frame_shape, self.data_bytes) if self.frame_shape else self.data_bytes


@dataclass(frozen=True)
class OutputFile:
    """A file to be written: a header, then blocks."""

    name: str
    header: bytes
    blocks: tuple[Block, ...]

    @property
    def num_bytes(self) -> int:
        return len(self.header) + sum(block.num_bytes for block in self.blocks)


@dataclass(frozen=True)
class Written:
    """A finished file, and the input tensors in it that hold NaN."""

    name: str
    num_bytes: int
    sha256: str
    bad_names: tuple[str, ...]


@dataclass(frozen=True)
class Failed:
    """Why a file could not be written; `errno` is None unless the system said so."""

    message: str
    errno: int | None


def cut_rows(rows: Sequence[Rows], start: int, stop: int) -> tuple[Rows, ...]:
    """Rows [start, stop) of all of them together."""
    found = []
    for part in rows:
        first, last = max(start, 0), min(stop, part.num_rows)
        if first < last:
            found.append(part.cut(first, last))
        start, stop = start - part.num_rows, stop - part.num_rows
    return tuple(found)


def row_ranges(num_rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Divides rows into runs of at most BATCH_BYTES, of lengths that differ by one at most."""
    num_runs = max(1, math.ceil(num_rows / max(1, BATCH_BYTES // row_bytes)))
    for run in range(num_runs):
        yield num_rows * run // num_runs, num_rows * (run + 1) // num_runs


def batches(block: Block) -> Iterator[tuple[Rows, ...]]:
    """The block's rows in runs of at most BATCH_BYTES, before and after the cast."""
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
    """Tells whether two plans write the same from the same."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(repr(file).encode())
    return digest.hexdigest()

"""The copy process: reads planned files from stdin, writes them, and sends answers to stdout.

It starts in 0.1 s and holds a few batches for any model. It ends when its parent process ends.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from isal.isal_zlib import crc32

from tools.convert.copy_plan import BATCH_BYTES, Block, Failed, OutputFile, Rows, Written, batches
from tools.convert.float_kinds import cast, has_nonfinite
from tools.convert.torch_frame import make_frame

WRITE_BYTES = 1 << 20  # longer calls took up to four times as much system time


class FileCopier:
    """Writes planned files into a folder."""

    def __init__(self, folder: Path, progress: Callable[[int], None]) -> None:
        """`progress` is called with the number of bytes after each batch."""
        self._folder, self._progress = folder, progress
        self._buffer = np.empty(BATCH_BYTES, dtype=np.uint8)
        self._descriptors: dict[str, int] = {}

    def write(self, file: OutputFile) -> Written:
        """Writes the file under a temporary name and renames it once it is on disk."""
        partial = self._folder / f".{file.name}.{os.getpid()}"
        digest = hashlib.sha256()
        bad_names: set[str] = set()
        try:
            with partial.open("wb", buffering=0) as stream:

                def put(data: bytes | memoryview) -> None:
                    digest.update(data)
                    view = memoryview(data)
                    while view.nbytes:
                        view = view[stream.write(view[:WRITE_BYTES]) :]

                put(file.header)
                for block in file.blocks:
                    self._write_block(block, put, bad_names)
                os.fsync(stream.fileno())
            partial.rename(self._folder / file.name)
        finally:
            partial.unlink(missing_ok=True)
        return Written(file.name, file.num_bytes, digest.hexdigest(), tuple(sorted(bad_names)))

    def _write_block(self, block: Block, put: Callable[[bytes | memoryview], None], bad_names: set[str]) -> None:
        for batch in batches(block):
            end = 0
            for rows in batch:
                data = self._read(rows, end)
                if has_nonfinite(data, rows.kind):
                    bad_names.add(rows.name)
                if rows.kind != block.kind:
                    data = cast(data, rows.kind, block.kind)
                    self._buffer[end : end + len(data)] = data
                end += len(data)
            content = self._buffer[:end].data
            if block.frame_shape is None:
                put(content)
            else:
                frame = make_frame(block.kind, block.frame_shape, end, crc32(content))
                put(frame.head)
                put(content)
                put(frame.tail)
            self._progress(end)

    def _read(self, rows: Rows, start: int) -> np.ndarray:
        """The rows' bytes [n] uint8, in the buffer from `start`."""
        num_bytes = rows.num_rows * rows.row_bytes
        data = self._buffer[start : start + num_bytes]
        if len(rows.stripes) == 1:
            self._fill(rows.stripes[0].file, rows.stripes[0].offset, data)
            return data
        table, column = data.reshape(rows.num_rows, rows.row_bytes), 0
        for stripe in rows.stripes:
            part = np.empty((rows.num_rows, stripe.row_bytes), dtype=np.uint8)
            self._fill(stripe.file, stripe.offset, part.reshape(-1))
            table[:, column : column + stripe.row_bytes] = part
            column += stripe.row_bytes
        return data

    def _fill(self, file: str, offset: int, data: np.ndarray) -> None:
        if file not in self._descriptors:
            self._descriptors[file] = os.open(file, os.O_RDONLY)
        view = data.data
        while view.nbytes:
            count = os.preadv(self._descriptors[file], [view], offset)
            if count == 0:
                raise EOFError(f"{file} ends at byte {offset}: it was truncated while it was read")
            view, offset = view[count:], offset + count


def main() -> None:
    """Reads a pickled folder, then pickled OutputFiles; answers with byte counts, Written and Failed."""
    tasks, answers = sys.stdin.buffer, sys.stdout.buffer

    def answer(content: int | Written | Failed) -> None:
        pickle.dump(content, answers)
        answers.flush()

    copier = FileCopier(pickle.load(tasks), answer)
    while True:
        try:
            file = pickle.load(tasks)
        except EOFError:
            return
        try:
            answer(copier.write(file))
        except EOFError as error:
            answer(Failed(str(error), None))
        except BrokenPipeError:
            return  # the parent process has ended
        except OSError as error:
            answer(Failed(str(error), error.errno))


if __name__ == "__main__":
    main()

"""Reads a Megatron distributed checkpoint ("torch_dist") without a model or process groups.

    __0_0.distcp ...   tensors as torch.save writes them (torch_frame.py), one after the other
    .metadata          a pickle: file, offset and shape of each chunk of each tensor (weights/dist_metadata.py)
    common.pt          everything but tensors; not read here, and Megatron-Core 0.19 does not write it
    metadata.json      the name of the format; written last, so that a folder without it is incomplete

Neither reading nor writing (torch_dist_write.py) imports PyTorch. benchmarks/results/convert_dcp.md compares with
torch.distributed.checkpoint's own reader and writer.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from spot_megatron.errors import CheckpointError
from spot_megatron.hf.safetensors import KIND_BYTES
from spot_megatron.weights.dist_metadata import Chunk, read_metadata
from tools.convert.copy_plan import Rows, Stripe
from tools.convert.torch_frame import Framed, read_frame


class TorchDist:
    """The tensors of a checkpoint folder as byte ranges.

    Raises:
        CheckpointError: the folder is incomplete or damaged.
    """

    def __init__(self, folder: Path) -> None:
        for name in ("metadata.json", ".metadata"):
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder} is not a complete Megatron distributed checkpoint: {name} is missing")
        self.folder = folder
        self.tensors = read_metadata(folder)
        self._descriptors: dict[str, int] = {}
        self._frames: dict[Chunk, Framed] = {}
        self._placed: dict[str, dict[tuple[int, ...], list[Chunk]]] = {}

    def rows(self, key: str, index: tuple[int, ...], start: int, stop: int, shape: tuple[int, ...]) -> Iterator[Rows]:
        """Rows [start, stop) of the matrix or vector of `shape` at `index` of a stacked tensor.

        Raises:
            CheckpointError: it is missing or has another shape (apart from rows that pad the vocabulary).
        """
        stored = self.tensors.get(key)
        if stored is None:
            raise CheckpointError(f"{self.folder} holds another model: it lacks {key}")
        own_shape = stored.shape[len(index) :]
        is_outside = any(number >= length for number, length in zip(index, stored.shape, strict=False))
        if own_shape[1:] != shape[1:] or own_shape[:1] < shape[:1] or is_outside:
            raise CheckpointError(f"{self.folder} holds another model: {key} is {stored.shape}, not {index} of {shape}")
        lead = len(index)
        here = self._chunks(key, lead).get(index, [])
        edges = {start, stop, *(edge for c in here for edge in (c.offsets[lead], c.offsets[lead] + c.sizes[lead]))}
        inside = sorted(edge for edge in edges if start <= edge <= stop)
        for first, last in itertools.pairwise(inside):
            stripes, kind = self._stripes(key, here, lead, first, last, own_shape)
            yield Rows(key, kind, last - first, stripes)

    def _chunks(self, key: str, lead: int) -> dict[tuple[int, ...], list[Chunk]]:
        """The chunks of a stacked tensor by their leading index; a chunk of Megatron has one index."""
        if key not in self._placed:
            found: dict[tuple[int, ...], list[Chunk]] = {}
            for chunk in self.tensors[key].chunks:
                found.setdefault(chunk.offsets[:lead], []).append(chunk)
            self._placed[key] = found
        return self._placed[key]

    def _stripes(
        self, key: str, chunks: Sequence[Chunk], lead: int, first: int, last: int, shape: tuple[int, ...]
    ) -> tuple[tuple[Stripe, ...], str]:
        """The columns of rows [first, last), those of each chunk side by side."""
        covering = [c for c in chunks if c.offsets[lead] <= first and last <= c.offsets[lead] + c.sizes[lead]]
        stripes, kinds, column = [], set(), 0
        for chunk in sorted(covering, key=lambda c: c.offsets[lead + 1 :]):
            frame = self._frame(chunk, key)
            width = chunk.sizes[lead + 1] if len(shape) > 1 else 1
            if len(shape) > 1 and chunk.offsets[lead + 1] != column:
                break
            row_bytes = width * KIND_BYTES[frame.kind]
            offset = frame.offset + (first - chunk.offsets[lead]) * row_bytes
            stripes.append(Stripe(str(self.folder / chunk.file), offset, row_bytes))
            kinds.add(frame.kind)
            column += width
        if column != (shape[1] if len(shape) > 1 else 1) or len(kinds) != 1:
            raise CheckpointError(
                f"{self.folder} is damaged: rows {first} to {last} of {key} are missing or stored twice"
            )
        return tuple(stripes), kinds.pop()

    def _frame(self, chunk: Chunk, key: str) -> Framed:
        if chunk in self._frames:
            return self._frames[chunk]
        path = self.folder / chunk.file
        try:
            if chunk.file not in self._descriptors:
                self._descriptors[chunk.file] = os.open(path, os.O_RDONLY)
            frame = read_frame(self._descriptors[chunk.file], chunk.offset, chunk.length)
        except (OSError, CheckpointError) as error:
            raise CheckpointError(f"{path} is damaged or missing: {error}, where {key} should be") from None
        if frame.shape != chunk.sizes:
            raise CheckpointError(f"{path} is damaged: {key} is {frame.shape} there, not {chunk.sizes}")
        self._frames[chunk] = frame
        return frame

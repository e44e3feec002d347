"""A Megatron distributed checkpoint's folder ("torch_dist"), read and written without a model or process groups.

    __0_0.distcp ...   framed tensors (torch_frame.py), one behind the other
    .metadata          pickle: which chunk of which tensor is where
    common.pt          what is no tensor; not read here, and Megatron-Core 0.19 writes none
    metadata.json      the format's name; written last, so that a folder without it is incomplete

Neither reading nor writing needs PyTorch: a foreign pickle is opened without any class of it, so that nothing in it can
run, and ours is written by torch_dist_write.py.
"""

from __future__ import annotations

import io
import itertools
import os
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spot_megatron.errors import CheckpointError
from spot_megatron.hf.safetensors import KIND_BYTES
from tools.convert.copy_plan import Rows, Stripe
from tools.convert.torch_frame import Framed, read_frame


@dataclass(frozen=True)
class Chunk:
    """A rectangle of a tensor and the frame in which it lies."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint: its whole shape, its type as PyTorch names it, and its chunks."""

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[Chunk, ...]


_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class TorchDist:
    """The tensors of a checkpoint folder, as ranges of bytes.

    Raises:
        CheckpointError: the folder is incomplete or damaged.
    """

    def __init__(self, folder: Path) -> None:
        for name in ("metadata.json", ".metadata"):
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder} is no complete Megatron distributed checkpoint: {name} is missing")
        self.folder = folder
        self.tensors = _read_metadata(folder / ".metadata")
        self._descriptors: dict[str, int] = {}
        self._frames: dict[Chunk, Framed] = {}
        self._placed: dict[str, dict[tuple[int, ...], list[Chunk]]] = {}

    def rows(self, key: str, index: tuple[int, ...], start: int, stop: int, shape: tuple[int, ...]) -> Iterator[Rows]:
        """Rows [start, stop) of the matrix or vector of `shape` at `index` of a stacked tensor.

        Raises:
            CheckpointError: it is not there, or of another shape (but for rows that pad the vocabulary).
        """
        stored = self.tensors.get(key)
        if stored is None:
            raise CheckpointError(f"{self.folder} holds another model: it has no {key}")
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
        """The chunks of a stacked tensor by their leading index; Megatron never has two indices in one chunk."""
        if key not in self._placed:
            found: dict[tuple[int, ...], list[Chunk]] = {}
            for chunk in self.tensors[key].chunks:
                found.setdefault(chunk.offsets[:lead], []).append(chunk)
            self._placed[key] = found
        return self._placed[key]

    def _stripes(
        self, key: str, chunks: Sequence[Chunk], lead: int, first: int, last: int, shape: tuple[int, ...]
    ) -> tuple[tuple[Stripe, ...], str]:
        """The columns of rows [first, last), each chunk's beside the next."""
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
            raise CheckpointError(f"{self.folder} is damaged: rows {first} to {last} of {key} are not there once")
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


def _read_metadata(file: Path) -> dict[str, Stored]:
    try:
        content = _Unpickler(io.BytesIO(file.read_bytes())).load()
        places = {
            (index.fqn, tuple(index.offset)): info
            for index, info in content.storage_data.items()
            if getattr(index, "offset", None) is not None  # else an object's, not a tensor's
        }
        tensors = {}
        for key, entry in content.state_dict_metadata.items():
            if not hasattr(entry, "chunks"):
                continue
            chunks = []
            for chunk in entry.chunks:
                info = places[key, tuple(chunk.offsets)]
                offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
                chunks.append(Chunk(offsets, sizes, info.relative_path, info.offset, info.length))
            tensors[key] = Stored(tuple(entry.size), entry.properties.dtype_name, tuple(chunks))
        return tensors
    except (pickle.UnpicklingError, AttributeError, KeyError, EOFError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(f"{file} is damaged: {type(error).__name__} {error}") from None


class _Record:
    """Stands in for every class of the pickle: holds its state, runs nothing."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.__dict__.update(part)
            else:
                self.state = state

    @property
    def dtype_name(self) -> str:
        """The type of a TensorProperties, whose state is a tuple with the type first."""
        return str(self.state[0])


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("torch", "Size"), ("builtins", "tuple")):
            return tuple
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        return _Record

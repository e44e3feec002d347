"""The .metadata file of a Megatron distributed checkpoint (torch_dist), read without running anything in it.

PyTorch's FileSystemReader unpickles the file without restrictions. `read_metadata` builds plain records instead, and
`check_metadata` accepts only files that PyTorch can unpickle safely. This module imports neither PyTorch nor Megatron.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spot_megatron.errors import CheckpointError

METADATA = ".metadata"
_KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_DTYPES = {*_KINDS, "float64", "uint8", "int8", "int16", "int32", "int64", "bool", "float8_e4m3fn", "float8_e5m2"}

# (module, name) of each class and function that Megatron-Core and PyTorch write; none of them has a side effect.
_DCP = "torch.distributed.checkpoint"
_SAFE = {
    *((f"{_DCP}.metadata", name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    *((f"{_DCP}.metadata", f"{kind}StorageMetadata") for kind in ("Tensor", "Bytes", "Chunk")),
    (f"{_DCP}.metadata", "TensorProperties"),
    *((f"{_DCP}.filesystem", name) for name in ("_StorageInfo", "_StoragePrefix")),
    *((f"{_DCP}.planner", name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
    *(("megatron.core.dist_checkpointing.strategies.torch", name) for name in ("MCoreMetadata", "MCoreSavePlan")),
    ("torch.serialization", "_get_layout"),
    *(("torch", name) for name in ("Size", "strided", *_DTYPES)),
    ("collections", "OrderedDict"),
    *(("pathlib", name) for name in ("Path", "PosixPath")),
    ("pathlib._local", "PosixPath"),
}

# What damaged bytes raise in pickle, and in code that reads the records.
_PICKLE_ERRORS = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RecursionError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Chunk:
    """A rectangle of a tensor, and the bytes of the file that hold it as `torch.save` writes it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint: its whole shape, its data type's safetensors name, and its chunks."""

    shape: tuple[int, ...]
    kind: str
    chunks: tuple[Chunk, ...]


def check_metadata(folder: Path) -> None:
    """Checks `folder`/.metadata before PyTorch unpickles it.

    Raises:
        CheckpointError: it is damaged, could run foreign code, or names a file outside the folder.
    """
    content, names = _unpickle(folder / METADATA)
    for module, name in sorted(names - _SAFE):
        raise CheckpointError(
            f"{folder / METADATA} refers to {module}.{name}, which is not part of a checkpoint: the file may be "
            "damaged or may run code when it is loaded; use another copy of the checkpoint"
        )
    try:
        for info in content.storage_data.values():
            _check_file(info.relative_path)
    except _PICKLE_ERRORS as error:
        raise _damaged(folder / METADATA, error) from None


def read_metadata(folder: Path) -> dict[str, Stored]:
    """The floating-point tensors of a checkpoint by key.

    Raises:
        CheckpointError: `folder`/.metadata is damaged, or names a file outside the folder.
    """
    file = folder / METADATA
    content, _ = _unpickle(file)
    try:
        places = {
            (index.fqn, tuple(index.offset)): info
            for index, info in content.storage_data.items()
            if getattr(index, "offset", None) is not None  # otherwise an object, not a tensor
        }
        tensors = {}
        for key, entry in content.state_dict_metadata.items():
            if not hasattr(entry, "chunks") or entry.properties.dtype_name not in _KINDS.values():
                continue
            chunks = tuple(_chunk(chunk, places[key, tuple(chunk.offsets)]) for chunk in entry.chunks)
            tensors[str(key)] = Stored(_numbers(entry.size), entry.properties.dtype_name, chunks)
        return tensors
    except _PICKLE_ERRORS as error:
        raise _damaged(file, error) from None


def _chunk(chunk: Any, info: Any) -> Chunk:
    offset, length = _numbers((info.offset, info.length))
    return Chunk(_numbers(chunk.offsets), _numbers(chunk.sizes), _check_file(info.relative_path), offset, length)


def _check_file(file: str) -> str:
    """Raises ValueError for a file outside the checkpoint's folder."""
    if Path(file).name != file or not file.endswith(".distcp"):
        raise ValueError(f"the path {file!r} does not name a .distcp file of the folder")
    return file


def _numbers(values: Any) -> tuple[int, ...]:
    """Raises ValueError for sizes or offsets that no checkpoint has."""
    if not all(type(value) is int and 0 <= value < 1 << 63 for value in values):
        raise ValueError(f"{values!r} are not sizes or offsets")
    return tuple(values)


def _unpickle(file: Path) -> tuple[Any, set[tuple[str, str]]]:
    """The content as records, and every global name that it refers to."""
    try:
        data = file.read_bytes()
        for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            # genops checks lengths; an index into the memo makes pickle allocate up to it.
            if opcode.name.endswith("PUT") and (argument or 0) > number:
                raise pickle.UnpicklingError(f"the memo index {argument} is out of range")
        unpickler = _Unpickler(io.BytesIO(data))
        return unpickler.load(), unpickler.names
    except _PICKLE_ERRORS as error:
        raise _damaged(file, error) from None


def _damaged(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{file} is damaged ({type(error).__name__}: {str(error)[:200]}); use another checkpoint")


class _Record:
    """Replaces every class of the pickle: holds its state and runs nothing."""

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
        """The data type of a TensorProperties, whose state is a tuple that starts with it."""
        return str(self.state[0])


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self.names: set[tuple[str, str]] = set()

    def find_class(self, module: str, name: str) -> Any:
        self.names.add((module, name))
        if (module, name) in (("torch", "Size"), ("builtins", "tuple")):
            return tuple
        if module == "torch" and name in _KINDS:
            return _KINDS[name]
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        return _Record

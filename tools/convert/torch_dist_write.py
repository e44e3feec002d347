"""Completes a folder of .distcp files to a Megatron distributed checkpoint (see torch_dist.py), without PyTorch.

The pickles hold the opcodes that PyTorch itself would write. Importing PyTorch would take more memory and CPU time than
the rest of a conversion.
"""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spot_megatron.weights.dist_metadata import Stored

FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Name:
    """A global object, pickled by name."""

    module: str
    name: str


@dataclass(frozen=True)
class Call:
    """The result of calling `function` with `arguments`."""

    function: Name
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Made:
    """An instance of a class that is made from its state, without a call of __init__."""

    kind: Name
    state: Any


def write_metadata(folder: Path, tensors: Mapping[str, Stored], content: Mapping[str, int]) -> None:
    """Writes the files that describe the .distcp files; `content` is the content metadata that load_model compares."""
    dcp, places = (
        "torch.distributed.checkpoint.metadata",
        Name("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    )
    chunk_kind, index_kind = Name(dcp, "ChunkStorageMetadata"), Name(dcp, "MetadataIndex")
    memory_format = Call(Name(dcp, "_MEM_FORMAT_ENCODING"), (0,))
    entries: dict[str, Any] = {}
    stored_at: list[tuple[Any, Any]] = []
    for key, stored in tensors.items():
        properties = (Name("torch", DTYPES[stored.kind]), Name("torch", "strided"), False, memory_format, False)
        chunks = [Made(chunk_kind, {"offsets": _size(c.offsets), "sizes": _size(c.sizes)}) for c in stored.chunks]
        state = {"properties": Made(Name(dcp, "TensorProperties"), properties), "size": _size(stored.shape)}
        entries[key] = Made(Name(dcp, "TensorStorageMetadata"), {**state, "chunks": chunks})
        for chunk in stored.chunks:
            index = Made(index_kind, {"fqn": key, "offset": _size(chunk.offsets), "index": None})
            place = {"relative_path": chunk.file, "offset": chunk.offset, "length": chunk.length}
            stored_at.append((index, Made(places, place)))
    metadata = {"state_dict_metadata": entries, "planner_data": None, "storage_data": Pairs(stored_at)}
    with (folder / ".metadata").open("wb") as stream:
        stream.write(pickled(Made(Name(dcp, "Metadata"), {**metadata, "storage_meta": None})))
    with zipfile.ZipFile(folder / "common.pt", "w") as archive:  # as torch.save writes an object without tensors
        archive.writestr("common/data.pkl", pickled({"content_metadata": dict(content)}))
        archive.writestr("common/byteorder", "little")
        archive.writestr("common/version", "3\n")
    (folder / "metadata.json").write_text(json.dumps(FORMAT))


@dataclass(frozen=True)
class Pairs:
    """A dictionary whose keys are not hashable in this process."""

    items: list[tuple[Any, Any]]


def _size(lengths: tuple[int, ...]) -> Call:
    return Call(Name("torch", "Size"), (lengths,))


def pickled(value: Any) -> bytes:
    """The value as a pickle of protocol 2."""
    parts = [pickle.PROTO, b"\x02"]
    _emit(value, parts)
    return b"".join([*parts, pickle.STOP])


def _emit(value: Any, parts: list[bytes]) -> None:
    if value is None or isinstance(value, bool):
        parts.append({None: pickle.NONE, True: pickle.NEWTRUE, False: pickle.NEWFALSE}[value])
    elif isinstance(value, int):
        parts.append(pickle.LONG1 + b"\x08" + struct.pack("<q", value))
    elif isinstance(value, str):
        text = value.encode()
        parts.append(pickle.BINUNICODE + struct.pack("<I", len(text)) + text)
    elif isinstance(value, tuple):
        _emit_all(value, parts, pickle.TUPLE)
    elif isinstance(value, list):
        parts.append(pickle.EMPTY_LIST)
        _emit_all(value, parts, pickle.APPENDS)
    elif isinstance(value, dict | Pairs):
        items = value.items if isinstance(value, Pairs) else value.items()
        parts.append(pickle.EMPTY_DICT)
        _emit_all([part for item in items for part in item], parts, pickle.SETITEMS)
    elif isinstance(value, Name):
        parts.append(pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode())
    elif isinstance(value, Call):
        _emit(value.function, parts)
        _emit(value.arguments, parts)
        parts.append(pickle.REDUCE)
    else:
        assert isinstance(value, Made), value
        _emit(value.kind, parts)
        parts.append(pickle.EMPTY_TUPLE + pickle.NEWOBJ)
        _emit(value.state, parts)
        parts.append(pickle.BUILD)


def _emit_all(values: Any, parts: list[bytes], end: bytes) -> None:
    parts.append(pickle.MARK)
    for value in values:
        _emit(value, parts)
    parts.append(end)

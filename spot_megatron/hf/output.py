"""Writing a Hugging Face model folder: shards, index, and the other files of the source.

All files are written into a hidden folder next to the destination, which is renamed once it is on disk, so that a
folder at the destination is complete. Several processes may write shards; one of them calls start_partial and publish.
This module imports neither PyTorch nor Megatron.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from spot_megatron.errors import WeightError
from spot_megatron.files import BLOCK_BYTES, sync_to_disk, write_text
from spot_megatron.hf.checksums import CHECKSUMS
from spot_megatron.hf.index import INDEX_FILE, SINGLE_FILE
from spot_megatron.hf.safetensors import make_header, plan_shards, read_header, tensor_bytes

# Weights in any format are not copied: they would not match the new weights.
WEIGHT_PATTERNS = (
    CHECKSUMS,
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model*.bin.index.json",
    "consolidated*.pth",
    "*.gguf",
    "tf_model*.h5",
    "flax_model*.msgpack",
)
SKIPPED_FOLDERS = (".git", ".cache")  # the download tools' own state


class ShardWriter:
    """Writes `prefix`-00001.safetensors, ... into `folder`, each of at most `shard_bytes` bytes of tensors.

    A larger tensor gets its own file. `tensors` (name -> kind, shape) lists all tensors, in the order in which they
    fill the files; they may be written in any order. finish_shards() then renames the files.
    """

    def __init__(
        self, folder: Path, prefix: str, tensors: Mapping[str, tuple[str, tuple[int, ...]]], shard_bytes: int
    ) -> None:
        self._descriptors: list[int] = []
        self._waiting: dict[str, tuple[int, int, int]] = {}  # name -> descriptor, offset, number of bytes
        for number, shard in enumerate(plan_shards(tensors, shard_bytes), start=1):
            header, offsets = make_header(shard)
            path = folder / f"{prefix}-{number:05d}.safetensors"
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            self._descriptors.append(descriptor)
            _write_at(descriptor, memoryview(header), 0)
            for name, offset in offsets.items():
                self._waiting[name] = (descriptor, offset, tensor_bytes(*shard[name]))

    def write(self, name: str, data: memoryview) -> None:
        """Writes a tensor's bytes to their place in the file. Call it once for each tensor."""
        descriptor, offset, num_bytes = self._waiting.pop(name)
        assert data.nbytes == num_bytes, f"{name} has {data.nbytes} bytes, not {num_bytes}"
        _write_at(descriptor, data, offset)

    def close(self) -> None:
        """Blocks until all shards are on disk."""
        assert not self._waiting, f"not exported: {sorted(self._waiting)[:8]}"
        for descriptor in self._descriptors:
            os.fsync(descriptor)
            os.close(descriptor)


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    while data.nbytes:  # one call writes at most 2 GiB
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def finish_shards(folder: Path, expected: Iterable[str]) -> None:
    """Gives the shards in `folder` their final names and writes the index, unless one file holds everything.

    Raises:
        WeightError: an `expected` tensor is missing, because a rank wrote to another file system.
    """
    shards = sorted(folder.glob("*.safetensors"))
    weight_map: dict[str, str] = {}
    total_size = 0
    for number, shard in enumerate(shards, start=1):
        final = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else SINGLE_FILE
        spans = read_header(shard)
        assert not weight_map.keys() & spans, f"two ranks exported {sorted(weight_map.keys() & spans)}"
        weight_map.update(dict.fromkeys(spans, final))
        total_size += sum(span.num_bytes for span in spans.values())
        shard.rename(folder / final)
    _check_complete(folder, expected, weight_map)
    if len(shards) > 1:
        write_index(folder, weight_map, total_size)


def join_shards(folder: Path, name: str, expected: Iterable[str]) -> None:
    """Puts the tensors of the shards in `folder` into one file, `name`, and removes the shards.

    Raises:
        WeightError: an `expected` tensor is missing, because a rank wrote to another file system.
    """
    shards = sorted(folder.glob("*.safetensors"))
    spans = {tensor: span for shard in shards for tensor, span in read_header(shard).items()}
    _check_complete(folder, expected, spans)
    header, offsets = make_header({tensor: (span.kind, span.shape) for tensor, span in spans.items()})
    with (folder / name).open("wb") as joined:
        joined.write(header)
        for tensor, span in spans.items():
            with span.file.open("rb") as shard:
                shard.seek(span.offset)
                joined.seek(offsets[tensor])
                for start in range(0, span.num_bytes, BLOCK_BYTES):
                    joined.write(shard.read(min(BLOCK_BYTES, span.num_bytes - start)))
    sync_to_disk(folder / name)
    for shard_file in shards:
        shard_file.unlink()


def _check_complete(folder: Path, expected: Iterable[str], found: Iterable[str]) -> None:
    missing = sorted(set(expected) - set(found))
    if missing:
        raise WeightError(
            f"{folder} lacks {len(missing)} tensors, the first is {missing[0]}: all machines of the run must "
            "see the same output folder; put it on a shared file system"
        )


def write_index(folder: Path, weight_map: Mapping[str, str], total_size: int) -> None:
    """Writes the index of a folder of several shards: tensor -> file, and the total size in bytes."""
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    write_text(folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")


def copy_other_files(source: Path, destination: Path) -> None:
    """Copies all files of a model folder and its subfolders except weights, byte for byte."""
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        is_weight = any(fnmatch(path.name, pattern) for pattern in WEIGHT_PATTERNS)
        if not path.is_file() or is_weight or relative.parts[0] in SKIPPED_FOLDERS:
            continue
        target = destination / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        sync_to_disk(target)


def add_older_keys(config_file: Path) -> None:
    """Adds the keys that transformers 4 reads to a config.json of transformers 5, which uses newer names.

    Version 4, and servers built on it, would silently use defaults: a `rope_theta` of 10000, no rotary scaling, 128
    experts. Version 5 reads both forms. A file that has the keys is left unchanged, byte for byte.
    """
    raw = json.loads(config_file.read_text())
    rope = dict(raw.get("rope_parameters") or {})
    older: dict[str, Any] = {}
    if "rope_theta" in rope:
        older["rope_theta"] = rope.pop("rope_theta")
        if rope.get("rope_type", "default") != "default":
            older["rope_scaling"] = rope
    if "num_local_experts" in raw:
        older["num_experts"] = raw["num_local_experts"]
    if older.keys() <= raw.keys():
        return
    write_text(config_file, json.dumps({**older, **raw}, indent=2) + "\n")


def name_dtype(config_file: Path, dtype: str) -> None:
    """Sets the data type that transformers loads the weights in: `dtype`, or `torch_dtype` as version 4 wrote it."""
    raw = json.loads(config_file.read_text())
    keys = [key for key in ("dtype", "torch_dtype") if key in raw] or ["dtype", "torch_dtype"]
    write_text(config_file, json.dumps({**raw, **dict.fromkeys(keys, dtype)}, indent=2) + "\n")


def refuse_destination(destination: Path, source: Path, replace: bool = False) -> None:
    """Raises WeightError if a folder cannot be published at `destination`."""
    is_empty = destination.is_dir() and not any(destination.iterdir())
    if destination.exists() and not is_empty and not replace:
        raise WeightError(f"{destination} exists already; remove it or name another folder")
    if destination.is_mount():
        raise WeightError(f"{destination} is a mount point, which cannot be renamed to; name a folder inside it")
    if source.absolute() in (destination, *destination.parents):
        raise WeightError(f"{destination} lies inside {source}, which is read; name a folder outside of it")


def partial_folder(destination: Path) -> Path:
    """The folder in which `destination` is written before it is published."""
    return destination.parent / f".{destination.name}.partial"


def start_partial(destination: Path) -> Path:
    """Creates an empty partial_folder; removes the files of an interrupted attempt."""
    partial = partial_folder(destination)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def publish(destination: Path) -> None:
    """Renames partial_folder(destination) to `destination`, replacing a folder there."""
    partial = partial_folder(destination)
    sync_to_disk(partial)
    replaced = destination.parent / f".{destination.name}.replaced"
    shutil.rmtree(replaced, ignore_errors=True)
    if destination.exists():
        destination.rename(replaced)
    partial.rename(destination)
    sync_to_disk(destination.parent)
    shutil.rmtree(replaced, ignore_errors=True)

"""Hugging Face folder -> Megatron checkpoint -> Hugging Face folder, file to file.

A conversion builds no model and starts no process group: it is a list of byte ranges (merged_rows.py), copied by
several processes (copy_files.py) that hold a few batches each, so memory does not grow with the model.
"""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from spot_megatron.errors import CheckpointError
from spot_megatron.hf.checksums import file_names, sums_of, verify_checksums, verify_weights, write_checksums
from spot_megatron.hf.config import HFModelConfig, read_hf_config
from spot_megatron.hf.index import SINGLE_FILE, HFIndex, check_folder
from spot_megatron.hf.names import EMBEDDING, ParameterMapping, weight_map
from spot_megatron.hf.output import (
    add_older_keys,
    copy_other_files,
    partial_folder,
    publish,
    refuse_destination,
    write_index,
)
from spot_megatron.hf.safetensors import KIND_BYTES, Span, make_header, plan_shards
from spot_megatron.hf.side_files import HF_FOLDER, load_kinds, save_side_files
from spot_megatron.weights.dist_metadata import Chunk, Stored
from tools.convert.copy_files import JOURNAL, copy_files
from tools.convert.copy_plan import Block, OutputFile, Rows, Stripe, Written, cut_rows, row_ranges
from tools.convert.float_kinds import widest
from tools.convert.merged_rows import checkpoint_place, merged_rows, merged_shape, stack_shape
from tools.convert.torch_dist import TorchDist
from tools.convert.torch_dist_write import write_metadata

MODEL_FOLDER = "model"
CHECKPOINT_FILE_BYTES = 1 << 29  # of a .distcp file: small, so that little is lost when a process is killed


def import_folder(source: Path, output: Path, num_workers: int = 2) -> int:
    """Writes a Megatron checkpoint of a Hugging Face folder, with the files that an export back needs.

    A call with the same arguments resumes an import that was killed.

    Returns:
        The number of tensors.

    Raises:
        WeightError: the folder cannot be read or is damaged, or `output` cannot be written.
    """
    source, output = source.absolute(), output.absolute()
    config, hf = read_hf_config(source), HFIndex(source)
    check_folder(hf, config)
    refuse_destination(output, source)
    verify_weights(source, num_workers)
    files, tensors = plan_import(hf, config)
    partial = partial_folder(output)
    for path in partial.iterdir() if partial.is_dir() else ():
        if path.name != MODEL_FOLDER:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (partial / MODEL_FOLDER).mkdir(parents=True, exist_ok=True)
    written = copy_files(files, partial / MODEL_FOLDER, num_workers)
    save_side_files(source, partial)
    write_metadata(partial / MODEL_FOLDER, tensors, {"vocab_size": config.vocab_size})
    _finish(partial, written, f"{MODEL_FOLDER}/", source)
    publish(output)
    return len(hf.spans)


def export_checkpoint(checkpoint: Path, output: Path, shard_gb: float, num_workers: int = 2) -> int:
    """Writes the Hugging Face folder of a checkpoint of import_folder or of a run.

    Returns:
        The number of tensors.

    Raises:
        CheckpointError: the checkpoint is incomplete or damaged.
        WeightError: `output` cannot be written.
    """
    checkpoint, output = checkpoint.absolute(), output.absolute()
    verify_checksums(checkpoint, CheckpointError, num_workers)
    kinds, side_files = load_kinds(checkpoint), checkpoint / HF_FOLDER
    config = read_hf_config(side_files)
    refuse_destination(output, checkpoint)
    files, weight_map = plan_export(TorchDist(checkpoint / MODEL_FOLDER), config, kinds, int(shard_gb * 1e9))
    partial = partial_folder(output)
    partial.mkdir(parents=True, exist_ok=True)
    written = copy_files(files, partial, num_workers)
    copy_other_files(side_files, partial)
    add_older_keys(partial / "config.json")
    if len(files) > 1:
        write_index(partial, weight_map, sum(file.num_bytes - len(file.header) for file in files))
    _finish(partial, written, "", checkpoint)
    publish(output)
    return len(weight_map)


def _finish(partial: Path, written: Sequence[Written], prefix: str, source: Path) -> None:
    """Writes the checksums of all files, and warns of weights that are not finite."""
    bad_names = sorted({name for file in written for name in file.bad_names})
    if bad_names:
        warnings.warn(f"{source}: NaN or infinity in the weights {', '.join(bad_names)}", stacklevel=3)
    for journal in partial.rglob(JOURNAL):
        journal.unlink()
    sums = {prefix + file.name: file.sha256 for file in written}
    others = [name for name in file_names(partial) if name not in sums]
    write_checksums(partial, sums | sums_of(partial, others))


@dataclass(frozen=True)
class _Place:
    """One Megatron parameter of one layer and expert."""

    mapping: ParameterMapping
    layer: int
    expert: int


def _places(config: HFModelConfig) -> list[_Place]:
    """All parameters, layer by layer, in the order of most folders."""
    places = [
        _Place(mapping, *instance)
        for mapping in weight_map(config)
        if mapping.exported
        for instance in mapping.instances()
    ]
    return sorted(places, key=lambda place: _depth(place, config))


def _depth(place: _Place, config: HFModelConfig) -> int:
    if place.mapping.layers is not None:
        return place.layer
    return -1 if place.mapping.hf == (EMBEDDING,) else config.num_layers


def plan_import(hf: HFIndex, config: HFModelConfig) -> tuple[list[OutputFile], dict[str, Stored]]:
    """The files of the checkpoint and the tensors in them."""
    kinds: dict[str, set[str]] = {}
    for place in _places(config):
        key, _ = checkpoint_place(place.mapping, config, place.layer, place.expert)
        names = place.mapping.hf_names(place.layer, place.expert)
        kinds.setdefault(key, set()).update(hf.spans[name].kind for name in names)
    blocks: list[list[Block]] = [[]]
    chunks: dict[str, list[Chunk]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    end = 0
    for place in _places(config):
        key, index = checkpoint_place(place.mapping, config, place.layer, place.expert)
        shape, lead = merged_shape(place.mapping), (1,) * len(index)
        shapes[key] = (*stack_shape(place.mapping, config), *shape)
        rows = _merged_rows(place, hf, config)
        kind = widest(kinds[key])
        for start, stop in row_ranges(shape[0], math.prod(shape[1:]) * KIND_BYTES[kind]):
            sizes = (*lead, stop - start, *shape[1:])
            block = Block(kind, cut_rows(rows, start, stop), frame_shape=sizes)
            if end + block.num_bytes > CHECKPOINT_FILE_BYTES and blocks[-1]:
                blocks.append([])
                end = 0
            offsets = (*index, start, *(0 for _ in shape[1:]))
            chunk = Chunk(offsets, sizes, _distcp_name(len(blocks) - 1), end, block.num_bytes)
            chunks.setdefault(key, []).append(chunk)
            blocks[-1].append(block)
            end += block.num_bytes
    files = [OutputFile(_distcp_name(number), b"", tuple(content)) for number, content in enumerate(blocks)]
    return files, {key: Stored(shapes[key], widest(kinds[key]), tuple(found)) for key, found in chunks.items()}


def _distcp_name(number: int) -> str:
    return f"__{number}_0.distcp"


def _merged_rows(place: _Place, hf: HFIndex, config: HFModelConfig) -> list[Rows]:
    """The rows of the merged matrix in order, with their places in the Hugging Face files."""
    names = place.mapping.hf_names(place.layer, place.expert)
    wholes = [_all_rows(name, hf.spans[name]) for name in names]
    return [
        wholes[rows.tensor].cut(rows.tensor_row, rows.tensor_row + rows.num_rows)
        for rows in merged_rows(place.mapping, config)
    ]


def _all_rows(name: str, span: Span) -> Rows:
    row_bytes = math.prod(span.shape[1:]) * KIND_BYTES[span.kind]
    return Rows(name, span.kind, span.shape[0], (Stripe(str(span.file), span.offset, row_bytes),))


def plan_export(
    checkpoint: TorchDist, config: HFModelConfig, kinds: Mapping[str, str], shard_bytes: int
) -> tuple[list[OutputFile], dict[str, str]]:
    """The safetensors files, and the file of each tensor."""
    contents = {
        name: (shape, rows) for place in _places(config) for name, shape, rows in _hf_rows(place, checkpoint, config)
    }
    missing = contents.keys() - kinds.keys()
    if missing:
        raise CheckpointError(
            f"{checkpoint.folder.parent}: hf_dtypes.json lacks {min(missing)}; it belongs to another model"
        )
    shards = plan_shards({name: (kinds[name], shape) for name, (shape, _) in contents.items()}, shard_bytes)
    files, weight_map = [], {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else SINGLE_FILE
        header, offsets = make_header(shard)
        in_order = sorted(shard, key=offsets.__getitem__)
        blocks = tuple(Block(kinds[name], contents[name][1]) for name in in_order)
        files.append(OutputFile(file_name, header, blocks))
        weight_map.update(dict.fromkeys(shard, file_name))
    return files, weight_map


def _hf_rows(
    place: _Place, checkpoint: TorchDist, config: HFModelConfig
) -> Iterator[tuple[str, tuple[int, ...], tuple[Rows, ...]]]:
    """Name, shape and rows of each Hugging Face tensor in a parameter, with their places in the checkpoint."""
    key, index = checkpoint_place(place.mapping, config, place.layer, place.expert)
    merged = merged_shape(place.mapping)
    found = list(merged_rows(place.mapping, config))
    for tensor, name in enumerate(place.mapping.hf_names(place.layer, place.expert)):
        rows = tuple(
            replace(piece, name=name)
            for run in found
            if run.tensor == tensor
            for piece in checkpoint.rows(key, index, run.merged_row, run.merged_row + run.num_rows, merged)
        )
        yield name, place.mapping.shapes[tensor], rows

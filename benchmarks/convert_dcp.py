"""`python -m benchmarks.convert_dcp`: tools.convert against torch.distributed.checkpoint (DCP) doing the same work.

Import: a SavePlanner that cuts the merged matrices into items of at most 16 MB, read from memory-mapped safetensors,
and DCP's FileSystemWriter. Export: DCP's FileSystemReader, whose LoadPlanner hands out views of memory-mapped
safetensors files. Both write SHA256SUMS and search for NaN, as tools.convert does.
Prints a Markdown table, and checks that the folder comes back bit for bit. The last rows export a checkpoint whose
matrices are one chunk each, as a run with parallel.tensor=1 writes them, with the embedding of Qwen3-8B.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

THREADS = 2


def dcp_import(source: Path, output: Path, whole_matrices: bool = False) -> None:
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )
    from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

    from spot_megatron.hf.config import read_hf_config
    from spot_megatron.hf.folder import HFFolder
    from spot_megatron.hf.output import partial_folder, publish
    from spot_megatron.hf.side_files import save_side_files
    from tools.convert.convert import _places
    from tools.convert.copy_plan import row_ranges
    from tools.convert.merged_rows import checkpoint_place, merged_rows, merged_shape, stack_shape

    torch.set_num_threads(1)
    hf, config = HFFolder(source), read_hf_config(source)

    class Planner(dcp.DefaultSavePlanner):
        def create_local_plan(self) -> SavePlan:
            self.items, self.parts, tensors = [], {}, {}
            for place in _places(config):
                key, index = checkpoint_place(place.mapping, config, place.layer, place.expert)
                shape, lead = merged_shape(place.mapping), (1,) * len(index)
                names = place.mapping.hf_names(place.layer, place.expert)
                dtype = hf.dtype(names[0])
                size = torch.Size((*stack_shape(place.mapping, config), *shape))
                properties = TensorProperties(dtype=dtype)
                stored = tensors.setdefault(key, TensorStorageMetadata(properties, size, []))
                found = [
                    (s.merged_row, s.num_rows, names[s.tensor], s.tensor_row)
                    for s in merged_rows(place.mapping, config)
                ]
                row_bytes = torch.Size(shape[1:]).numel() * dtype.itemsize
                ranges = [(0, shape[0])] if whole_matrices else row_ranges(shape[0], row_bytes)
                for start, stop in ranges:
                    offsets = torch.Size((*index, start, *(0 for _ in shape[1:])))
                    chunk = ChunkStorageMetadata(offsets, torch.Size((*lead, stop - start, *shape[1:])))
                    stored.chunks.append(chunk)
                    where = MetadataIndex(key, offsets)
                    data = TensorWriteData(chunk, properties, size)
                    self.items.append(WriteItem(where, WriteItemType.SHARD, tensor_data=data))
                    cuts = [
                        (name, row + max(start - first, 0), row + min(stop - first, count))
                        for first, count, name, row in found
                        if first < stop and start < first + count
                    ]
                    self.parts[where] = (lead, cuts)
            self.plan, self.metadata = SavePlan(self.items), Metadata(tensors)
            return self.plan

        def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
            return all_plans, self.metadata

        def finish_plan(self, new_plan: SavePlan) -> SavePlan:
            return new_plan

        def resolve_data(self, write_item: WriteItem) -> Any:
            lead, cuts = self.parts[write_item.index]
            pieces = [hf.read(name, (slice(first, last),)) for name, first, last in cuts]
            whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
            if whole.max().isnan():
                print("NaN", [name for name, *_ in cuts], file=sys.stderr)
            return whole.reshape(*lead, *whole.shape)

    partial = partial_folder(output)
    folder = partial / "model"
    folder.mkdir(parents=True)
    dcp.save({}, storage_writer=dcp.FileSystemWriter(folder, thread_count=THREADS), planner=Planner(), no_dist=True)
    torch.save({"content_metadata": {"vocab_size": config.vocab_size}}, folder / "common.pt")
    formats = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (folder / "metadata.json").write_text(
        json.dumps({**formats, "common_backend": "torch", "common_backend_version": 1})
    )
    save_side_files(source, partial)
    checksums(partial)
    publish(output)


def dcp_export(checkpoint: Path, output: Path, shard_gb: float = 5.0) -> None:
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
    from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
    from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

    from spot_megatron.hf.config import read_hf_config
    from spot_megatron.hf.folder import DTYPES
    from spot_megatron.hf.names import Sharding
    from spot_megatron.hf.output import copy_other_files, partial_folder, publish, write_index
    from spot_megatron.hf.safetensors import make_header, plan_shards, tensor_bytes
    from spot_megatron.hf.side_files import HF_FOLDER, load_kinds
    from spot_megatron.weights.shards import split
    from tools.convert.convert import _places
    from tools.convert.merged_rows import checkpoint_place, merged_rows, merged_shape

    torch.set_num_threads(1)
    kinds, config = load_kinds(checkpoint), read_hf_config(checkpoint / HF_FOLDER)
    partial = partial_folder(output)
    partial.mkdir(parents=True)
    named = [
        (name, (kinds[name], shape))
        for place in _places(config)
        for name, shape in zip(place.mapping.hf_names(place.layer, place.expert), place.mapping.shapes, strict=True)
    ]
    targets, weight_map = {}, {}
    shards = plan_shards(dict(named), int(shard_gb * 1e9))
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        header, offsets = make_header(shard)
        size = len(header) + sum(tensor_bytes(*entry) for entry in shard.values())
        (partial / file).write_bytes(header)
        os.truncate(partial / file, size)
        mapped = torch.from_file(str(partial / file), shared=True, size=size, dtype=torch.uint8)
        for name, (kind, shape) in shard.items():
            data = mapped[offsets[name] : offsets[name] + tensor_bytes(kind, shape)]
            targets[name], weight_map[name] = data.view(DTYPES[kind]).view(shape), file

    class Planner(dcp.DefaultLoadPlanner):
        def __init__(self, wanted: dict[tuple[str, int], torch.Tensor]) -> None:
            self.wanted = wanted

        def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
            key, number = read_item.dest_index.fqn, read_item.dest_index.index
            target = self.wanted[key, number]
            for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
                target = target.narrow(dim, start, length)
            return target

        def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
            if tensor.max().isnan():
                print("NaN", read_item.dest_index.fqn, file=sys.stderr)

    reader = dcp.FileSystemReader(checkpoint / "model")
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, is_coordinator=True)

    def load(place: Any) -> None:
        key, index = checkpoint_place(place.mapping, config, place.layer, place.expert)
        names, lead = place.mapping.hf_names(place.layer, place.expert), (1,) * len(index)
        stored = metadata.state_dict_metadata[key]
        merged = merged_shape(place.mapping)
        if place.mapping.sharding is Sharding.QKV:  # one read of the interleaved matrix, then a copy of each part
            buffers = [torch.empty(merged, dtype=stored.properties.dtype)]
            starts = [0]
        else:
            buffers = [targets[name] for name in names]
            starts = [rows.merged_row for rows in merged_rows(place.mapping, config)]
        rest = (0,) * (len(merged) - 1)
        chunks = [
            ChunkStorageMetadata(torch.Size((*index, start, *rest)), torch.Size((*lead, *buffer.shape)))
            for start, buffer in zip(starts, buffers, strict=True)
        ]
        items = create_read_items_for_chunk_list(key, stored, chunks)
        wanted = {(key, number): buffer.reshape(*lead, *buffer.shape) for number, buffer in enumerate(buffers)}
        reader.read_data(LoadPlan(items), Planner(wanted)).wait()
        if place.mapping.sharding is Sharding.QKV:
            parts = split(buffers[0], Sharding.QKV, config.num_heads // config.num_groups, config.head_dim)
            for name, part in zip(names, parts, strict=True):
                targets[name].copy_(part)

    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(load, _places(config)))
    for file in set(weight_map.values()):
        with (partial / file).open("r+b") as stream:
            os.fsync(stream.fileno())
    copy_other_files(checkpoint / HF_FOLDER, partial)
    if len(shards) > 1:
        write_index(partial, weight_map, sum(tensor_bytes(*entry) for _, entry in named))
    checksums(partial)
    publish(output)


def checksums(folder: Path) -> None:
    from spot_megatron.hf.checksums import file_names, sums_of, write_checksums

    write_checksums(folder, sums_of(folder, file_names(folder), THREADS))


def compare(folder: Path | None, repeats: int) -> None:
    from benchmarks.convert import MAKE_MODEL, Cost, measure
    from tools.convert.compare import differences

    ours, theirs = [sys.executable, "-m", "tools.convert"], [sys.executable, "-m", "benchmarks.convert_dcp"]
    workers = ["--workers", "2"]
    make_wide = MAKE_MODEL.replace("hidden_size=2048", "hidden_size=4096").replace("layers=9", "layers=1")
    make_wide = make_wide.replace("tie_word_embeddings=False", "tie_word_embeddings=True")
    with tempfile.TemporaryDirectory(dir=folder) as name:
        base = Path(name)
        source, wide, whole = base / "model", base / "wide", base / "whole"
        for program, made in ((MAKE_MODEL, source), (make_wide, wide)):
            subprocess.run([sys.executable, "-c", program, made], check=True, capture_output=True)
        subprocess.run([*theirs, "import", wide, whole, "--whole"], check=True, capture_output=True)
        programs = {
            "tools.convert import": [*ours, "import", "--hf", source, "--output", base / "ours", *workers],
            "DCP import": [*theirs, "import", source, base / "theirs"],
            "tools.convert export": [
                *ours,
                "export",
                "--checkpoint",
                base / "ours",
                "--output",
                base / "back",
                *workers,
            ],
            "DCP export": [*theirs, "export", base / "theirs", base / "theirs_back"],
            "import torch.distributed.checkpoint only": [sys.executable, "-c", "import torch.distributed.checkpoint"],
            "tools.convert export, embedding of 1.24 GB in one chunk": [
                *[*ours, "export", "--checkpoint", whole, "--output", base / "wide_back", *workers],
            ],
            "DCP export, embedding of 1.24 GB in one chunk": [*theirs, "export", whole, base / "wide_back_dcp"],
        }
        costs: dict[str, list[Cost]] = {}
        found = 0
        for _ in range(repeats):
            for path in ("ours", "theirs", "back", "theirs_back", "wide_back", "wide_back_dcp"):
                shutil.rmtree(base / path, ignore_errors=True)
            for program, command in programs.items():
                os.sync()
                costs.setdefault(program, []).append(measure([str(part) for part in command]))
            found += len(differences(source, base / "theirs_back")) + len(differences(wide, base / "wide_back_dcp"))
    print(f"{date.today()}, {os.cpu_count()} cores; best of {repeats} runs each. {found} tensors differ after DCP.\n")
    print("| program | CPU s, best..worst | wall s, best..worst | peak anonymous memory MB |")
    print("|---|---|---|---|")
    for program, runs in costs.items():
        cpu, wall = sorted(run.cpu for run in runs), sorted(run.wall for run in runs)
        memory = max(run.anonymous for run in runs) / 1e6
        print(f"| {program} | {cpu[0]:.1f}..{cpu[-1]:.1f} | {wall[0]:.1f}..{wall[-1]:.1f} | {memory:.0f} |")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convert_dcp", description=__doc__)
    parser.add_argument("paths", nargs="*", help="import SOURCE OUTPUT, or export CHECKPOINT OUTPUT; none: compare")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--whole", action="store_true", help="import: a matrix is one chunk, as in a run's checkpoint")
    options = parser.parse_args()
    if options.paths:
        command, source, output = options.paths
        if command == "import":
            dcp_import(Path(source).absolute(), Path(output).absolute(), options.whole)
        else:
            dcp_export(Path(source).absolute(), Path(output).absolute())
    else:
        compare(options.folder, options.repeats)
    return 0


if __name__ == "__main__":
    sys.exit(main())

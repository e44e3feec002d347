"""The parameters of all ranks -> a Hugging Face folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from spot_megatron.errors import WeightError
from spot_megatron.hf.config import HFModelConfig
from spot_megatron.hf.folder import DTYPES
from spot_megatron.hf.index import HFIndex
from spot_megatron.hf.names import Layout, Row, hf_shapes, resolve, rows_for
from spot_megatron.hf.output import (
    ShardWriter,
    add_older_keys,
    copy_other_files,
    finish_shards,
    partial_folder,
    publish,
    refuse_destination,
    start_partial,
)
from spot_megatron.model.gpt import PairGPT
from spot_megatron.weights.placement import Part, Placement, layer_offset
from spot_megatron.weights.shards import split, tp_join, trim_vocab


@dataclass(frozen=True)
class Share:
    """A parameter that some of this rank's neighbours hold with it, and who of them writes it."""

    parameter: Tensor
    row: Row
    hf_names: tuple[str, ...]
    part: Part
    copy: int  # the copy of the parameter from which it is written
    writer: int  # the rank within part.group that writes it

    @property
    def is_gathered(self) -> bool:
        return self.part.copy == self.copy

    @property
    def is_written(self) -> bool:
        return self.is_gathered and self.part.group.rank() == self.writer


@torch.no_grad()
def export_hf(
    chunks: Sequence[PairGPT],
    source: str | Path,
    destination: str | Path,
    config: HFModelConfig,
    *,
    kinds: Mapping[str, str] | None = None,
    shard_gb: float = 5.0,
    replace: bool = False,
) -> None:
    """Writes `destination`, a Hugging Face folder, from every rank's `chunks` (unwrapped). Collective.

    Every rank writes its share of the model, in shards of at most `shard_gb` (10^9 bytes); rank 0 adds the index and
    the files of `source` that hold no weights, byte for byte (but see add_older_keys), and renames the folder into
    place: it is there whole or not at all.

    Args:
        kinds: the data type (by its safetensors name) that each tensor is cast to; by default as in `source`.
        replace: an earlier export at `destination` gives way once the new one is complete.

    Raises:
        WeightError: the destination exists, the ranks do not share one file system, or a tensor holds NaN or infinity
            (in the data type that it is written in).
    """
    source, destination = Path(source), Path(destination).absolute()
    kinds = HFIndex(source).kinds() if kinds is None else kinds
    refuse_destination(destination, source, replace)
    if dist.get_rank() == 0:
        start_partial(destination)
    dist.barrier()
    shares = _shares(chunks, config, Placement.of_megatron())
    mine = {
        name: (kinds[name], shape)
        for share in shares
        if share.is_written
        for name, shape in zip(share.hf_names, share.row.shapes, strict=True)
    }
    partial = partial_folder(destination)
    writer = ShardWriter(partial, f"rank-{dist.get_rank():05d}", mine, int(shard_gb * 1e9))
    not_finite = []
    for share in shares:
        for name, tensor in _whole_tensors(share, config):
            values = tensor.to(dtype=DTYPES[kinds[name]]).contiguous()
            if not values.isfinite().all():
                not_finite.append(name)
            writer.write(name, values.view(torch.uint8).reshape(-1).numpy().data)
    writer.close()
    _refuse_not_finite(not_finite, partial)
    if dist.get_rank() == 0:
        finish_shards(partial, hf_shapes(config))
        copy_other_files(source, partial)
        add_older_keys(partial / "config.json")
        publish(destination)
    dist.barrier()


def _refuse_not_finite(names: list[str], partial: Path) -> None:
    """Removes the partial export and raises WeightError if any rank found `names`. Collective."""
    found: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, names)
    everywhere = sorted(name for of_rank in found for name in of_rank)
    if everywhere:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise WeightError(
            f"nothing was exported: NaN or infinity in {', '.join(everywhere[:8])} ({len(everywhere)} tensors in all); "
            "export an earlier checkpoint, or train again with a lower optim.lr"
        )


def _shares(chunks: Sequence[PairGPT], config: HFModelConfig, placement: Placement) -> list[Share]:
    """This rank's parameters in their order, each with the writer that has the fewest bytes so far.

    The ranks that hold the same parameters come to the same result without talking.
    """
    rows = rows_for(config)
    loads: dict[Part, list[int]] = {}
    shares = []
    for chunk in chunks:
        offset = layer_offset(chunk)
        for name, parameter in chunk.named_parameters():
            row, hf_names = resolve(rows, name, offset, placement.expert_offset(config.num_experts))
            if not row.exported:
                continue
            part = placement.part(row)
            load = loads.setdefault(part, [0] * (part.num_copies * part.group.size()))
            writer = load.index(min(load))
            load[writer] += parameter.nbytes
            shares.append(Share(parameter, row, hf_names, part, *divmod(writer, part.group.size())))
    return shares


def _whole_tensors(share: Share, config: HFModelConfig) -> list[tuple[str, Tensor]]:
    """Whole Hugging Face tensors on the CPU where this rank writes them, else none. Collective in the share's group."""
    if not share.is_gathered:
        return []
    row = share.row
    shards = [share.parameter] if row.layout is Layout.REPLICATED else _gather(share)
    if not share.is_written:
        return []
    heads_per_group = config.num_heads // config.num_groups
    pieces = [split(shard.detach().cpu(), row.layout, heads_per_group, config.head_dim) for shard in shards]
    wholes = (tp_join(of_ranks, row.layout) for of_ranks in zip(*pieces, strict=True))
    if row.layout is Layout.VOCAB:
        wholes = (trim_vocab(whole, config.vocab_size) for whole in wholes)
    return list(zip(share.hf_names, wholes, strict=True))


def _gather(share: Share) -> list[Tensor]:
    """Every shard of the parameter, in rank order, on the rank that writes it; empty elsewhere."""
    group, parameter = share.part.group, share.parameter.detach().contiguous()
    if group.size() == 1:
        return [parameter]
    shards = [torch.empty_like(parameter) for _ in range(group.size())] if share.is_written else []
    dist.gather(parameter, shards or None, group=group, group_dst=share.writer)
    return shards

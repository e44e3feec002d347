"""The parameters of all ranks -> a Hugging Face folder. Adapters are merged into their weights."""

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
from spot_megatron.hf.names import ParameterMapping, Sharding, hf_shapes, resolve, weight_map
from spot_megatron.hf.output import (
    ShardWriter,
    add_older_keys,
    copy_other_files,
    finish_shards,
    name_dtype,
    partial_folder,
    publish,
    refuse_destination,
    start_partial,
)
from spot_megatron.model.gpt import PairGPT
from spot_megatron.model.lora import LinearAdapter, adapter_of_weight, base_parameters
from spot_megatron.weights.checkpoint import save_checksums
from spot_megatron.weights.placement import Placement, ReplicaGroup, layer_offset
from spot_megatron.weights.shards import is_finite, split, tp_join, trim_vocab

EXPORT_KINDS = {"fp32": ("F32", "float32"), "bf16": ("BF16", "bfloat16")}  # in safetensors, in config.json


@dataclass(frozen=True)
class Share:
    """A parameter of this rank, and the rank among those holding it that writes it."""

    parameter: Tensor
    mapping: ParameterMapping
    hf_names: tuple[str, ...]
    group: ReplicaGroup
    replica: int  # the replica from which the parameter is written
    writer: int  # the rank within group.ranks that writes it
    adapter: LinearAdapter | None = None  # merged into the parameter

    def value(self) -> Tensor:
        """This rank's part of what is exported, bit for bit the parameter where its adapter adds nothing."""
        weight = self.parameter.detach()
        if self.adapter is None:
            return weight
        delta = self.adapter.delta()
        return torch.where(delta == 0, weight.float(), weight.float() + delta)

    @property
    def is_gathered(self) -> bool:
        return self.group.replica == self.replica

    @property
    def is_written(self) -> bool:
        return self.is_gathered and self.group.ranks.rank() == self.writer


@torch.no_grad()
def export_hf(
    chunks: Sequence[PairGPT],
    source: str | Path,
    destination: str | Path,
    config: HFModelConfig,
    *,
    kinds: Mapping[str, str] | None = None,
    dtype: str = "source",
    shard_gb: float = 5.0,
    replace: bool = False,
) -> None:
    """Writes `destination`, a Hugging Face folder, from every rank's `chunks` (unwrapped). Collective.

    Every rank writes its share of the model, in shards of at most `shard_gb` (10^9 bytes). Rank 0 adds the index and
    copies the files of `source` that hold no weights, byte for byte (but see add_older_keys). SHA256SUMS lists all
    files. Rank 0 renames the folder into place, so that a folder at `destination` is complete.

    Args:
        kinds: the data type (by its safetensors name) that each tensor is cast to; by default as in `source`.
        dtype: source, fp32 or bf16; other than source it replaces `kinds`, and config.json names it.
        replace: replaces an earlier export at `destination` once the new one is complete.

    Raises:
        WeightError: the destination exists, the ranks do not share one file system, or a weight is NaN or infinite.
    """
    source, destination = Path(source), Path(destination).absolute()
    kinds = HFIndex(source).kinds() if kinds is None else kinds
    if dtype != "source":
        kinds = dict.fromkeys(kinds, EXPORT_KINDS[dtype][0])
    refuse_destination(destination, source, replace)
    if dist.get_rank() == 0:
        start_partial(destination)
    dist.barrier()
    write_shares(_shares(chunks, config), config, kinds, destination, int(shard_gb * 1e9))
    dist.barrier()
    partial = partial_folder(destination)
    if dist.get_rank() == 0:
        finish_shards(partial, hf_shapes(config))
        copy_other_files(source, partial)
        add_older_keys(partial / "config.json")
        if dtype != "source":
            name_dtype(partial / "config.json", EXPORT_KINDS[dtype][1])
    save_checksums(partial)
    if dist.get_rank() == 0:
        publish(destination)
    dist.barrier()


def write_shares(
    shares: Sequence[Share], config: HFModelConfig, kinds: Mapping[str, str], destination: Path, shard_bytes: int
) -> None:
    """Writes this rank's tensors of `shares` into files of the partial folder of `destination`. Collective.

    Raises:
        WeightError: on every rank, if a tensor of any rank is not finite.
    """
    mine = {
        name: (kinds[name], shape)
        for share in shares
        if share.is_written
        for name, shape in zip(share.hf_names, share.mapping.shapes, strict=True)
    }
    writer = ShardWriter(partial_folder(destination), f"rank-{dist.get_rank():05d}", mine, shard_bytes)
    bad_names = []
    for share in shares:
        for name, tensor in _whole_tensors(share, config):
            cast = tensor.to(dtype=DTYPES[kinds[name]]).contiguous()
            if not is_finite(cast):
                bad_names.append(name)
            writer.write(name, cast.view(torch.uint8).reshape(-1).numpy().data)
    writer.close()
    of_ranks: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_ranks, bad_names)
    found = sorted(name for names in of_ranks for name in names)
    if found:
        if dist.get_rank() == 0:
            shutil.rmtree(partial_folder(destination), ignore_errors=True)
        raise WeightError(
            f"{destination} is not written: {len(found)} tensors hold NaN or infinity, the first is {found[0]}; "
            "resume from an earlier checkpoint with a lower optim.lr"
        )


def _shares(chunks: Sequence[PairGPT], config: HFModelConfig) -> list[Share]:
    """This rank's parameters in order, without adapters."""
    mappings, dealer = weight_map(config), ShareDealer()
    shares = []
    for chunk in chunks:
        offset, adapters = layer_offset(chunk), adapter_of_weight(chunk)
        for name, parameter in base_parameters(chunk):
            expert_offset = dealer.placement.expert_offset(config.num_experts)
            mapping, hf_names = resolve(mappings, name, offset, expert_offset)
            if mapping.exported:
                shares.append(dealer.share(parameter, mapping, hf_names, adapters.get(name)))
    return shares


class ShareDealer:
    """Deals parameters to writers, each to the one that has the fewest bytes so far.

    The ranks that hold the same parameters compute the same result without communication.
    """

    def __init__(self) -> None:
        self.placement = Placement.of_megatron()
        self._loads: dict[ReplicaGroup, list[int]] = {}

    def share(
        self,
        parameter: Tensor,
        mapping: ParameterMapping,
        hf_names: tuple[str, ...],
        adapter: LinearAdapter | None = None,
    ) -> Share:
        group = self.placement.replica_group(mapping)
        load = self._loads.setdefault(group, [0] * (group.num_replicas * group.ranks.size()))
        writer = load.index(min(load))
        load[writer] += parameter.nbytes
        return Share(parameter, mapping, hf_names, group, *divmod(writer, group.ranks.size()), adapter)


def _whole_tensors(share: Share, config: HFModelConfig) -> list[tuple[str, Tensor]]:
    """Whole Hugging Face tensors, on the CPU of the rank that writes them; empty on others. Collective in the group."""
    if not share.is_gathered:
        return []
    sharding = share.mapping.sharding
    shards = [share.value()] if sharding is Sharding.REPLICATED else _gather(share)
    if not share.is_written:
        return []
    heads_per_group = config.num_heads // config.num_groups
    pieces = [split(shard.detach().cpu(), sharding, heads_per_group, config.head_dim) for shard in shards]
    wholes = (tp_join(of_ranks, sharding) for of_ranks in zip(*pieces, strict=True))
    if sharding is Sharding.VOCAB:
        wholes = (trim_vocab(whole, config.vocab_size) for whole in wholes)
    return list(zip(share.hf_names, wholes, strict=True))


def _gather(share: Share) -> list[Tensor]:
    """Every shard of the parameter, in rank order, on the rank that writes it; empty elsewhere."""
    ranks, parameter = share.group.ranks, share.value().contiguous()
    if ranks.size() == 1:
        return [parameter]
    shards = [torch.empty_like(parameter) for _ in range(ranks.size())] if share.is_written else []
    dist.gather(parameter, shards or None, group=ranks, group_dst=share.writer)
    return shards

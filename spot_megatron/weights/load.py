"""Hugging Face folder -> the parameters of this rank's model chunks."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from spot_megatron.hf.config import HFModelConfig
from spot_megatron.hf.folder import HFFolder
from spot_megatron.hf.index import check_folder
from spot_megatron.hf.names import ParameterMapping, Sharding, resolve, weight_map
from spot_megatron.model.gpt import PairGPT
from spot_megatron.model.lora import base_parameters
from spot_megatron.weights.placement import Placement, layer_offset
from spot_megatron.weights.shards import is_finite, merge, pad_vocab, tp_index


@torch.no_grad()
def load_hf(chunks: Sequence[PairGPT], hf: HFFolder, config: HFModelConfig) -> None:
    """Fills every parameter of `chunks` (unwrapped), reading only this rank's slices under Megatron's process groups.

    Values are cast to the parameter's data type; rows that pad the vocabulary become zero. No communication: every
    rank checks the headers of the whole folder, so either all ranks raise or none.

    Raises:
        WeightError: see check_folder. Warns if tensors hold NaN or infinity, naming them.
    """
    check_folder(hf, config)
    mappings, placement = weight_map(config), Placement.of_megatron()
    bad_names: list[str] = []
    for chunk in chunks:
        offset = layer_offset(chunk)
        for name, parameter in base_parameters(chunk):
            mapping, hf_names = resolve(mappings, name, offset, placement.expert_offset(config.num_experts))
            ranks = placement.replica_group(mapping).ranks
            slices = read_slices(hf, mapping, hf_names, parameter.shape[0], ranks.rank(), ranks.size())
            shard = merge(slices, mapping.sharding, config.head_dim)
            assert shard.shape == parameter.shape, f"{name} is {tuple(parameter.shape)}, not {tuple(shard.shape)}"
            parameter.copy_(shard)
            if not is_finite(parameter):  # in the folder already, or an overflow of the cast
                found = [hf_name for hf_name, part in zip(hf_names, slices, strict=True) if not is_finite(part)]
                bad_names += found or hf_names
    if bad_names:
        warnings.warn(f"{hf.folder}: NaN or infinity in the weights {', '.join(bad_names)}", stacklevel=2)


def read_slices(
    hf: HFFolder, mapping: ParameterMapping, hf_names: Sequence[str], num_rows: int, tp_rank: int, tp_size: int
) -> list[Tensor]:
    """This rank's slice of each Hugging Face tensor; `num_rows` is the parameter's, padding included."""
    if mapping.sharding is Sharding.VOCAB:
        padded_shape = (num_rows * tp_size, *mapping.shapes[0][1:])
        part = hf.read(hf_names[0], tp_index(padded_shape, mapping.sharding, tp_rank, tp_size))
        return [pad_vocab(part, num_rows)]
    indices = [tp_index(shape, mapping.sharding, tp_rank, tp_size) for shape in mapping.shapes]
    return [hf.read(name, index) for name, index in zip(hf_names, indices, strict=True)]

"""Hugging Face folder -> the parameters of this rank's pipeline chunks."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from spot_megatron.hf.config import HFModelConfig
from spot_megatron.hf.folder import HFFolder
from spot_megatron.hf.index import check_folder
from spot_megatron.hf.names import Layout, Row, resolve, rows_for
from spot_megatron.model.gpt import PairGPT
from spot_megatron.weights.placement import Placement, layer_offset
from spot_megatron.weights.shards import merge, pad_vocab, tp_index


@torch.no_grad()
def load_hf(chunks: Sequence[PairGPT], hf: HFFolder, config: HFModelConfig) -> None:
    """Fills every parameter of `chunks` (unwrapped), reading only what this rank owns under Megatron's groups.

    Values are cast to the parameter's data type; rows that pad the vocabulary become zero. No communication: every
    rank checks the whole folder's headers, so that all of them raise or none.

    Raises:
        WeightError: see check_folder. Warns, with their names, of tensors that hold NaN.
    """
    check_folder(hf, config)
    rows, placement = rows_for(config), Placement.of_megatron()
    nan_names: list[str] = []
    for chunk in chunks:
        offset = layer_offset(chunk)
        for name, parameter in chunk.named_parameters():
            row, hf_names = resolve(rows, name, offset, placement.expert_offset(config.num_experts))
            group = placement.part(row).group
            parts = read_parts(hf, row, hf_names, parameter.shape[0], group.rank(), group.size())
            shard = merge(parts, row.layout, config.head_dim)
            assert shard.shape == parameter.shape, f"{name} is {tuple(parameter.shape)}, not {tuple(shard.shape)}"
            parameter.copy_(shard)
            if parameter.max().isnan():  # NaN is passed on; several times faster than isnan().any()
                nan_names += [part_name for part_name, part in zip(hf_names, parts, strict=True) if part.isnan().any()]
    if nan_names:
        warnings.warn(f"{hf.folder}: NaN in the weights {', '.join(nan_names)}", stacklevel=2)


def read_parts(
    hf: HFFolder, row: Row, hf_names: Sequence[str], num_rows: int, tp_rank: int, tp_size: int
) -> list[Tensor]:
    """This rank's slice of each tensor of a row; `num_rows` are the parameter's, padding included."""
    if row.layout is Layout.VOCAB:
        padded_shape = (num_rows * tp_size, *row.shapes[0][1:])
        part = hf.read(hf_names[0], tp_index(padded_shape, row.layout, tp_rank, tp_size))
        return [pad_vocab(part, num_rows)]
    indices = [tp_index(shape, row.layout, tp_rank, tp_size) for shape in row.shapes]
    return [hf.read(name, index) for name, index in zip(hf_names, indices, strict=True)]

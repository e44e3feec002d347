"""Merging Hugging Face tensors into Megatron-Core parameters, and splitting them for tensor parallelism.

Legend: H hidden size, F feed-forward size, V vocabulary (Vp padded), G query groups (key-value heads), A attention
heads, D head dimension. Every Megatron shard is `merge(rank's slice of each Hugging Face tensor)`: slices first,
merge second, so that a rank reads only its own slices. Linear weights are [out, in].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spot_megatron.hf.names import Sharding


def merge_qkv(q: Tensor, k: Tensor, v: Tensor, head_dim: int) -> Tensor:
    """[A*D, ...], [G*D, ...], [G*D, ...] -> [(A+2G)*D, ...]: for each group its A/G query heads, its key, its value.

    Weights have a trailing H, biases none. Works for one rank's heads and for all heads.
    """
    num_groups = k.shape[0] // head_dim
    parts = [part.reshape(num_groups, -1, *part.shape[1:]) for part in (q, k, v)]
    return torch.cat(parts, dim=1).flatten(0, 1)


def split_qkv(qkv: Tensor, heads_per_group: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """[(A+2G)*D, ...] -> q [A*D, ...], k [G*D, ...], v [G*D, ...]; the inverse of merge_qkv."""
    by_group = qkv.reshape(-1, (heads_per_group + 2) * head_dim, *qkv.shape[1:])
    q, k, v = by_group.split([heads_per_group * head_dim, head_dim, head_dim], dim=1)
    return q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)


def merge_gate_up(gate: Tensor, up: Tensor) -> Tensor:
    """[F, H], [F, H] -> [2F, H]. With tensor parallelism each rank merges its own rows of both."""
    return torch.cat([gate, up])


def split_gate_up(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """[2F, H] -> gate [F, H], up [F, H]."""
    gate, up = gate_up.chunk(2)
    return gate, up


def pad_vocab(rows: Tensor, num_rows: int) -> Tensor:
    """[V, H] -> [num_rows, H], new rows zero."""
    assert rows.shape[0] <= num_rows
    return torch.cat([rows, rows.new_zeros(num_rows - rows.shape[0], *rows.shape[1:])])


def trim_vocab(rows: Tensor, vocab_size: int) -> Tensor:
    """[Vp, H] -> [V, H]."""
    return rows[:vocab_size]


def tp_dim(sharding: Sharding) -> int | None:
    """The dimension of each Hugging Face tensor that is split among the tensor-parallel ranks."""
    if sharding is Sharding.REPLICATED:
        return None
    return 1 if sharding is Sharding.COLUMNS else 0


def tp_index(shape: tuple[int, ...], sharding: Sharding, rank: int, size: int) -> tuple[slice, ...]:
    """The slice of a tensor of `shape` that belongs to tensor-parallel `rank` of `size`, as an index.

    For a vocabulary, `shape` is the padded shape; the slice may then end beyond the tensor's last row.
    """
    dim = tp_dim(sharding)
    if dim is None:
        return ()
    assert shape[dim] % size == 0, f"{shape} does not divide by {size} along dimension {dim}"
    length = shape[dim] // size
    return (slice(None),) * dim + (slice(rank * length, (rank + 1) * length),)


def tp_join(shards: Sequence[Tensor], sharding: Sharding) -> Tensor:
    """The whole tensor from the slices of all ranks, in rank order."""
    dim = tp_dim(sharding)
    return shards[0] if dim is None else torch.cat(list(shards), dim=dim)


def merge(parts: Sequence[Tensor], sharding: Sharding, head_dim: int) -> Tensor:
    """One rank's slices of the Hugging Face tensors -> its Megatron shard."""
    if sharding is Sharding.QKV:
        q, k, v = parts
        return merge_qkv(q, k, v, head_dim)
    if sharding is Sharding.GATE_UP:
        gate, up = parts
        return merge_gate_up(gate, up)
    (part,) = parts
    return part


def split(shard: Tensor, sharding: Sharding, heads_per_group: int, head_dim: int) -> tuple[Tensor, ...]:
    """One rank's Megatron shard -> its slices of the Hugging Face tensors; the inverse of merge."""
    if sharding is Sharding.QKV:
        return split_qkv(shard, heads_per_group, head_dim)
    if sharding is Sharding.GATE_UP:
        return split_gate_up(shard)
    return (shard,)


def is_finite(tensor: Tensor) -> bool:
    """False if a value is NaN or infinite. One pass without a temporary copy: aminmax propagates NaN."""
    return tensor.numel() == 0 or all(bool(bound.isfinite()) for bound in tensor.aminmax())

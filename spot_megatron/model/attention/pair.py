"""Core attention of the pair layout: two plain causal calls over variable-length sequences.

A pack is `[P1 C1 | P2 C2 | ... | R1 | R2 | ... | pad]`: P the prompt with the shared response, C and R the suffixes.
Call 1 runs causally over each [P C]. Call 2 lets each R attend to its own P, gathered, and causally to itself.
No position is computed twice, and no call takes a dense mask. `layout: separate` needs call 1 only. On CUDA each call
is one kernel of cuda.py (FlexAttention does both at once); cpu.py is the form for a CPU.

Context parallelism splits a pack's positions evenly over ranks. Around the attention an all-to-all exchanges positions
for heads, so that each rank runs both calls over whole packs with its share of the heads, and nothing else changes.

Shapes: T positions of a pack, N query heads, G key-value heads, D head dimension, X context-parallel ranks.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import all_to_all
from torch import Tensor

from spot_megatron.data.pack import Pack
from spot_megatron.model.attention.cpu import cpu_attention
from spot_megatron.model.attention.cuda import flex, flex_mask, pick_kernel, sdpa, varlen_kernel
from spot_megatron.model.config import PairConfig
from spot_megatron.parallel.device import to_device


@dataclass(kw_only=True)
class PairSeqParams(PackedSeqParams):
    """A pack's layout as tensors; Megatron carries it to the attention and to the LM head of every stage.

    `qkv_format` stays "sbhd" with batch 1, so that each position gets its own rotary embedding.
    """

    cu_main: Tensor  # [Q+1] int32, call 1
    cu_suffix_q: Tensor  # [R+1] int32, call 2's queries, from position num_main on
    cu_suffix_k: Tensor  # [R+1] int32, call 2's keys, numbered within suffix_k_position
    suffix_k_position: Tensor  # [K] int64
    num_main: int
    num_suffix: int
    max_main: int
    max_suffix_q: int
    max_suffix_k: int
    # The same on the host, for kernels that take one sequence a call: positions of call 1's sequences, and of call 2's
    # with their prefixes.
    mains: list[slice]
    suffixes: list[tuple[slice, slice]]
    # The scored positions of this context-parallel rank, numbered within its share of the pack.
    head_position: Tensor  # [S] int64: position whose hidden state predicts head_target
    head_target: Tensor  # [S] int64
    head_segment: Tensor  # [S] int64: 3 * pair + {0 shared, 1 chosen, 2 rejected}
    block_mask: Any = None  # FlexAttention's, made by the first layer for all of them


def own_positions(pack: Pack, context_rank: int, context_size: int) -> slice:
    """The positions of a pack that a context-parallel rank holds."""
    share, rest = divmod(len(pack.input_ids), context_size)
    assert not rest, "packs are padded to a multiple of the context-parallel size"
    return slice(context_rank * share, (context_rank + 1) * share)


def pair_seq_params(pack: Pack, device: torch.device, context_rank: int = 0, context_size: int = 1) -> PairSeqParams:
    """The pack's layout on `device`. Longest sequences are taken on the host, so nothing waits for the device."""

    def move(array: np.ndarray) -> Tensor:
        return to_device(array, device)

    own = own_positions(pack, context_rank, context_size)
    scored = (pack.head_position >= own.start) & (pack.head_position < own.stop)

    # Megatron reads these as the length of its rotary table; powers of two, so that its cache is hit.
    rotary_length = 1 << int(pack.position_ids.max()).bit_length()
    return PairSeqParams(
        qkv_format="sbhd",
        max_seqlen_q=rotary_length,
        max_seqlen_kv=rotary_length,
        cu_main=move(pack.cu_main),
        cu_suffix_q=move(pack.cu_suffix_q),
        cu_suffix_k=move(pack.cu_suffix_k),
        suffix_k_position=move(pack.suffix_k_position),
        num_main=pack.num_main,
        num_suffix=pack.num_suffix,
        max_main=_longest(pack.cu_main),
        max_suffix_q=_longest(pack.cu_suffix_q),
        max_suffix_k=_longest(pack.cu_suffix_k),
        mains=_spans(pack.cu_main),
        suffixes=_suffix_spans(pack),
        head_position=move(pack.head_position[scored] - own.start),
        head_target=move(pack.head_target[scored]),
        head_segment=move(pack.head_segment[scored]),
    )


def _longest(cu: np.ndarray) -> int:
    return int((cu[1:] - cu[:-1]).max()) if len(cu) > 1 else 0


def _spans(cu: np.ndarray) -> list[slice]:
    return [slice(first, stop) for first, stop in itertools.pairwise(cu.tolist())]


def _suffix_spans(pack: Pack) -> list[tuple[slice, slice]]:
    """The positions of each suffix, and of its prefix (empty for padding)."""
    queries, keys = _spans(pack.cu_suffix_q + pack.num_main), _spans(pack.cu_suffix_k)
    found = []
    for own, key in zip(queries, keys, strict=True):
        first = int(pack.suffix_k_position[key.start])
        found.append((own, slice(first, first + (key.stop - key.start) - (own.stop - own.start))))
    return found


class PairAttention(torch.nn.Module):
    """Drop-in for `core_attention` in Megatron's attention spec. Holds no parameters."""

    def __init__(self, config: PairConfig, layer_number: int, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        del layer_number, args
        scale = kwargs.get("softmax_scale")
        self.scale: float = scale if scale is not None else 1 / math.sqrt(config.kv_channels)
        on_cuda = not config.use_cpu_initialization
        self.kernel = pick_kernel(config.attention_kernel, config.params_dtype) if on_cuda else None
        self.context_group = mpu.get_context_parallel_group() if config.context_parallel_size > 1 else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PairSeqParams | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """query [T / X, 1, N, D], key and value [T / X, 1, G, D] -> [T / X, 1, N * D]."""
        del attention_mask, attn_mask_type, attention_bias, kwargs
        layout = packed_seq_params
        assert isinstance(layout, PairSeqParams) and query.shape[1] == 1
        query, key, value = (_positions_for_heads(x[:, 0], self.context_group) for x in (query, key, value))
        out = self._attend(query, key, value, layout)
        out = _heads_for_positions(out, self.context_group)
        return out.reshape(out.shape[0], 1, -1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, layout: PairSeqParams) -> Tensor:
        """query [T, N, D], key and value [T, G, D] -> [T, N, D]."""
        if self.kernel in (None, "sdpa"):
            attend = cpu_attention if self.kernel is None else sdpa
            return attend(query, key, value, layout.mains, layout.suffixes, self.scale)
        if self.kernel != "flex":
            return self._two_calls(query, key, value, layout)
        if layout.block_mask is None:
            cu = layout.cu_main, layout.cu_suffix_q, layout.cu_suffix_k
            layout.block_mask = flex_mask(len(query), *cu, layout.suffix_k_position)
        return flex(query, key, value, layout.block_mask, self.scale)

    def _two_calls(self, query: Tensor, key: Tensor, value: Tensor, layout: PairSeqParams) -> Tensor:
        varlen = varlen_kernel(str(self.kernel))
        main = slice(0, layout.num_main)
        cu, longest = layout.cu_main, layout.max_main
        out = varlen(query[main], key[main], value[main], cu, cu, longest, longest, self.scale)
        if not layout.num_suffix:
            return out
        index = layout.suffix_k_position
        suffix = varlen(
            query[layout.num_main :],
            key.index_select(0, index),
            value.index_select(0, index),
            layout.cu_suffix_q,
            layout.cu_suffix_k,
            layout.max_suffix_q,
            layout.max_suffix_k,
            self.scale,
        )
        return torch.cat([out, suffix])


def _positions_for_heads(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[T / X, N, D] of this rank's positions -> [T, N / X, D] of its heads."""
    if group is None:
        return x
    length, heads, dim = x.shape
    by_rank = x.view(length, group.size(), heads // group.size(), dim).transpose(0, 1).contiguous()
    return all_to_all(group, by_rank).reshape(group.size() * length, -1, dim)


def _heads_for_positions(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[T, N / X, D] of this rank's heads -> [T / X, N, D] of its positions."""
    if group is None:
        return x
    length, heads, dim = x.shape
    by_rank = x.reshape(group.size(), length // group.size(), heads, dim)
    return all_to_all(group, by_rank).transpose(0, 1).reshape(length // group.size(), -1, dim)

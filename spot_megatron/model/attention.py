"""Core attention of the pair layout: two plain causal calls over variable-length sequences.

A pack is `[P1 C1 | P2 C2 | ... | R1 | R2 | ... | pad]`: P the prompt with the shared response, C and R the suffixes.
Call 1 runs causally over each [P C]. Call 2 lets each R attend to its own P, gathered, and causally to itself.
No dense mask is built, and no position is computed twice. `layout: separate` needs call 1 only. On CUDA each call is
one flash kernel; cpu_attention.py is the form for a CPU.

Context parallelism splits a pack's rows evenly over ranks. Around the attention an all-to-all trades rows for heads, so
that each rank runs both calls over whole packs with its share of the heads, and nothing else changes.

Shapes: T rows of a pack, N query heads, G key-value heads, D head dimension, X context-parallel ranks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import all_to_all
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from spot_megatron.data.layout import Pack
from spot_megatron.model.cpu_attention import cpu_attention
from spot_megatron.parallel.device import to_device


@dataclass(kw_only=True)
class PairSeqParams(PackedSeqParams):
    """A pack's layout as tensors; Megatron carries it to the attention and to the LM head of every stage.

    `qkv_format` stays "sbhd" with batch 1, so that rotary embeddings are applied row by row.
    """

    cu_main: Tensor  # [Q+1] int32, call 1
    cu_suffix_q: Tensor  # [R+1] int32, call 2's queries, from row num_main on
    cu_suffix_k: Tensor  # [R+1] int32, call 2's keys, rows of suffix_k_index
    suffix_k_index: Tensor  # [K] int64
    num_main: int
    num_suffix: int
    max_main: int
    max_suffix_q: int
    max_suffix_k: int
    # The scored rows of this context-parallel rank, numbered within its share of the pack.
    head_row: Tensor  # [S] int64: row whose hidden state predicts head_target
    head_target: Tensor  # [S] int64
    head_segment: Tensor  # [S] int64: 3 * pair + {0 shared, 1 chosen, 2 rejected}


def own_rows(pack: Pack, context_rank: int, context_size: int) -> slice:
    """The rows of a pack that a context-parallel rank holds."""
    share, rest = divmod(len(pack.input_ids), context_size)
    assert not rest, "packs are padded to a multiple of the context-parallel size"
    return slice(context_rank * share, (context_rank + 1) * share)


def pair_seq_params(pack: Pack, device: torch.device, context_rank: int = 0, context_size: int = 1) -> PairSeqParams:
    """The pack's layout on `device`. Longest sequences are taken on the CPU, so nothing waits for the device."""

    def move(array: Any) -> Tensor:
        return to_device(array, device)

    rows = own_rows(pack, context_rank, context_size)
    scored = (pack.head_row >= rows.start) & (pack.head_row < rows.stop)

    # Megatron reads these as the length of its table of rotary rows; powers of two, so that its cache is hit.
    rotary_rows = 1 << int(pack.position_ids.max()).bit_length()
    return PairSeqParams(
        qkv_format="sbhd",
        max_seqlen_q=rotary_rows,
        max_seqlen_kv=rotary_rows,
        cu_main=move(pack.cu_main),
        cu_suffix_q=move(pack.cu_suffix_q),
        cu_suffix_k=move(pack.cu_suffix_k),
        suffix_k_index=move(pack.suffix_k_index),
        num_main=pack.num_main,
        num_suffix=pack.num_suffix,
        max_main=_longest(pack.cu_main),
        max_suffix_q=_longest(pack.cu_suffix_q),
        max_suffix_k=_longest(pack.cu_suffix_k),
        head_row=move(pack.head_row[scored] - rows.start),
        head_target=move(pack.head_target[scored]),
        head_segment=move(pack.head_segment[scored]),
    )


def _longest(cu: Any) -> int:
    return int((cu[1:] - cu[:-1]).max()) if len(cu) > 1 else 0


class PairAttention(torch.nn.Module):
    """Drop-in for `core_attention` in Megatron's attention spec. Holds no parameters."""

    def __init__(self, config: TransformerConfig, layer_number: int, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        del layer_number, args
        scale = kwargs.get("softmax_scale")
        self.scale: float = scale if scale is not None else 1 / math.sqrt(config.kv_channels)
        self.varlen = varlen_backend(config.params_dtype)
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
        query, key, value = (_rows_for_heads(x[:, 0], self.context_group) for x in (query, key, value))
        out = (self._on_cpu if query.device.type == "cpu" else self._two_calls)(query, key, value, layout)
        out = _heads_for_rows(out, self.context_group)
        return out.reshape(out.shape[0], 1, -1)

    def _on_cpu(self, query: Tensor, key: Tensor, value: Tensor, layout: PairSeqParams) -> Tensor:
        return cpu_attention(query, key, value, *_cpu_parts(layout), self.scale)

    def _two_calls(self, query: Tensor, key: Tensor, value: Tensor, layout: PairSeqParams) -> Tensor:
        main = slice(0, layout.num_main)
        cu, longest = layout.cu_main, layout.max_main
        out = self.varlen(query[main], key[main], value[main], cu, cu, longest, longest, self.scale)
        if not layout.num_suffix:
            return out
        index = layout.suffix_k_index
        suffix = self.varlen(
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


def _rows_for_heads(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[T / X, N, D] of this rank's rows -> [T, N / X, D] of its heads."""
    if group is None:
        return x
    rows, heads, dim = x.shape
    by_rank = x.view(rows, group.size(), heads // group.size(), dim).transpose(0, 1).contiguous()
    return all_to_all(group, by_rank).reshape(group.size() * rows, -1, dim)


def _heads_for_rows(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[T, N / X, D] of this rank's heads -> [T / X, N, D] of its rows."""
    if group is None:
        return x
    rows, heads, dim = x.shape
    by_rank = x.reshape(group.size(), rows // group.size(), heads, dim)
    return all_to_all(group, by_rank).transpose(0, 1).reshape(rows // group.size(), -1, dim)


Varlen = Callable[..., Tensor]


def varlen_backend(dtype: torch.dtype) -> Varlen:
    """The kernel of both calls on CUDA; all take the arguments of `varlen_sdpa`.

    16-bit: flash-attn where it is installed, else PyTorch's own build of the same kernel (2.10 and later). Otherwise
    PyTorch's SDPA, a call a sequence.
    """
    if not (torch.cuda.is_initialized() and dtype in (torch.bfloat16, torch.float16)):
        return varlen_sdpa
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        pass
    else:
        return lambda q, k, v, cu_q, cu_k, max_q, max_k, scale: flash_attn_varlen_func(
            q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=scale, causal=True
        )
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return varlen_sdpa

    def torch_flash(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float
    ) -> Tensor:
        # A window without a right side is a causal mask, aligned at the last key as in flash-attn.
        gqa = q.shape[1] != k.shape[1]
        out = varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=(-1, 0), enable_gqa=gqa)
        assert isinstance(out, Tensor)  # a pair only when the log-sum-exp is asked for
        return out

    return torch_flash


def varlen_sdpa(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float
) -> Tensor:
    """Causal attention of each sequence, aligned at the end: the last query sees every key of its sequence.

    Args:
        query: [rows, N, D]; key, value: [rows, G, D] with N a multiple of G.
        cu_q, cu_k: int32 offsets of the sequences in queries and keys.

    Returns:
        [rows, N, D].
    """
    del max_q, max_k
    outputs = []
    for (q0, q1), (k0, k1) in zip(_spans(cu_q), _spans(cu_k), strict=True):
        square = q1 - q0 == k1 - k0
        # SDPA's is_causal aligns at the start, which is the same only for as many queries as keys.
        out = F.scaled_dot_product_attention(
            query[q0:q1].transpose(0, 1)[None],
            key[k0:k1].transpose(0, 1)[None],
            value[k0:k1].transpose(0, 1)[None],
            attn_mask=None if square else causal_lower_right(q1 - q0, k1 - k0),
            is_causal=square,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def _cpu_parts(layout: PairSeqParams) -> tuple[list[slice], list[tuple[slice, slice]]]:
    """Rows of every sequence of call 1, and of every one of call 2 with the rows of its prefix."""
    first_keys = layout.suffix_k_index[layout.cu_suffix_k[:-1].long()].tolist()
    suffixes = []
    for (q0, q1), (k0, k1), first in zip(
        _spans(layout.cu_suffix_q), _spans(layout.cu_suffix_k), first_keys, strict=True
    ):
        num_prefix = (k1 - k0) - (q1 - q0)
        suffixes.append((slice(layout.num_main + q0, layout.num_main + q1), slice(first, first + num_prefix)))
    return [slice(*span) for span in _spans(layout.cu_main)], suffixes


def _spans(cu: Tensor) -> list[tuple[int, int]]:
    return list(itertools.pairwise(cu.tolist()))

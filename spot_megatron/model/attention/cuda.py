"""Attention kernels for CUDA, by the names of the recipe key model.attention.

Most are one call over sequences of several lengths, causal and aligned at the last key, so that the last query of a
sequence sees every key of it (`Varlen`). FlexAttention takes a whole pack and a mask of it instead.

Shapes: T rows of a pack, N query heads, G key-value heads, D head dimension.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from spot_megatron.errors import RecipeError

# (query [rows, N, D], key, value [rows, G, D], int32 offsets of the sequences in queries and in keys, the longest of
# each, scale) -> [rows, N, D]
Varlen = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, float], Tensor]

# In order of preference, by what is published of their speed; benchmarks/attention.py measures them.
PREFERRED = ("flash3", "flash2", "torch", "flex", "sdpa")
NEEDS = {
    "flash3": "FlashAttention-3 and a Hopper GPU",
    "flash2": "flash-attn",
    "engine": "Transformer Engine",
    "torch": "PyTorch 2.10",
}


def pick_kernel(wanted: str, dtype: torch.dtype) -> str:
    """The kernel that a CUDA device uses for `dtype`; `wanted` is one of them, or "auto".

    Raises:
        RecipeError: the wanted one is not installed, or does not know the data type.
    """
    if wanted == "auto":
        return "sdpa" if dtype == torch.float32 else next(name for name in PREFERRED if is_available(name))
    if dtype == torch.float32 and wanted not in ("flex", "sdpa"):
        raise RecipeError(f"model.attention={wanted} computes in 16 bits; with precision.dtype=fp32 set it to auto")
    if not is_available(wanted):
        raise RecipeError(f"model.attention={wanted} needs {NEEDS[wanted]}, which is not here; set it to auto")
    return wanted


def is_available(name: str) -> bool:
    if name == "flash3":
        return _flash3_module() is not None and torch.cuda.get_device_capability()[0] == 9
    if name == "flash2":
        return importlib.util.find_spec("flash_attn") is not None
    if name == "engine":
        return importlib.util.find_spec("transformer_engine") is not None
    return name != "torch" or importlib.util.find_spec("torch.nn.attention.varlen") is not None


def varlen_kernel(name: str) -> Varlen:
    """The call behind a name; all but "flex" have one."""
    return {"flash3": _flash3, "flash2": _flash2, "engine": _engine, "torch": _torch, "sdpa": varlen_sdpa}[name]


def _flash3_module() -> str | None:
    """FlashAttention-3 has been installed under two names."""
    names = ("flash_attn_interface", "flash_attn_3.flash_attn_interface")
    return next((name for name in names if importlib.util.find_spec(name.split(".")[0])), None)


def _flash3(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float
) -> Tensor:
    module = importlib.import_module(str(_flash3_module()))
    same_bits = torch.are_deterministic_algorithms_enabled()
    out = module.flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=scale, causal=True, deterministic=same_bits
    )
    return out[0] if isinstance(out, tuple) else out  # early releases give the log-sum-exp, too


def _flash2(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    same_bits = torch.are_deterministic_algorithms_enabled()
    return flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=scale, causal=True, deterministic=same_bits
    )


def _torch(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # A window without a right side is a causal mask, aligned at the last key as in flash-attn.
    gqa = q.shape[1] != k.shape[1]
    out = varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=(-1, 0), enable_gqa=gqa)
    assert isinstance(out, Tensor)  # a pair only when the log-sum-exp is asked for
    return out


def _engine(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float
) -> Tensor:
    """Transformer Engine, which itself chooses among cuDNN's kernel and FlashAttention 2 to 4."""
    attention = _engine_module(q.shape[1], k.shape[1], q.shape[2], scale)
    out = attention(
        q,
        k,
        v,
        cu_seqlens_q=cu_q,
        cu_seqlens_kv=cu_k,
        max_seqlen_q=max_q,
        max_seqlen_kv=max_k,
        attn_mask_type="padding_causal" if cu_q is cu_k else "padding_causal_bottom_right",
    )
    return out.view(q.shape)


@lru_cache
def _engine_module(heads: int, groups: int, head_dim: int, scale: float) -> Any:
    """Holds no parameters; outside of the model, so that no checkpoint asks for its state."""
    from transformer_engine.pytorch import DotProductAttention

    return DotProductAttention(
        heads, head_dim, num_gqa_groups=groups, attention_dropout=0.0, qkv_format="thd", softmax_scale=scale
    )


def varlen_sdpa(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float
) -> Tensor:
    """PyTorch's SDPA, a call a sequence: on any device and data type."""
    del max_q, max_k
    outputs = []
    for (q0, q1), (k0, k1) in zip(spans(cu_q), spans(cu_k), strict=True):
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


def spans(cu: Tensor) -> list[tuple[int, int]]:
    """The first row of each sequence and the one behind its last. Waits for the device."""
    return list(itertools.pairwise(cu.tolist()))


def flex_mask(num_rows: int, cu_main: Tensor, cu_suffix_q: Tensor, cu_suffix_k: Tensor, suffix_k_index: Tensor) -> Any:
    """What each row of a pack sees, as FlexAttention's BlockMask: its own sequence up to itself, and for a row of a
    suffix the prefix, rows [first, stop) of the pack. Arguments as in attention.PairSeqParams."""
    row = torch.arange(num_rows, device=cu_main.device)
    ends = torch.cat([cu_main[1:], cu_main[-1] + cu_suffix_q[1:]])
    sequence = torch.searchsorted(ends, row, right=True)
    num_prefix = (cu_suffix_k.diff() - cu_suffix_q.diff()).long()
    of_main = cu_main.new_zeros(len(cu_main) - 1, dtype=torch.long)
    first_key = suffix_k_index[cu_suffix_k[:-1].long()]
    first = torch.cat([of_main, first_key])[sequence]
    stop = torch.cat([of_main, first_key + num_prefix])[sequence]

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = (sequence[query] == sequence[key]) & (key <= query)
        return own | ((key >= first[query]) & (key < stop[query]))

    create = _flex_function("create_block_mask", cu_main.device)
    return create(sees, None, None, num_rows, num_rows, device=str(cu_main.device))


def flex(query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float) -> Tensor:
    """query [T, N, D], key and value [T, G, D] -> [T, N, D], in one kernel that skips the mask's empty blocks."""
    call = _flex_function("flex_attention", query.device)
    heads_first = (x.transpose(0, 1)[None] for x in (query, key, value))
    gqa = query.shape[1] != key.shape[1]
    return call(*heads_first, block_mask=mask, scale=scale, enable_gqa=gqa)[0].transpose(0, 1)


@lru_cache
def _flex_function(name: str, device: torch.device) -> Any:
    """On CUDA compiled, without which the one computes and the other masks every row against every other."""
    function = getattr(importlib.import_module("torch.nn.attention.flex_attention"), name)
    return torch.compile(function, dynamic=True) if device.type == "cuda" else function

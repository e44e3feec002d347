"""Attention kernels for CUDA, by the names of the recipe key model.attention.

Most are one call over sequences of several lengths, causal and aligned at the last key, so that the last query of a
sequence sees every key of it (`Varlen`). FlexAttention takes a whole pack and a mask of it instead, and SDPA one
sequence a call.

Shapes: T positions of a pack, N query heads, G key-value heads, D head dimension.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from spot_megatron.errors import RecipeError
from spot_megatron.parallel.installed import import_problem

# (query [queries, N, D], key, value [keys, G, D], int32 offsets of the sequences in queries and in keys, the longest of
# each, scale) -> [queries, N, D]
Varlen = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, float], Tensor]

# In order of preference, by what is published of their speed; benchmarks/attention.py measures them.
PREFERRED = ("flash3", "flash2", "torch", "flex", "sdpa")
KERNELS = (*PREFERRED, "engine")
FLASH3_MODULES = ("flash_attn_interface", "flash_attn_3.flash_attn_interface")  # it has been installed under two names
# Not cuDNN's, which plans every sequence length anew.
SDPA_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def pick_kernel(wanted: str, dtype: torch.dtype) -> str:
    """The kernel that a CUDA device uses for `dtype`; `wanted` is one of them, or "auto".

    Raises:
        RecipeError: the wanted one is not installed, or does not know the data type.
    """
    if wanted == "auto":
        return "sdpa" if dtype == torch.float32 else _fastest()
    if dtype == torch.float32 and wanted not in ("flex", "sdpa"):
        raise RecipeError(f"model.attention={wanted} computes in 16 bits; with precision.dtype=fp32 set it to auto")
    problem = kernel_problem(wanted)
    if problem:
        raise RecipeError(f"model.attention={wanted}: {problem}; set it to auto, or repair the installation")
    return wanted


def _fastest() -> str:
    """The first of PREFERRED that runs here. Warns of one that is installed and broken: without it training is slow."""
    for name in PREFERRED:
        problem = kernel_problem(name)
        if problem is None:
            return name
        if "its import fails" in problem:
            warnings.warn(f"attention kernel {name}: {problem}; another one is used", stacklevel=3)
    raise AssertionError("SDPA runs everywhere")


def kernel_problem(name: str) -> str | None:
    """Why a kernel cannot run here; None if it can."""
    if name == "flash3":
        problems = [import_problem(module) for module in FLASH3_MODULES]
        if None in problems:
            on_hopper = torch.cuda.get_device_capability()[0] == 9
            return None if on_hopper else "FlashAttention-3 runs on Hopper GPUs only"
        return f"FlashAttention-3 {max(map(str, problems), key=len)}"  # the module that is there says what is broken
    if name in ("flash2", "engine"):
        package, module = {
            "flash2": ("flash-attn", "flash_attn"),
            "engine": ("Transformer Engine", "transformer_engine.pytorch"),
        }[name]
        problem = import_problem(module)
        return problem and f"{package} {problem}"
    if name == "torch" and import_problem("torch.nn.attention.varlen"):
        return f"PyTorch {torch.__version__} has no varlen_attn, which came with 2.10"
    return None


def varlen_kernel(name: str) -> Varlen:
    """The call behind a name; all but "flex" and "sdpa" have one."""
    return {"flash3": _flash3, "flash2": _flash2, "engine": _engine, "torch": _torch}[name]


def _flash3(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float
) -> Tensor:
    module = importlib.import_module(next(name for name in FLASH3_MODULES if import_problem(name) is None))
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

    # PyTorch 2.10 and 2.11 pass fewer key-value heads on to the same kernel without being asked.
    attend = partial(varlen_attn, enable_gqa=q.shape[1] != k.shape[1]) if _asks_for_gqa() else varlen_attn
    # A window without a right side is a causal mask, aligned at the last key as in flash-attn.
    out = attend(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=(-1, 0))
    assert isinstance(out, Tensor)  # a pair only when the log-sum-exp is asked for
    return out


@lru_cache
def _asks_for_gqa() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


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


def sdpa(
    query: Tensor, key: Tensor, value: Tensor, mains: list[slice], suffixes: list[tuple[slice, slice]], scale: float
) -> Tensor:
    """PyTorch's SDPA, a call a sequence: on any device and data type. Arguments as in model/attention/cpu.py."""
    outputs = []
    with sdpa_kernel(SDPA_BACKENDS):
        for own, prefix in [*((main, slice(0, 0)) for main in mains), *suffixes]:
            keys, values = (torch.cat([x[prefix], x[own]]) for x in (key, value))
            square = prefix.start == prefix.stop
            # SDPA's is_causal aligns at the first key, which is the same only for as many queries as keys.
            out = F.scaled_dot_product_attention(
                query[own].transpose(0, 1)[None],
                keys.transpose(0, 1)[None],
                values.transpose(0, 1)[None],
                attn_mask=None if square else causal_lower_right(own.stop - own.start, len(keys)),
                is_causal=square,
                scale=scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
            outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def flex_mask(
    num_positions: int, cu_main: Tensor, cu_suffix_q: Tensor, cu_suffix_k: Tensor, suffix_k_position: Tensor
) -> Any:
    """The keys visible to each position, as FlexAttention's BlockMask: its own sequence up to itself, and for one of a
    suffix the prefix, positions [first, stop) of the pack. Arguments as in PairSeqParams."""
    position = torch.arange(num_positions, device=cu_main.device)
    ends = torch.cat([cu_main[1:], cu_main[-1] + cu_suffix_q[1:]])
    sequence = torch.searchsorted(ends, position, right=True)
    num_prefix = (cu_suffix_k.diff() - cu_suffix_q.diff()).long()
    of_main = cu_main.new_zeros(len(cu_main) - 1, dtype=torch.long)
    first_key = suffix_k_position[cu_suffix_k[:-1].long()]
    first = torch.cat([of_main, first_key])[sequence]
    stop = torch.cat([of_main, first_key + num_prefix])[sequence]

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = (sequence[query] == sequence[key]) & (key <= query)
        return own | ((key >= first[query]) & (key < stop[query]))

    create = _flex_function("create_block_mask", cu_main.device)
    return create(sees, None, None, num_positions, num_positions, device=str(cu_main.device))


def flex(query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float) -> Tensor:
    """query [T, N, D], key and value [T, G, D] -> [T, N, D], in one kernel that skips the mask's empty blocks."""
    call = _flex_function("flex_attention", query.device)
    heads_first = (x.transpose(0, 1)[None] for x in (query, key, value))
    gqa = query.shape[1] != key.shape[1]
    # Inductor takes a pack of under 128 positions for decoding, a kernel that knows no grouped heads of this mask.
    options = {"FORCE_USE_FLEX_ATTENTION": True}
    out = call(*heads_first, block_mask=mask, scale=scale, enable_gqa=gqa, kernel_options=options)
    return out[0].transpose(0, 1)


@lru_cache
def _flex_function(name: str, device: torch.device) -> Any:
    """On CUDA compiled, without which one computes and the other masks every position against every other."""
    function = getattr(importlib.import_module("torch.nn.attention.flex_attention"), name)
    return torch.compile(function, dynamic=True) if device.type == "cuda" else function

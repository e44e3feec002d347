"""Differences and defects of Megatron-Core 0.16.1 to 0.19.2, recognised by its code, not by a version number.

The rest of the project is written for all of these versions alike.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor


def mark_split_weights(model: torch.nn.Module) -> None:
    """Marks the weights that tensor ranks split, which before 0.17 happens only when they are also initialised.

    Without the mark the gradient norm counts only the first rank's shard of them.
    """
    split_dims = {
        tensor_parallel.VocabParallelEmbedding: 0,
        tensor_parallel.ColumnParallelLinear: 0,
        tensor_parallel.RowParallelLinear: 1,
    }
    for module in model.modules():
        dim = next((dim for kind, dim in split_dims.items() if isinstance(module, kind)), None)
        if dim is not None and module.weight is not None and not hasattr(module.weight, "tensor_model_parallel"):
            tensor_parallel.set_tensor_model_parallel_attributes(module.weight, True, dim, 1)


def ready_to_load(part: DistributedOptimizer) -> None:
    """Has an optimizer take a checkpoint's states as Megatron's fully reshardable loader hands them out.

    torch.optim.AdamW: Megatron reads its step count, which it has not before its first step; the setter of 0.16 expects
    a `step` that the loader leaves out. Transformer Engine's with remainders: the loader brings them, whole numbers, in
    fp32, and the optimizer takes them in int16 only.
    """
    inner = part.optimizer
    if isinstance(inner, torch.optim.AdamW):
        if not inner.state:
            for group in inner.param_groups:
                for param in group["params"]:
                    zeros = {name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}
                    inner.state[param] = {"step": torch.zeros((), dtype=torch.float32, device=param.device), **zeros}
        part._set_main_param_and_optimizer_states = partial(_copy_states, part)
    elif getattr(inner, "store_param_remainders", False):
        part._set_main_param_and_optimizer_states = partial(_set_remainders, part._set_main_param_and_optimizer_states)


@torch.no_grad()
def _copy_states(part: DistributedOptimizer, model_param: Tensor, tensors: dict[str, Tensor]) -> None:
    group, order = part.model_param_group_index_map[model_param]
    main_param = part.optimizer.param_groups[group]["params"][order]
    targets = {"param": main_param, **part.optimizer.state[main_param]}
    for name, value in tensors.items():
        targets[name].copy_(value)


def _set_remainders(megatrons_setter: Any, model_param: Tensor, tensors: dict[str, Tensor]) -> None:
    megatrons_setter(model_param, {**tensors, "param": tensors["param"].to(torch.int16)})


@contextmanager
def offsets_without_padding(parts: Sequence[DistributedOptimizer]) -> Iterator[None]:
    """While optimizer states are taken apart into parameters, for a checkpoint or from one.

    Up to 0.19.2 Megatron-Core joins the states of a buffer's buckets without the padding behind each bucket, and then
    looks parameters up at offsets that count it: everything behind the first padded bucket would be another
    parameter's. A bucket is padded if its size is not a multiple of 128 and of the data-parallel size: in small models,
    or at sizes like 6. Later versions adjust the offsets themselves (Megatron-LM pull request 5077); both adjustments
    together would be as wrong as none.
    """
    if _adjusts_offsets():
        yield
        return
    buffers = list({id(buffer): buffer for part in parts for buffer in part.buffers}.values())
    padded = [buffer.param_index_map for buffer in buffers]
    for buffer in buffers:
        ends = list(itertools.accumulate(bucket.numel_unpadded for bucket in buffer.buckets))
        shift = [bucket.offset - end + bucket.numel_unpadded for bucket, end in zip(buffer.buckets, ends, strict=True)]
        buffer.param_index_map = {
            param: (start - shift[bucket], end - shift[bucket], bucket)
            for param, (start, end, bucket) in buffer.param_index_map.items()
        }
    try:
        yield
    finally:
        for buffer, index_map in zip(buffers, padded, strict=True):
            buffer.param_index_map = index_map


def _adjusts_offsets() -> bool:
    return "padding_adjustment" in inspect.getsource(DistributedOptimizer.sharded_param_state_fully_reshardable)


def own_step_counters(part: DistributedOptimizer) -> None:
    """The loaders of all versions give every parameter the same step tensor, which torch.optim.AdamW then advances once
    per parameter."""
    for state in part.optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()

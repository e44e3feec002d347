"""AdamW, gradient norm and clipping by PyTorch alone.

Megatron-Core takes them from Transformer Engine or Apex if one of them can be imported, whatever the device. Otherwise
its own stand-ins read the norm of every parameter's gradient on the host and scale gradients through a copy of each.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import optimizer as mcore_optimizer
from megatron.core import utils
from megatron.core.optimizer import clip_grads, distrib_optimizer
from megatron.core.optimizer import optimizer as base_optimizer
from torch import Tensor


def use_torch_adamw() -> None:
    """Has Megatron-Core build torch.optim.AdamW even where Transformer Engine or Apex is importable: their kernels
    run on CUDA devices only."""
    mcore_optimizer.Adam = torch.optim.AdamW
    mcore_optimizer.USING_PYTORCH_OPTIMIZER = True
    distrib_optimizer.Adam = torch.optim.Adam
    base_optimizer.multi_tensor_applier = utils.local_multi_tensor_applier
    base_optimizer.multi_tensor_scale_impl = utils.local_multi_tensor_scale
    clip_grads.multi_tensor_applier = utils.local_multi_tensor_applier
    clip_grads.multi_tensor_scale_tensor_impl = None
    clip_grads.l2_norm_impl = utils.local_multi_tensor_l2_norm
    replace_stand_ins()


def replace_stand_ins() -> None:
    """Replaces Megatron-Core's stand-ins for Apex, if it uses them, by PyTorch's multi-tensor functions."""
    if clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = _norm
        clip_grads.multi_tensor_scale_impl = _scale_in_place


def _norm(chunk_size: int, overflow: Any, tensor_lists: list[list[Tensor]], *args: Any) -> tuple[Tensor, None]:
    """([1] norm over all tensors, on their device; None)."""
    del chunk_size, overflow, args
    return torch.nn.utils.get_total_norm(tensor_lists[0]).view(1), None


def _scale_in_place(chunk_size: int, overflow: Any, tensor_lists: list[list[Tensor]], factor: float) -> None:
    """Clipping hands over the gradients as both source and target."""
    del chunk_size, overflow
    sources, targets = tensor_lists
    assert sources is targets
    torch._foreach_mul_(targets, factor)

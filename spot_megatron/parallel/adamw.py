"""AdamW and clipping by PyTorch alone.

Megatron-Core takes them from Transformer Engine or Apex if one of them can be imported, whatever the device. Otherwise
its own stand-in scales gradients through a copy of each.
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
    clip_grads.multi_tensor_scale_impl = utils.local_multi_tensor_scale
    clip_in_place()


def clip_in_place() -> None:
    """Replaces Megatron-Core's stand-in for Apex, if it is used, by PyTorch's multi-tensor product."""
    if clip_grads.multi_tensor_scale_impl is utils.local_multi_tensor_scale:
        clip_grads.multi_tensor_scale_impl = _scale_in_place


def _scale_in_place(chunk_size: int, overflow: Any, tensor_lists: list[list[Tensor]], factor: float) -> None:
    """Clipping hands over the gradients as both source and target."""
    del chunk_size, overflow
    sources, targets = tensor_lists
    assert sources is targets
    torch._foreach_mul_(targets, factor)

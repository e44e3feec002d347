"""Word embeddings whose backward touches only the rows that occur.

PyTorch's makes a gradient of the whole table, for Qwen3 as large as a tenth of a small model, which Megatron's DDP then
adds to its buffer. Here each row's gradient goes into that buffer directly.

Shapes: T positions of a pack, H hidden size, Vp rows of this rank's weight shard.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def embed(ids_T: Tensor, weight_VpH: Tensor, vocab_start: int) -> Tensor:
    """[T, H]: the rows of `ids_T` that this rank owns, zeros for the others.

    Under Megatron's DDP with float32 gradients the weight's gradient is added to `weight.main_grad` in backward.
    """
    return _Embed.apply(ids_T - vocab_start, weight_VpH)


def placeholder_gradient(weight: Tensor) -> Tensor:
    """A stand-in for autograd, for a gradient that is in `weight.main_grad` already, as in Megatron's own layers: DDP
    counts the weight as ready and adds nothing."""
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.empty_like(weight)


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local_T: Tensor, weight_VpH: Tensor) -> Tensor:
        owned_T1 = ((local_T >= 0) & (local_T < weight_VpH.shape[0]))[:, None]
        local_T = local_T.clamp(0, weight_VpH.shape[0] - 1)
        ctx.save_for_backward(local_T, owned_T1, weight_VpH)
        return F.embedding(local_T, weight_VpH).mul_(owned_T1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        local_T, owned_T1, weight_VpH = ctx.saved_tensors
        grad_TH = grads[0] * owned_T1
        grad_TH = grad_TH.to(torch.promote_types(grad_TH.dtype, torch.float32))
        main_grad = getattr(weight_VpH, "main_grad", None)
        if main_grad is not None and main_grad.dtype == grad_TH.dtype:
            main_grad.index_add_(0, local_T, grad_TH)
            return None, placeholder_gradient(weight_VpH)
        # A row that occurs often is not summed up in 16 bits, which stop growing at 256 equal terms.
        grad_weight_VpH = torch.zeros_like(weight_VpH, dtype=grad_TH.dtype).index_add_(0, local_T, grad_TH)
        return None, grad_weight_VpH.to(weight_VpH.dtype)

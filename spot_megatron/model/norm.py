"""RMSNorm for the layer spec without Transformer Engine; Megatron's own wrapper refuses sequence parallelism."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; statistics in float32 or better."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__()
        assert config.normalization == "RMSNorm" and not config.layernorm_zero_centered_gamma
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Its gradient is partial on each tensor rank when the sequence is split; Megatron sums those that say so.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    """Keeps its input and a scale a position; the formula's autograd would keep three tensors as large as the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """With n = scale * x: dx = scale * (g w - n mean(g w n)), dw = sum over positions of g n."""
        x, weight, scale = ctx.saved_tensors
        grad = grads[0].to(scale.dtype)
        normed = x.to(scale.dtype) * scale
        grad_weight = (grad * normed).sum(dim=tuple(range(x.dim() - 1)))
        grad_normed = grad * weight
        grad_x = grad_normed.sub_(normed * (grad_normed * normed).mean(dim=-1, keepdim=True)).mul_(scale)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None

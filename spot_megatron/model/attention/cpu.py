"""The pair layout's attention on a CPU, where PyTorch's flash kernel aligns a causal mask at the first key.

Call 2 is therefore two kernel calls, R to all of P where P lies and R causally to itself, joined by their log-sum-exps:
no keys are gathered and no mask is made.

Shapes: T positions of a pack, N query heads, G key-value heads, D head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def cpu_attention(
    query: Tensor, key: Tensor, value: Tensor, mains: list[slice], suffixes: list[tuple[slice, slice]], scale: float
) -> Tensor:
    """query [T, N, D], key and value [T, G, D] -> [T, N, D].

    Args:
        mains: positions of each sequence of call 1, which attend causally within it.
        suffixes: of each sequence of call 2, its positions and those of its prefix (none for padding). Every position
            of the pack is in one of `mains` or `suffixes`.
    """
    return _CpuAttention.apply(query, key, value, mains, suffixes, scale)


class _CpuAttention(torch.autograd.Function):
    """Attention over [P R] is the mean of attention over P and over R, weighted by their shares of the sum of
    exponentials. Given the joint output and log-sum-exp, the kernel's backward gives that part of the joint gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mains: list[slice],
        suffixes: list[tuple[slice, slice]],
        scale: float,
    ) -> Tensor:
        out_TND = torch.empty_like(query, memory_format=torch.contiguous_format)
        lses = []

        def attend(queries: slice, keys: slice, causal: bool) -> tuple[Tensor, Tensor]:
            """([queries, N, D], [1, N, queries])"""
            q, k, v = _heads_first(query[queries]), _heads_first(key[keys]), _heads_first(value[keys])
            out, lse = _flash(q, k, v, 0.0, causal, scale=scale)
            return out[0].transpose(0, 1), lse

        for main in mains:
            out_TND[main], lse = attend(main, main, causal=True)
            lses.append(lse)
        for suffix, prefix in suffixes:
            own, lse = attend(suffix, suffix, causal=True)
            if prefix.stop > prefix.start:  # padding has no prefix
                seen, prefix_lse = attend(suffix, prefix, causal=False)
                share = torch.sigmoid(lse - prefix_lse)[0].T.unsqueeze(-1).to(own.dtype)
                own = torch.lerp(seen, own, share)
                lse = torch.logaddexp(lse, prefix_lse)
            out_TND[suffix] = own
            lses.append(lse)
        ctx.save_for_backward(query, key, value, out_TND, *lses)
        ctx.mains, ctx.suffixes, ctx.scale = mains, suffixes, scale
        return out_TND

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, *lses = ctx.saved_tensors
        grad_query, grad_key, grad_value = (
            torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)
        )

        def attend(queries: slice, keys: slice, lse: Tensor, causal: bool) -> tuple[Tensor, ...]:
            """Gradients of this part: [queries, N, D], [keys, G, D], [keys, G, D]."""
            q, k, v = _heads_first(query[queries]), _heads_first(key[keys]), _heads_first(value[keys])
            o, grad_o = _heads_first(out[queries]), _heads_first(grads[0][queries])
            parts = _flash_backward(grad_o, q, k, v, o, lse, 0.0, causal, scale=ctx.scale)
            return tuple(part[0].transpose(0, 1) for part in parts)

        # Every position is in one causal part, which sets its gradients; the parts of prefixes add to them.
        causal_parts = [*ctx.mains, *(suffix for suffix, _ in ctx.suffixes)]
        for part, lse in zip(causal_parts, lses, strict=True):
            grad_query[part], grad_key[part], grad_value[part] = attend(part, part, lse, causal=True)
        for (suffix, prefix), lse in zip(ctx.suffixes, lses[len(ctx.mains) :], strict=True):
            if prefix.stop > prefix.start:
                parts = attend(suffix, prefix, lse, causal=False)
                grad_query[suffix] += parts[0]
                grad_key[prefix] += parts[1]
                grad_value[prefix] += parts[2]
        return grad_query, grad_key, grad_value, None, None, None


def _heads_first(part: Tensor) -> Tensor:
    """[positions, heads, D] -> [1, heads, positions, D], a view."""
    return part.transpose(0, 1)[None]

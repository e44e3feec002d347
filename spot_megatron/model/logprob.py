"""Log-probabilities of target tokens from hidden states, without ever holding [tokens, vocabulary] of a long pack.

The LM head runs over tiles of the vocabulary, all scored positions at a time, with an online softmax. So a tile of
logits stays in the cache, and backward writes each row of the weight's gradient once, straight into Megatron's gradient
buffer where there is one. What backward needs of a tile, its softmax, is kept for as many tiles as fit a bound, and
computed again for the others. Statistics are in float32 or better whatever the model's dtype. The head's weight may be
split over the vocabulary.

Shapes: S scored positions, H hidden size, Vp rows of this rank's weight shard, W rows of a tile.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spot_megatron.model.embedding import placeholder_gradient
from spot_megatron.model.head_memory import CPU_HEAD_MEMORY, HeadMemory, gpu_head_memory

TILE_MULTIPLE = 128  # rows of a tile: at other widths cuBLAS has slower bf16 kernels, or none for tensor cores


def head_memory(device: torch.device) -> HeadMemory:
    """The bounds on this device."""
    if device.type == "cuda":
        return gpu_head_memory(torch.cuda.get_device_properties(device).total_memory)
    return CPU_HEAD_MEMORY


def linear_logprob(
    hidden_SH: Tensor,
    weight_VpH: Tensor,
    target_S: Tensor,
    *,
    vocab_size: int,
    vocab_start: int = 0,
    group: dist.ProcessGroup | None = None,
    memory: HeadMemory | None = None,
    is_embedding: bool = False,
) -> Tensor:
    """log softmax(hidden @ weight.T)[target], the softmax over the first `vocab_size` rows of the whole weight.

    Args:
        hidden_SH: hidden state of each scored position; every rank of `group` holds all of them.
        weight_VpH: this rank's rows of the head, rows [vocab_start, vocab_start + Vp) of the whole; rows from
            `vocab_size` on are padding and take no probability. Under Megatron's DDP its gradient is added to
            `weight.main_grad` in backward.
        target_S: token ids in [0, vocab_size).
        group: ranks that split the vocabulary; None when one rank holds it all.
        memory: bounds; None for `head_memory` of the device.
        is_embedding: the weight is also this rank's embedding, whose backward follows and reports to DDP that the
            gradient is complete.

    Returns:
        [S] log-probabilities in nats, float32 (float64 for float64 inputs). The gradient with respect to `hidden_SH`
        is this rank's part of a sum over `group`.
    """
    num_real = max(0, min(vocab_size - vocab_start, weight_VpH.shape[0]))
    memory = memory or head_memory(hidden_SH.device)
    num_scored = max(1, hidden_SH.shape[0])
    width = tile_width(num_scored, memory)
    tiles = [(start, min(start + width, num_real)) for start in range(0, num_real, width)]
    kept_columns = memory.kept_bytes // (num_scored * hidden_SH.element_size()) if torch.is_grad_enabled() else 0
    num_kept = sum(stop <= kept_columns for _, stop in tiles)
    return _LinearLogprob.apply(hidden_SH, weight_VpH, target_S - vocab_start, group, tiles, num_kept, is_embedding)


def tile_width(num_scored: int, memory: HeadMemory) -> int:
    """Rows of the weight that are multiplied at a time."""
    width = max(1, memory.tile_elements // num_scored)
    return width if width < TILE_MULTIPLE else width - width % TILE_MULTIPLE


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_SH: Tensor,
        weight_VpH: Tensor,
        local_S: Tensor,
        group: dist.ProcessGroup | None,
        tiles: list[tuple[int, int]],
        num_kept: int,
        is_embedding: bool,
    ) -> Tensor:
        """`local_S`: targets as rows of this rank's shard; those of other ranks lie outside.
        `num_kept`: tiles, the first ones, whose softmax is kept for backward."""
        num_scored, dtype = hidden_SH.shape[0], torch.promote_types(hidden_SH.dtype, torch.float32)
        largest_S = hidden_SH.new_full((num_scored,), -torch.inf, dtype=dtype)
        sum_S = torch.zeros_like(largest_S)  # of exp(logit - largest) over the tiles so far
        picked_S = torch.zeros_like(largest_S)  # the target's logit where this rank owns it
        kept = hidden_SH.new_empty(num_scored * tiles[num_kept - 1][1]) if num_kept else None
        kept_largest: list[Tensor] = []
        for index, (start, stop) in enumerate(tiles):
            logits_SW = (hidden_SH @ weight_VpH[start:stop].T).to(dtype)
            column_S1, owned_S = _column(local_S, start, stop)
            picked_S += torch.where(owned_S, logits_SW.gather(1, column_S1)[:, 0], 0.0)
            new_largest_S = torch.maximum(largest_S, logits_SW.amax(dim=1))
            exp_SW = logits_SW.sub_(new_largest_S[:, None]).exp_()
            sum_S = sum_S * torch.exp(largest_S - new_largest_S) + exp_SW.sum(dim=1)
            largest_S = new_largest_S
            if kept is not None and index < num_kept:
                kept[num_scored * start : num_scored * stop].view_as(exp_SW).copy_(exp_SW)
                kept_largest.append(largest_S)
        lse_S = largest_S + torch.log(sum_S)

        if group is not None and dist.get_world_size(group) > 1:
            stats_2S = torch.stack([lse_S, picked_S])
            all_stats = [torch.empty_like(stats_2S) for _ in range(dist.get_world_size(group))]
            dist.all_gather(all_stats, stats_2S, group=group)
            gathered_G2S = torch.stack(all_stats)
            lse_S, picked_S = torch.logsumexp(gathered_G2S[:, 0], dim=0), gathered_G2S[:, 1].sum(dim=0)

        # Saved tensors, unlike attributes of ctx, are freed as soon as backward has run.
        ctx.save_for_backward(hidden_SH, weight_VpH, local_S, lse_S, kept, *kept_largest)
        ctx.tiles, ctx.is_embedding = tiles, is_embedding
        return picked_S - lse_S

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """With p the softmax and g the incoming gradient, d logits = g (onehot(target) - p), a scalar a position times
        what forward knows: g scales the narrow operands of both products, never a tile."""
        (grad_S,) = grads
        hidden_SH, weight_VpH, local_S, lse_S, kept, *kept_largest = ctx.saved_tensors
        num_scored, dtype = hidden_SH.shape[0], lse_S.dtype
        minus_hidden_SH = (hidden_SH * -grad_S[:, None]).to(hidden_SH.dtype)
        grad_hidden_SH = torch.zeros_like(hidden_SH, dtype=dtype)
        main_grad = getattr(weight_VpH, "main_grad", None)
        grad_weight_VpH: Tensor | None = main_grad
        if main_grad is None and ctx.needs_input_grad[1]:
            grad_weight_VpH = torch.zeros_like(weight_VpH)
        for index, (start, stop) in enumerate(ctx.tiles):
            tile_WH = weight_VpH[start:stop]
            if index < len(kept_largest):
                exp_SW = kept[num_scored * start : num_scored * stop].view(num_scored, stop - start)
                softmax_SW = exp_SW * torch.exp(kept_largest[index] - lse_S)[:, None]
            else:
                softmax_SW = (hidden_SH @ tile_WH.T).to(dtype).sub_(lse_S[:, None]).exp_()
            column_S1, owned_S = _column(local_S, start, stop)
            residual_SW = softmax_SW.scatter_add_(1, column_S1, -owned_S[:, None].to(dtype)).to(hidden_SH.dtype)
            _add_product(grad_hidden_SH, residual_SW, tile_WH)
            if grad_weight_VpH is not None:
                _add_product(grad_weight_VpH[start:stop], residual_SW.T, minus_hidden_SH)
        grad_hidden_SH = grad_hidden_SH.mul_(-grad_S[:, None]).to(hidden_SH.dtype)
        if main_grad is not None:
            grad_weight_VpH = None if ctx.is_embedding else placeholder_gradient(weight_VpH)
        return grad_hidden_SH, grad_weight_VpH, None, None, None, None, None


def _column(local_S: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """([S, 1] each position's target as a column of the tile, [S] whether it is one); 0 where it is not."""
    owned_S = (local_S >= start) & (local_S < stop)
    return torch.where(owned_S, local_S - start, 0)[:, None], owned_S


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, inside the product where the dtypes allow it."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right

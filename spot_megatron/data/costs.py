"""Relative compute time of a pair: the weights by which the sampler balances data-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from spot_megatron.hf.config import HFModelConfig

# Attention kernels reach fewer FLOP/s than matrix products, and their backward pass has 5 products to forward's 2. On
# CPU (benchmarks/README.md, growth): 105 and 92 GFLOP/s of attention against 145 of a matrix product.
ATTENTION_SLOWDOWN = 1.6
# The backward pass of the LM head recomputes the logits: 4 products, where a layer's matrix has 3.
HEAD_PRODUCTS = 4 / 3
# The forward pass's share of a layer's time: 1 of 3 products of a matrix, 2 of 7 of attention.
FORWARD, ATTENTION_FORWARD = 1 / 3, 2 / 7

Count = TypeVar("Count", float, np.ndarray)


@dataclass(frozen=True)
class CostModel:
    """Compute time in units of one position through every matrix of every layer, forward and backward."""

    product: float  # of a key-query product of causal attention, in all layers and heads
    scored: float  # of a scored target in the LM head

    def of(
        self, num_positions: Count, num_products: Count, num_scored: Count, recomputed_above: int | None = None
    ) -> Count:
        """Cost of a pair or an array of pairs; above `recomputed_above` positions the layers run forward twice."""
        matrices, attention = num_positions, self.product * num_products
        if recomputed_above is not None:
            again = num_positions > recomputed_above
            matrices, attention = matrices * (1 + FORWARD * again), attention * (1 + ATTENTION_FORWARD * again)
        return matrices + attention + self.scored * num_scored


def cost_model(hf: HFModelConfig) -> CostModel:
    """From the model's shape: forward, 2 operations a parameter and position, 4 a product and head dimension."""
    experts = len(hf.moe_layers) * hf.experts_per_token * hf.expert_weights
    position = 2 * (hf.num_layers * hf.attention_weights + len(hf.dense_layers) * hf.mlp_weights + experts)
    return CostModel(
        product=ATTENTION_SLOWDOWN * 4 * hf.num_layers * hf.query_width / position,
        scored=HEAD_PRODUCTS * 2 * hf.embedding_weights / position,
    )

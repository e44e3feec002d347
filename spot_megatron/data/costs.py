"""What a pair costs to compute, relative to others: the weights by which the sampler deals pairs over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from spot_megatron.hf.config import HFModelConfig

# Attention kernels do less per second than matrix products, and in backward 5 products for forward's 2. Measured on
# CPU (benchmarks/README.md, growth): 105 and 92 GFLOP/s of attention against 145 of a matrix product.
ATTENTION_SLOWDOWN = 1.6
# Backward of the LM head computes most logits again: 4 products where a layer's matrix has 3.
HEAD_PRODUCTS = 4 / 3


# The forward pass's share of a layer's time: 1 of 3 products of a matrix, 2 of 7 of attention.
FORWARD, ATTENTION_FORWARD = 1 / 3, 2 / 7

Count = TypeVar("Count", float, np.ndarray)


@dataclass(frozen=True)
class CostModel:
    """Compute time in rows: one row of a pack through every matrix of every layer, forward and backward, costs 1."""

    product: float  # of a key-query product of causal attention, in all layers and heads
    scored: float  # of a scored row in the LM head

    def of(self, num_rows: Count, num_products: Count, num_scored: Count, recomputed_above: int | None = None) -> Count:
        """The cost of a pair, or of an array of them; layers of more rows than `recomputed_above` run forward twice."""
        matrices, attention = num_rows, self.product * num_products
        if recomputed_above is not None:
            again = num_rows > recomputed_above
            matrices, attention = matrices * (1 + FORWARD * again), attention * (1 + ATTENTION_FORWARD * again)
        return matrices + attention + self.scored * num_scored


def cost_model(hf: HFModelConfig) -> CostModel:
    """From the model's shape: 2 operations a parameter and row, 4 a product and head dimension, forward."""
    experts = len(hf.moe_layers) * hf.experts_per_token * hf.expert_weights
    row = 2 * (hf.num_layers * hf.attention_weights + len(hf.dense_layers) * hf.mlp_weights + experts)
    return CostModel(
        product=ATTENTION_SLOWDOWN * 4 * hf.num_layers * hf.query_width / row,
        scored=HEAD_PRODUCTS * 2 * hf.embedding_weights / row,
    )

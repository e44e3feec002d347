"""Seconds of a rank for one position, one key-query product or one scored target, in a layer or in the LM head.

FLOPs follow the usual count: 6 a matrix parameter and position, 12 a query-key product, head and layer (forward and
backward, backward twice the forward).
"""

from __future__ import annotations

import numpy as np

from spot_megatron.data.costs import FORWARD
from spot_megatron.hf.config import HFModelConfig
from spot_megatron.model.head_memory import gpu_head_memory
from spot_megatron.plan.hardware import Software
from spot_megatron.plan.inputs import PlanInput
from spot_megatron.plan.trained import adapter_widths

BLOCKWISE_SPEED = 0.9  # of tensorwise FP8 matrices: scaling a block at a time (assumed)
EXPERT_HALF_WIDTH = 730.0  # expert width at which grouped matrices reach half of a dense one's rate: Qwen3-30B-A3B
ROUTING_IMBALANCE = 1.04  # natural against forced-even routing, Qwen3-30B-A3B: 199 and 208 TFLOP/s (Megatron-Bridge)

# Seconds that a host takes to launch one layer's kernels, forward and backward. Experts: Qwen3-30B-A3B on B200 does not
# fall below 4096 / 9691 s / 48 layers with micro-batches of 4096 tokens, and is 3 times as fast with larger ones
# (Megatron-Bridge 26.02). Tensor parallel: Llama-3-70B FP8 with TP8, 109 ms a micro-batch of 20 layers
# (Megatron-Bridge's notes on memory tuning). Dense without: about 250 launches at 10 microseconds (assumed).
HOST_SECONDS_DENSE = 2.5e-3
HOST_SECONDS_TENSOR = 5.4e-3
HOST_SECONDS_EXPERTS = 8.8e-3


def matrix_seconds(inputs: PlanInput) -> float:
    """An average layer's matrices for one position of a rank's share, forward and backward."""
    model, p = inputs.model, inputs.split.parallel
    moe_share = model.moe_share
    dense = (model.attention_weights + (1 - moe_share) * model.mlp_weights) / p.tensor
    seconds = 6 * (dense / _block_rate(inputs) + moe_share * model.router_weights / p.tensor / inputs.gpu.gemm("fp32"))
    if moe_share:
        # Published runs gain nothing from FP8 in experts of this size, so they are counted in bf16.
        reached = model.expert_ffn_size / (model.expert_ffn_size + EXPERT_HALF_WIDTH)
        grouped = inputs.gpu.gemm(inputs.precision.dtype) * reached
        # The expert ranks share the positions of all tensor ranks.
        active = model.experts_per_token * model.expert_weights / p.tensor
        seconds += 6 * moe_share * active * ROUTING_IMBALANCE / grouped
    return seconds


def _block_rate(inputs: PlanInput) -> float:
    """FLOP/s of the layers' matrices; tensorwise FP8 leaves the first and the last layer in bf16."""
    if inputs.precision.fp8 == "none":
        return inputs.gpu.gemm(inputs.precision.dtype)
    if inputs.precision.fp8 == "blockwise":
        return inputs.gpu.gemm("fp8") * BLOCKWISE_SPEED
    in_bf16 = 2 / inputs.model.num_layers
    return 1 / (in_bf16 / inputs.gpu.gemm("bf16") + (1 - in_bf16) / inputs.gpu.gemm("fp8"))


def attention_seconds(inputs: PlanInput) -> float:
    """One layer's attention for one query-key product, forward and backward."""
    rate = inputs.gpu.flash2 if inputs.software.pair_attention else inputs.gpu.attention
    if inputs.precision.dtype == "fp32":
        rate = inputs.gpu.fp32 * inputs.gpu.gemm_share_bf16
    return 12 * inputs.model.query_width / inputs.split.parallel.tensor / (rate * 1e12)


def elementwise_bytes(inputs: PlanInput) -> float:
    """Bytes that an average layer's memory-bound kernels move for one position, forward and backward."""
    model, p, software = inputs.model, inputs.split.parallel, inputs.software
    q, kv = model.query_width, model.key_value_width
    norms = 20 * model.hidden_size / inputs.split.sequence_shards  # two norms, two residual sums
    # Norms of queries and keys and their rotation, which unfused negates, joins, multiplies twice and adds.
    rotary = (8 if software.fused_rope else 30) * (q + kv)
    if software.pair_attention:
        rotary += 8 * kv + 4 * q  # the gathered prefix, the joined outputs
    activation = _activation_bytes(model, software)
    moe_share = model.moe_share
    widths = (1 - moe_share) * activation * model.intermediate_size
    widths += (
        moe_share * model.experts_per_token * (activation * model.expert_ffn_size + 16 * model.hidden_size)
    )  # permuting copies
    forward = norms + (rotary + widths) / p.tensor
    total = forward / FORWARD * inputs.element_bytes / 2
    # Adapters read their input and write outputs, which are joined and added; backward reads the gradient for A and B
    # and adds to the input's.
    in_width, out_width, _ = adapter_widths(inputs)
    total += inputs.element_bytes * (5 * in_width + 10 * out_width)
    if inputs.precision.fp8 != "none":  # inputs and output gradients are read, measured and written in both layouts
        total += 6 * (4 * model.hidden_size + 2 * q + 2 * kv + 3 * (1 - moe_share) * model.intermediate_size) / p.tensor
    return total


def _activation_bytes(model: HFModelConfig, software: Software) -> int:
    if not model.gated:
        return 4
    return 6 if software.fused_swiglu else 14  # SiLU, a sum with the offset 0, and the product, one after the other


def head_seconds(inputs: PlanInput, scored: np.ndarray, forward_only: bool) -> np.ndarray:
    """The LM head of micro-batches with `scored` targets: matrices, and the memory-bound work on their logits."""
    vocab = inputs.model.vocab_size / inputs.split.parallel.tensor  # logits of the padding are never computed
    product = 2 * vocab * inputs.model.hidden_size * scored / inputs.gpu.gemm(inputs.precision.dtype)
    logits = vocab * scored / inputs.bandwidth  # seconds a byte of each
    if forward_only:
        return product + 38 * logits
    if not inputs.software.tiled_head:
        return 3 * product + 20 * logits
    # model/logprob.py: backward computes again the logits whose softmax was not kept. Each tile's part of the hidden
    # gradient is written and added in fp32, the weight's once into Megatron's gradient buffer.
    head = gpu_head_memory(inputs.gpu.memory_bytes)
    kept_share = np.minimum(1.0, head.kept_bytes / np.maximum(inputs.element_bytes * vocab * scored, 1.0))
    sums = 2 * inputs.element_bytes + 8
    num_tiles = np.ceil(vocab * scored / head.tile_elements)
    moved = sums * inputs.model.hidden_size * (scored * num_tiles + vocab * (scored > 0)) / inputs.bandwidth
    products = 4 if inputs.lora.rank is None else 3  # a frozen weight has no gradient
    return (products - kept_share) * product + (50 + 18 * (1 - kept_share)) * logits + moved


def layer_comm(inputs: PlanInput, forward_only: bool, full: np.ndarray) -> dict[str, np.ndarray]:
    """Exposed collectives of an average layer, in seconds for one position of a rank's share.

    Args:
        full: 1 for each micro-batch whose layers are recomputed, else 0.
    """
    model, p, software = inputs.model, inputs.split.parallel, inputs.software
    hidden = model.hidden_size * inputs.element_bytes
    moe_share = model.moe_share
    passes = (1 if forward_only else 2) + full  # of all-to-alls, which are the same forward and backward

    # Full tensors gathered or scattered: forward 4; backward 6 with sequence parallelism (inputs again), 4 without.
    tensors = 4 if forward_only else 4 + (6 if p.sequence else 4) + 4 * full
    tensor = inputs.group(p.tensor, 1).ring(hidden) * tensors * (1 - moe_share / 2) * software.tensor_exposed

    heads = 2 * (model.query_width + model.key_value_width) * inputs.element_bytes / p.tensor
    context = inputs.group(p.context, p.tensor).all_to_all(heads) * passes
    expert = 2 * passes * moe_share * _dispatch_seconds(inputs, hidden / p.tensor) if p.expert > 1 else 0.0
    if p.expert_tensor > 1:
        group = inputs.group(p.expert_tensor, 1)
        expert += 2 * passes * moe_share * group.ring(model.experts_per_token * hidden / p.tensor * p.expert_tensor)
    parts = {"tensor": tensor, "context": context, "expert": expert}
    return {name: np.broadcast_to(np.asarray(seconds, dtype=float), full.shape) for name, seconds in parts.items()}


def _dispatch_seconds(inputs: PlanInput, position_bytes: float) -> float:
    """Seconds in which one position is sent to its experts, or back."""
    size, top_k = inputs.split.parallel.expert, inputs.model.experts_per_token
    group = inputs.group(size, inputs.split.parallel.expert_tensor)
    if not inputs.software.dispatch_once:
        return group.all_to_all(top_k * position_bytes)
    nodes = max(1, size // group.in_node)
    ranks_met, nodes_met = (n * (1 - (1 - 1 / n) ** top_k) for n in (size, nodes))
    inside = ranks_met * position_bytes * (size - 1) / size / group.nvlink
    return inside + nodes_met * (nodes - 1) / nodes * position_bytes / group.network


def host_seconds(inputs: PlanInput) -> float:
    """Seconds in which the host launches one layer, forward and backward: the least that the layer takes."""
    if inputs.model.moe_layers:
        return HOST_SECONDS_EXPERTS
    return HOST_SECONDS_TENSOR if inputs.split.parallel.tensor > 1 else HOST_SECONDS_DENSE

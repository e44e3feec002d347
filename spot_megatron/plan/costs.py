"""Seconds that one row, one key-query product or one scored target costs on a rank, in a layer or in the LM head.

FLOPs follow the usual count: 6 a matrix parameter and row, 12 a query-key product, head and layer (forward and
backward, backward twice the forward).
"""

from __future__ import annotations

import numpy as np

from spot_megatron.data.costs import FORWARD
from spot_megatron.plan.hardware import Software
from spot_megatron.plan.job import Job
from spot_megatron.plan.memory import head_buffers
from spot_megatron.plan.model_shapes import ModelShape

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


def matrix_seconds(job: Job) -> float:
    """An average layer's matrices for one row of a rank's share, forward and backward."""
    shape, p = job.shape, job.split.parallel
    moe_share = shape.num_moe_layers / shape.num_layers
    dense = (shape.attention_weights + (1 - moe_share) * shape.mlp_weights) / p.tensor
    seconds = 6 * (dense / _block_rate(job) + moe_share * shape.router_weights / p.tensor / job.gpu.gemm("fp32"))
    if moe_share:
        # Published runs gain nothing from FP8 in experts of this size, so they are counted in bf16.
        grouped = job.gpu.gemm(job.precision.dtype) * shape.expert_ffn / (shape.expert_ffn + EXPERT_HALF_WIDTH)
        active = (
            shape.top_k * shape.one_expert_weights / p.tensor
        )  # the ranks of the experts share all tensor ranks' rows
        seconds += 6 * moe_share * active * ROUTING_IMBALANCE / grouped
    return seconds


def _block_rate(job: Job) -> float:
    """FLOP/s of the layers' matrices; tensorwise FP8 leaves the first and the last layer in bf16."""
    if job.precision.fp8 == "none":
        return job.gpu.gemm(job.precision.dtype)
    if job.precision.fp8 == "blockwise":
        return job.gpu.gemm("fp8") * BLOCKWISE_SPEED
    in_bf16 = 2 / job.shape.num_layers
    return 1 / (in_bf16 / job.gpu.gemm("bf16") + (1 - in_bf16) / job.gpu.gemm("fp8"))


def attention_seconds(job: Job) -> float:
    """One layer's attention for one query-key product, forward and backward."""
    rate = job.gpu.flash2 if job.software.pair_attention else job.gpu.attention
    if job.precision.dtype == "fp32":
        rate = job.gpu.fp32 * job.gpu.gemm_share_bf16
    return 12 * job.shape.query_width / job.split.parallel.tensor / (rate * 1e12)


def elementwise_bytes(job: Job) -> float:
    """Bytes that an average layer's memory-bound kernels move for one row, forward and backward."""
    shape, p, software = job.shape, job.split.parallel, job.software
    q, kv = shape.query_width, shape.group_width
    norms = 20 * shape.hidden / job.split.sequence_shards  # two norms, two residual sums
    # Norms of queries and keys and their rotation, which unfused negates, joins, multiplies twice and adds.
    rotary = (8 if software.fused_rope else 30) * (q + kv)
    if software.pair_attention:
        rotary += 8 * kv + 4 * q  # the gathered prefix, the joined outputs
    activation = _activation_bytes(shape, software)
    moe_share = shape.num_moe_layers / shape.num_layers
    widths = (1 - moe_share) * activation * shape.ffn
    widths += moe_share * shape.top_k * (activation * shape.expert_ffn + 16 * shape.hidden)  # permuting copies
    forward = norms + (rotary + widths) / p.tensor
    total = forward / FORWARD * job.element_bytes / 2
    if job.precision.fp8 != "none":  # inputs and output gradients are read, measured and written in both layouts
        total += 6 * (4 * shape.hidden + 2 * q + 2 * kv + 3 * (1 - moe_share) * shape.ffn) / p.tensor
    return total


def _activation_bytes(shape: ModelShape, software: Software) -> int:
    if not shape.gated:
        return 4
    return 6 if software.fused_swiglu else 14  # SiLU, a sum with the offset 0, and the product, one after the other


def head_seconds(job: Job, scored: np.ndarray, forward_only: bool) -> np.ndarray:
    """The LM head of micro-batches with `scored` targets: matrices, and the memory-bound work on their logits."""
    vocab = job.shape.vocab / job.split.parallel.tensor  # rows of padding are never computed
    product = 2 * vocab * job.shape.hidden * scored / job.gpu.gemm(job.precision.dtype)
    logits = vocab * scored / job.bandwidth  # seconds a byte of each
    if forward_only:
        return product + 38 * logits
    if not job.software.tiled_head:
        return 3 * product + 20 * logits
    # model/logprob.py: backward computes again the logits whose softmax was not kept. Each tile's part of the hidden
    # gradient is written and added in fp32, the weight's once into Megatron's gradient buffer.
    tile, kept = head_buffers(job.gpu)
    kept_share = np.minimum(1.0, kept / np.maximum(job.element_bytes * vocab * scored, 1.0))
    sums = 2 * job.element_bytes + 8
    num_tiles = np.ceil(vocab * scored / tile)
    moved = sums * job.shape.hidden * (scored * num_tiles + vocab * (scored > 0)) / job.bandwidth
    return (4 - kept_share) * product + (50 + 18 * (1 - kept_share)) * logits + moved


def layer_comm(job: Job, forward_only: bool, full: np.ndarray) -> dict[str, np.ndarray]:
    """Exposed collectives of an average layer, seconds for one row of a rank's share, for each micro-batch of `full`: 1
    where its layers are computed again, else 0."""
    shape, p, software = job.shape, job.split.parallel, job.software
    hidden = shape.hidden * job.element_bytes
    moe_share = shape.num_moe_layers / shape.num_layers
    passes = (1 if forward_only else 2) + full  # of all-to-alls, which are the same forward and backward

    # Full tensors gathered or scattered: forward 4; backward 6 with sequence parallelism (inputs again), 4 without.
    tensors = 4 if forward_only else 4 + (6 if p.sequence else 4) + 4 * full
    tensor = job.group(p.tensor, 1).ring(hidden) * tensors * (1 - moe_share / 2) * software.tensor_exposed

    heads = 2 * (shape.query_width + shape.group_width) * job.element_bytes / p.tensor
    context = job.group(p.context, p.tensor).all_to_all(heads) * passes
    expert = 2 * passes * moe_share * _dispatch_seconds(job, hidden / p.tensor) if p.expert > 1 else 0.0
    if p.expert_tensor > 1:
        group = job.group(p.expert_tensor, 1)
        expert += 2 * passes * moe_share * group.ring(shape.top_k * hidden / p.tensor * p.expert_tensor)
    parts = {"tensor": tensor, "context": context, "expert": expert}
    return {name: np.broadcast_to(np.asarray(seconds, dtype=float), full.shape) for name, seconds in parts.items()}


def _dispatch_seconds(job: Job, row_bytes: float) -> float:
    """One row sent to its experts (or back)."""
    size, top_k = job.split.parallel.expert, job.shape.top_k
    group = job.group(size, job.split.parallel.expert_tensor)
    if not job.software.dispatch_once:
        return group.all_to_all(top_k * row_bytes)
    nodes = max(1, size // group.in_node)
    ranks_met, nodes_met = (n * (1 - (1 - 1 / n) ** top_k) for n in (size, nodes))
    inside = ranks_met * row_bytes * (size - 1) / size / group.nvlink
    return inside + nodes_met * (nodes - 1) / nodes * row_bytes / group.network


def host_seconds(job: Job) -> float:
    """What the host needs for one layer, forward and backward; the GPU waits where it would be faster."""
    if job.shape.num_moe_layers:
        return HOST_SECONDS_EXPERTS
    return HOST_SECONDS_TENSOR if job.split.parallel.tensor > 1 else HOST_SECONDS_DENSE

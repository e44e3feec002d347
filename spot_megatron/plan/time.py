"""Seconds of a job, by part.

A micro-batch's time on a pipeline stage is the sum of its matrices, attention, memory-bound work and exposed
collectives, or the time the host needs to launch them if that is longer. A step takes as long as its slowest
data-parallel rank; the waiting time of the others is shown as imbalance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spot_megatron.data.costs import ATTENTION_FORWARD, FORWARD
from spot_megatron.hf.config import HFModelConfig
from spot_megatron.plan.inputs import PlanInput
from spot_megatron.plan.kernels import (
    attention_seconds,
    elementwise_bytes,
    head_seconds,
    host_seconds,
    layer_comm,
    matrix_seconds,
)
from spot_megatron.plan.memory import bytes_per_parameter
from spot_megatron.plan.trained import parameters_of_rank, trained_of_rank
from spot_megatron.plan.workload import POSITIONS, PRODUCTS, SCORED, Load
from spot_megatron.train.packing import recomputed_above

BUCKETS_EXPOSED = 0.1  # of the gradients' reduction: the last buckets have no backward left to hide behind (assumed)
INTERLEAVED_P2P_EXPOSED = 0.2  # overlap_p2p_comm hides most of it (assumed)
STEP_SECONDS = 0.03  # packing, statistics and logging of a step (assumed)
IMPORT_SECONDS = 60.0  # Python, CUDA contexts, NCCL communicators, first kernels (assumed; 1 to 2 minutes with weights)
DISK_BYTES_PER_SECOND = 2e9  # of one node, to read weights and write checkpoints (assumed: one NVMe or a shared disk)


@dataclass(frozen=True)
class StepTime:
    """Mean seconds of an optimizer step, by part; they add up to the step."""

    matrices: float
    attention: float
    elementwise: float
    head: float
    recompute: float
    host: float
    tensor: float
    context: float
    expert: float
    pipeline: float
    data: float
    optimizer: float
    imbalance: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def step_time(inputs: PlanInput, load: Load) -> StepTime:
    """Averages over the load's sampled steps."""
    parts = [_one_step(inputs, step) for step in load.steps]
    return StepTime(**{key: float(np.mean([part[key] for part in parts])) for key in parts[0]})


def _one_step(inputs: PlanInput, step: np.ndarray) -> dict[str, float]:
    """`step` [data ranks, micro-batches, 3]."""
    p = inputs.split.parallel
    parts = _slowest_stage(inputs, step)
    busy = np.sum(list(parts.values()), axis=0)  # [data ranks, micro-batches]
    bubble = busy.max(axis=1) * (p.pipeline - 1) / (p.virtual_pipeline or 1)
    p2p = _pipeline_seconds(inputs, step[..., POSITIONS]).sum(axis=1)
    ranks = busy.sum(axis=1) + bubble + p2p
    seconds = {key: float(value.sum(axis=1).mean()) for key, value in parts.items()}
    seconds["pipeline"] = float((bubble + p2p).mean())
    seconds["imbalance"] = float(ranks.max() - ranks.mean())
    seconds["data"] = data_seconds(inputs, hidden_behind=float(busy[:, -1].mean()) * (1 - FORWARD))
    seconds["optimizer"] = optimizer_seconds(inputs) + STEP_SECONDS
    return seconds


def _slowest_stage(inputs: PlanInput, load: np.ndarray) -> dict[str, np.ndarray]:
    """Parts of every micro-batch, shape of `load` without its last axis, on the stage that takes longest."""
    layers = inputs.split.layers_of_stage(inputs.model.num_layers)
    last = len(layers) - 1
    candidates = [
        microbatch_seconds(inputs, load, layers[0], False),
        microbatch_seconds(inputs, load, layers[last], True),
    ]
    if last == 0:
        return candidates[1]
    return max(candidates, key=lambda parts: sum(part.sum() for part in parts.values()))


def microbatch_seconds(
    inputs: PlanInput, load: np.ndarray, num_layers: int, with_head: bool, forward_only: bool = False
) -> dict[str, np.ndarray]:
    """Seconds of forward and backward of a stage, by part; `load` is [..., 3] positions, products, scored targets."""
    p = inputs.split.parallel
    positions, products, scored = (load[..., i] / p.context for i in (POSITIONS, PRODUCTS, SCORED))
    # [data ranks, micro-batches] 1 where all layers are computed again.
    above = None if forward_only else recomputed_above(inputs.memory)
    full = np.zeros_like(positions) if above is None else 1.0 * (load[..., POSITIONS] > above)
    share = FORWARD if forward_only else 1.0
    attention_share = ATTENTION_FORWARD if forward_only else 1.0
    again = FORWARD * full
    selective = inputs.memory.recompute == "selective" and not forward_only
    attention_again = ATTENTION_FORWARD * np.maximum(full, selective)

    matrices = num_layers * positions * matrix_seconds(inputs)
    attention = num_layers * products * attention_seconds(inputs)
    elementwise = num_layers * positions * elementwise_bytes(inputs) / inputs.bandwidth
    comm = {name: num_layers * positions * part for name, part in layer_comm(inputs, forward_only, full).items()}
    parts = {
        # Frozen weights have no gradients, a third of the products; the adapters' own are narrow.
        "matrices": min(share, 1.0 if inputs.lora.rank is None else 2 * FORWARD) * matrices,
        "attention": attention_share * attention,
        "elementwise": share * elementwise,
        "recompute": again * (matrices + elementwise) + attention_again * attention,
        "head": head_seconds(inputs, scored, forward_only) if with_head else np.zeros_like(positions),
        **comm,
    }
    launched = num_layers * host_seconds(inputs) * (share + again)
    parts["host"] = np.maximum(launched - np.sum(list(parts.values()), axis=0), 0.0)
    return parts


def _pipeline_seconds(inputs: PlanInput, positions: np.ndarray) -> np.ndarray:
    """Exposed sending of a micro-batch's hidden states to the next stage, and of their gradients back."""
    p = inputs.split.parallel
    if p.pipeline == 1:
        return np.zeros_like(positions)
    crosses_nodes = inputs.split.num_gpus // p.pipeline >= inputs.split.gpus_per_node
    rate = (inputs.gpu.network if crosses_nodes else inputs.gpu.nvlink) * 1e9
    chunks = p.virtual_pipeline or 1
    exposed = INTERLEAVED_P2P_EXPOSED if chunks > 1 else 1.0
    shards = p.context * inputs.split.sequence_shards
    return exposed * 2 * chunks * positions * inputs.model.hidden_size * inputs.element_bytes / shards / rate


def data_seconds(inputs: PlanInput, hidden_behind: float) -> float:
    """Exposed reduction of gradients (behind the last backward pass) and gathering of updated parameters."""
    p, split = inputs.split.parallel, inputs.split
    dense, experts = trained_of_rank(inputs, 0)
    weight, gradient, _ = bytes_per_parameter(inputs.precision, inputs.memory)
    groups = [
        (dense, inputs.group(split.dense_shards, p.tensor)),
        (experts, inputs.group(split.expert_shards, p.expert * p.expert_tensor)),
    ]
    reduce = sum(group.ring(count * gradient) for count, group in groups)
    gather = sum(group.ring(count * weight) for count, group in groups)
    exposed = max(BUCKETS_EXPOSED * reduce, reduce - hidden_behind)
    return exposed + inputs.software.gather_exposed * gather


def optimizer_seconds(inputs: PlanInput) -> float:
    """AdamW on a rank's shard, its gradient norm, and clearing the gradients."""
    dense, experts = trained_of_rank(inputs, 0)
    shard = dense / inputs.split.dense_shards + experts / inputs.split.expert_shards
    _, gradient, states = bytes_per_parameter(inputs.precision, inputs.memory)
    # The gradient for its norm and for the update; states (in fp32 the weights are the masters) and weights.
    moved = 2 * 4 + 2 * states + (2 if inputs.precision.dtype == "bf16" else 2 * 4)
    return (moved * shard + gradient * (dense + experts)) / inputs.bandwidth


def reference_seconds(inputs: PlanInput, load: Load) -> float:
    """One forward pass over every pair, dealt evenly; stages and ranks are busy almost throughout."""
    total = load.pair_counts.sum(axis=0)[None, :] / inputs.split.data
    microbatches = max(1.0, total[0, POSITIONS] / max(load.steps[0][..., POSITIONS].mean(), 1))
    layers = inputs.split.layers_of_stage(inputs.model.num_layers)[0]
    parts = microbatch_seconds(inputs, total / microbatches, layers, with_head=True, forward_only=True)
    return float(microbatches * sum(part.sum() for part in parts.values()))


def start_seconds(inputs: PlanInput) -> float:
    """Imports, communicators, and reading on every node the weights of its ranks."""
    ranks = min(inputs.split.gpus_per_node, inputs.split.num_gpus)
    weights = min(inputs.model.num_parameters, ranks * sum(parameters_of_rank(inputs.model, inputs.split, 0)))
    return IMPORT_SECONDS + 2 * weights / DISK_BYTES_PER_SECOND


def model_flops(model: HFModelConfig, load: Load, is_frozen: bool = False) -> float:
    """Of the whole run's forward and backward passes over unique positions, without recomputation and adapters; frozen
    weights have no gradients."""
    products = 4 if is_frozen else 6
    per_step = sum(step.sum(axis=(0, 1)) for step in load.steps) * (load.num_steps / len(load.steps))
    block = products * (model.active_weights - model.embedding_weights)
    attention = 12 * model.query_width * model.num_layers
    head = products * model.embedding_weights
    return float(block * load.num_unique_tokens + attention * per_step[PRODUCTS] + head * per_step[SCORED])

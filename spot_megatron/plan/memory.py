"""Bytes that one rank needs, by part.

Bytes a parameter, with Megatron-Core's distributed optimizer over d ranks (its theoretical_memory_usage.py; measured
against Megatron-LM's own recorded runs in tests/plan/test_published.py):

    precision            weights   gradients   optimizer: master, first and second moment
    bf16, fp32 gradients    2          4          12 / d
    bf16, bf16 gradients    2          2          12 / d
    fp32                    4          4           8 / d   (the weights are their own masters)
    + FP8 blocks           +2                              (Transformer Engine keeps a row and a column copy)
    + remainders                                   -2 / d  (the masters' low 16 bits beside the bf16 weights)
    + bf16 moments                                 -4 / d

With LoRA gradients and optimizer states are those of the adapters alone.

Activations are counted tensor by tensor for one layer as Transformer Engine keeps them, in bf16, without dropout.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from spot_megatron.hf.config import HFModelConfig
from spot_megatron.model.head_memory import gpu_head_memory
from spot_megatron.parallel.split import Split, padded_vocab_size
from spot_megatron.plan.hardware import GIB, WORKSPACE_GIB
from spot_megatron.plan.inputs import PlanInput
from spot_megatron.plan.trained import adapter_widths, adapters_of_rank, parameters_of_rank, trained_of_rank
from spot_megatron.recipe import Memory, Precision

SHARED_FROM_BYTES = 1 << 30  # as in weights/checkpoint.py
WRITER_BYTES = 0.25e9  # a writer process
BLOCKS_BYTES = 0.2e9  # optimizer state on its way to disk, in blocks of 64 MB


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank. `transient` is the peak of the LM head or of one layer's backward pass, the larger."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    transient: float
    workspace: float
    stage: int = 0

    @property
    def states(self) -> float:
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "stage"}


def rank_memory(inputs: PlanInput, tokens: int, num_microbatches: int) -> RankMemory:
    """The rank that needs most, with packs of `tokens` positions and `num_microbatches` of them a step."""
    ranks = [stage_memory(inputs, tokens, num_microbatches, stage) for stage in range(inputs.split.parallel.pipeline)]
    return max(ranks, key=lambda rank: rank.total)


def stage_memory(inputs: PlanInput, tokens: int, num_microbatches: int, stage: int) -> RankMemory:
    """A rank of pipeline stage `stage`."""
    most_kept = inputs.memory.recompute_above_tokens
    if most_kept is None:
        return _stage_memory(inputs, tokens, num_microbatches, stage)
    memory = inputs.memory.model_copy(update={"recompute_above_tokens": None})
    kept = _stage_memory(replace(inputs, memory=memory), min(most_kept, tokens), num_microbatches, stage)
    if tokens <= most_kept:
        return kept
    full = memory.model_copy(update={"recompute": "full"})
    long_pack = _stage_memory(replace(inputs, memory=full), tokens, num_microbatches, stage)
    # In a pipeline other packs are in flight beside the long one.
    model, split = inputs.model, inputs.split
    in_flight = split.layers_in_flight(model.num_layers, stage, num_microbatches)
    packs = in_flight / split.layers_of_stage(model.num_layers)[stage]
    beside = kept.activations * max(0.0, 1 - 1 / packs)
    long_pack = replace(long_pack, activations=long_pack.activations + beside)
    return max(kept, long_pack, key=lambda rank: rank.total)


def _stage_memory(inputs: PlanInput, tokens: int, num_microbatches: int, stage: int) -> RankMemory:
    """A rank of pipeline stage `stage` if all packs are recomputed in the same way."""
    positions = tokens / inputs.split.parallel.context
    dense, experts = parameters_of_rank(inputs.model, inputs.split, stage)
    weight, gradient, optimizer = bytes_per_parameter(inputs.precision, inputs.memory)
    adapters = sum(adapters_of_rank(inputs.model, inputs.split, inputs.lora, stage))
    trained_dense, trained_experts = trained_of_rank(inputs, stage)
    shard = trained_dense / inputs.split.dense_shards + trained_experts / inputs.split.expert_shards
    activations = positions * _activations(inputs, stage, num_microbatches)
    fp8_copies = 2.0 * blocks_of_rank(inputs.model, inputs.split, stage) if inputs.precision.fp8 != "none" else 0.0
    return RankMemory(
        weights=(dense + experts + adapters) * weight + fp8_copies,
        gradients=(trained_dense + trained_experts) * gradient,
        optimizer=optimizer * shard,
        activations=activations,
        transient=max(_transient(inputs, positions, stage), _update_copies(inputs, shard) - activations),
        workspace=WORKSPACE_GIB * GIB,
        stage=stage,
    )


def bytes_per_parameter(precision: Precision, memory: Memory) -> tuple[int, int, int]:
    """(weights, gradients, optimizer before it is divided over ranks); see the module."""
    if precision.dtype == "fp32":
        return 4, 4, 8
    optimizer = (4 if memory.master_weights == "fp32" else 2) + 2 * (4 if memory.moments == "fp32" else 2)
    return 2, 4 if precision.grad_dtype == "fp32" else 2, optimizer


def checkpoint_bytes(num_parameters: int, precision: Precision) -> int:
    """Of one checkpoint on disk, for any parallel sizes: the weights, and in fp32 the optimizer's weights
    (even where they are the model's own) and two moments."""
    return num_parameters * ((4 if precision.dtype == "fp32" else 2) + 3 * 4)


def host_bytes_of_save(inputs: PlanInput, weights: float) -> float:
    """Host memory that a rank takes besides its own while a checkpoint is saved, upper bound.

    Its weights, copied for the writer process (from SHARED_FROM_BYTES on each replica writes a share), that process,
    and blocks of optimizer state. Measured: benchmarks/results/checkpoint_memory_*.json.

    Args:
        weights: bytes of the rank's weights.
    """
    copied = weights / inputs.split.dense_shards if weights >= SHARED_FROM_BYTES else weights
    return copied + WRITER_BYTES + BLOCKS_BYTES


def blocks_of_rank(model: HFModelConfig, split: Split, stage: int) -> float:
    """Parameters of a rank's layers' matrices, which FP8 quantises."""
    p = split.parallel
    layers = split.layers_of_stage(model.num_layers)[stage]
    share = layers / model.num_layers
    matrices = (model.num_layers * model.attention_weights + len(model.dense_layers) * model.mlp_weights) / p.tensor
    experts = len(model.moe_layers) * model.num_experts * model.expert_weights / (p.expert * p.expert_tensor)
    return share * (matrices + experts)


def _activations(inputs: PlanInput, stage: int, num_microbatches: int) -> float:
    """Bytes that all micro-batches in flight keep for backward, per position of one."""
    in_flight = inputs.split.layers_in_flight(inputs.model.num_layers, stage, num_microbatches)
    if inputs.memory.recompute == "full":  # each layer's input
        return in_flight * inputs.element_bytes * inputs.model.hidden_size / inputs.split.sequence_shards
    return in_flight * layer_bytes(inputs)


def layer_bytes(inputs: PlanInput) -> float:
    """Bytes that an average layer keeps for backward, per position of this rank's packs.

    Everything is counted in two-byte elements; fp32 doubles it; FP8 keeps the inputs of matrices in one byte.
    """
    model, p, software = inputs.model, inputs.split.parallel, inputs.software
    linear_input = 1 if inputs.precision.fp8 != "none" else 2
    h, q, kv = model.hidden_size, model.query_width, model.key_value_width
    # Both norms' inputs (the residual stream) and outputs (the inputs of the first matrices).
    norms = (2 * 2 * h + 2 * linear_input * h) / inputs.split.sequence_shards
    # Projections, rotated queries and keys, the kernel's output and its row statistics.
    attention = 2 * model.qkv_width + 2 * (q + kv) + 2 * q + 4 * model.num_heads
    attention += 2 * q * model.qk_norm  # the norm's input: queries copied out of their groups
    if inputs.precision.fp8 != "none":
        attention += q
    if software.pair_attention:
        # Both calls' outputs joined; the gathered keys and values of the second, of all positions at most.
        attention += 2 * q * (inputs.precision.fp8 == "none") + 2 * 2 * kv
    if inputs.memory.recompute == "selective":
        # Core attention: its inputs are kept, and its output as the projection's input.
        attention -= 4 * model.num_heads + (2 * q + 4 * kv if software.pair_attention else 0)
    rotary = 0 if software.fused_rope else 8 * model.head_dim  # sines and cosines of queries and keys
    # Unfused, the activation keeps its two factors besides the first matrix's output and the product.
    dense = 2 * model.mlp_in_width + linear_input * model.intermediate_size
    if model.gated and not software.fused_swiglu:
        dense += 4 * model.intermediate_size
    moe_share = model.moe_share
    mlp = (1 - moe_share) * dense / p.tensor + moe_share * _expert_bytes(inputs, linear_input)
    _, _, num_adapters = adapter_widths(inputs)
    adapters = 2 * num_adapters * (inputs.lora.rank or 0)  # A x; its input is kept for A as it was for the weight
    return (norms + attention / p.tensor + rotary + mlp + adapters) * inputs.element_bytes / 2


def _expert_bytes(inputs: PlanInput, linear_input: int) -> float:
    """Of a layer's experts, per position of the pack, on an evenly loaded rank (dropless routing)."""
    model, p = inputs.model, inputs.split.parallel
    copies = model.experts_per_token / p.tensor  # each tensor rank dispatches its own part of the positions
    widths = 2 * 2 * model.expert_ffn_size + linear_input * model.expert_ffn_size
    if not inputs.software.fused_swiglu:  # the activation's factors, and its product before the routing weight
        widths += 6 * model.expert_ffn_size
    # Sent and received copies of the hidden state; each of the experts' tensor ranks gathers all of them.
    hidden = (2 + linear_input) * model.hidden_size * p.expert_tensor
    return copies * (widths + hidden) + 8 * model.num_experts / inputs.split.sequence_shards


def _update_copies(inputs: PlanInput, shard: float) -> float:
    """Bytes that the update takes when activations are free again: Megatron-Core copies 16-bit gradients of a rank's
    `shard` of the parameters to fp32. Only optimizers with compact states read them as they are."""
    precision, memory = inputs.precision, inputs.memory
    is_compact = memory.master_weights != "fp32" or memory.moments != "fp32"
    return 4 * shard if precision.dtype == precision.grad_dtype == "bf16" and not is_compact else 0.0


def _transient(inputs: PlanInput, positions: float, stage: int) -> float:
    """The peak on top of the kept activations: the LM head's buffers, or the backward pass of one layer.

    With full recompute, a layer's backward pass also holds the activations of that layer, when the head's are freed.
    """
    model, p = inputs.model, inputs.split.parallel
    width = model.experts_per_token * model.expert_ffn_size if model.moe_layers else model.intermediate_size
    gradients = 2 * model.hidden_size / inputs.split.sequence_shards + 3 * width / p.tensor
    layer = positions * inputs.element_bytes * gradients
    if inputs.memory.recompute == "full":
        layer += positions * layer_bytes(replace(inputs, memory=Memory()))
    return layer if stage < p.pipeline - 1 else max(layer, head_bytes(inputs, positions))


def head_bytes(inputs: PlanInput, positions: float) -> float:
    """The LM head's buffers at the start of backward, if every position is scored."""
    element, hidden = inputs.element_bytes, inputs.model.hidden_size
    vocab = padded_vocab_size(inputs.model.vocab_size, inputs.split.parallel.tensor) // inputs.split.parallel.tensor
    # Hidden states: all of them on every tensor rank, the scored ones, the scaled ones, and the gradient.
    gathered = positions * hidden * (3 * element + 4)
    if not inputs.software.tiled_head:
        return gathered + positions * vocab * (2 + 4)  # bf16 logits and their fp32 copy, which becomes the gradient
    head = gpu_head_memory(inputs.gpu.memory_bytes)
    kept = min(head.kept_bytes, element * positions * vocab)
    # A tile's product, its fp32 softmax and its gradient; the empty gradient that autograd is handed for the weight.
    handed = element * vocab * hidden if inputs.lora.rank is None else 0
    return gathered + kept + min(head.tile_elements, positions * vocab) * (4 + 2 * element) + handed

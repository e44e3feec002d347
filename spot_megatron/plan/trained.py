"""Parameters that are trained: all, or with LoRA the adapters, which have gradients and optimizer states alone."""

from __future__ import annotations

from collections.abc import Iterator

from spot_megatron.hf.config import HFModelConfig
from spot_megatron.hf.names import ParameterMapping, Sharding, target_modules, weight_map
from spot_megatron.parallel.split import Split, padded_vocab_size
from spot_megatron.plan.inputs import PlanInput
from spot_megatron.recipe import Lora


def parameters_of_rank(model: HFModelConfig, split: Split, stage: int) -> tuple[float, float]:
    """(parameters of a rank without experts, parameters of its experts), adapters apart."""
    p = split.parallel
    layers = split.layers_of_stage(model.num_layers)[stage]
    moe_layers = layers * model.moe_share
    dense = layers * (model.attention_weights / p.tensor + model.small_weights)
    dense += (layers - moe_layers) * model.mlp_weights / p.tensor + moe_layers * model.router_weights
    embedding = padded_vocab_size(model.vocab_size, p.tensor) // p.tensor * model.hidden_size
    first, last = stage == 0, stage == p.pipeline - 1
    dense += embedding * ((first or last) if model.tied else first + last) + model.hidden_size * last
    experts = moe_layers * model.num_experts * model.expert_weights / (p.expert * p.expert_tensor)
    return dense, experts


def adapters_of_rank(model: HFModelConfig, split: Split, lora: Lora, stage: int) -> tuple[float, float]:
    """(parameters of a rank's adapters without those of experts, parameters of its experts' adapters)."""
    p = split.parallel
    share = split.layers_of_stage(model.num_layers)[stage] / model.num_layers
    counts = {False: 0.0, True: 0.0}
    for mapping, (num_rows, num_columns) in _adapted(model, lora):
        is_expert = mapping.num_experts > 0
        ranks = p.expert_tensor if is_expert else p.tensor
        replicated, divided = num_columns, num_rows  # A and B where the output is split
        if mapping.sharding is Sharding.COLUMNS:
            replicated, divided = num_rows, num_columns
        copies = len(mapping.layers or ()) * share * (mapping.num_experts / p.expert if is_expert else 1)
        counts[is_expert] += copies * (lora.rank or 0) * (replicated + divided / ranks)
    return counts[False], counts[True]


def trained_of_rank(inputs: PlanInput, stage: int) -> tuple[float, float]:
    """(trained parameters of a rank without experts, of its experts)."""
    if inputs.lora.rank is None:
        return parameters_of_rank(inputs.model, inputs.split, stage)
    return adapters_of_rank(inputs.model, inputs.split, inputs.lora, stage)


def num_trained(model: HFModelConfig, lora: Lora) -> int:
    """Of the whole model; what a checkpoint holds."""
    if lora.rank is None:
        return model.num_parameters
    return sum(
        lora.rank * sum(shape) * len(mapping.layers or ()) * max(mapping.num_experts, 1)
        for mapping, shape in _adapted(model, lora)
    )


def adapter_widths(inputs: PlanInput) -> tuple[float, float, float]:
    """Of an average layer's adapters, summed over those that one position passes: widths of inputs, of outputs, and
    their number, on one rank of those that split the matrices."""
    model, p = inputs.model, inputs.split.parallel
    in_width = out_width = number = 0.0
    for mapping, (num_rows, num_columns) in _adapted(model, inputs.lora):
        passes = len(mapping.layers or ()) / model.num_layers
        passes *= model.experts_per_token if mapping.num_experts else 1
        is_row_parallel = mapping.sharding is Sharding.COLUMNS
        in_width += passes * num_columns / (p.tensor if is_row_parallel else inputs.split.sequence_shards)
        out_width += passes * num_rows / (inputs.split.sequence_shards if is_row_parallel else p.tensor)
        number += passes
    return in_width, out_width, number


def _adapted(model: HFModelConfig, lora: Lora) -> Iterator[tuple[ParameterMapping, tuple[int, ...]]]:
    """Every Hugging Face matrix with an adapter: its entry in the weight map and its shape."""
    if lora.rank is None:
        return
    modules = target_modules(lora.targets)
    for mapping in weight_map(model):
        for shape, is_target in zip(mapping.shapes, mapping.adapted(modules), strict=True):
            if is_target:
                yield mapping, shape

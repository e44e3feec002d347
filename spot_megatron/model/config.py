"""Hugging Face config + recipe -> Megatron's TransformerConfig. Combinations that cannot run are refused here."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from spot_megatron.errors import RecipeError
from spot_megatron.hf.config import HFModelConfig
from spot_megatron.model.attention.cuda import pick_kernel
from spot_megatron.parallel.installed import import_problem
from spot_megatron.parallel.split import check_parallel, layers_of_stage
from spot_megatron.recipe import Memory, Parallel, Precision, Recipe

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class PairConfig(TransformerConfig):
    """Megatron's configuration with this project's options."""

    recompute_above_tokens: int | None = None  # longer packs are recomputed in full, all others not at all
    attention_kernel: str = "auto"  # of model/attention/cuda.py, on CUDA


def transformer_config(hf: HFModelConfig, recipe: Recipe, device: str) -> PairConfig:
    """The model's configuration under `recipe` on `device` ("cuda" or "cpu").

    Raises:
        RecipeError: a parallel size does not divide the model, or FP8, the optimizer's states or the attention kernel
            cannot run here.
    """
    check_parallel(hf, recipe.parallel)
    check_fp8(recipe.precision, device, has_experts=bool(hf.moe_layers))
    check_states(recipe, device)
    check_attention(recipe, device)
    dtype = DTYPES[recipe.precision.dtype]
    cuda = device == "cuda"
    options: dict[str, Any] = dict(
        num_layers=hf.num_layers,
        hidden_size=hf.hidden_size,
        ffn_hidden_size=hf.intermediate_size,
        num_attention_heads=hf.num_heads,
        num_query_groups=hf.num_groups,
        kv_channels=hf.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=hf.norm_eps,
        qk_layernorm=hf.qk_norm,
        add_bias_linear=False,
        add_qkv_bias=hf.qkv_bias,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,  # a shared prefix is computed once for both sides, so dropout would not be theirs alone
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        perform_initialization=False,  # every parameter is loaded from the Hugging Face folder
        use_cpu_initialization=not cuda,
        calculate_per_token_loss=True,  # train/step.py: sum over pairs, then divide once
        variable_seq_lengths=True,
        # The interleaved schedule of two stages sends both ways between the same ranks; this form keeps them apart.
        overlap_p2p_comm=recipe.parallel.virtual_pipeline is not None,
        batch_p2p_comm=recipe.parallel.virtual_pipeline is None,
        batch_p2p_sync=False,  # a wait for the whole device after each exchange, for a race in PyTorch before 2.0
        deterministic_mode=recipe.deterministic and cuda,
        tensor_model_parallel_size=recipe.parallel.tensor,
        sequence_parallel=recipe.parallel.sequence,
        context_parallel_size=recipe.parallel.context,
        pipeline_model_parallel_size=recipe.parallel.pipeline,
        virtual_pipeline_model_parallel_size=recipe.parallel.virtual_pipeline,
        gradient_accumulation_fusion=cuda and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None,
        bias_activation_fusion=True,  # keeps the activation's input only; there is no bias
        apply_rope_fusion=cuda and has_transformer_engine(),
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        attention_kernel=recipe.model.attention,
        moe_token_dispatcher_type="alltoall",  # mcore asks for it with variable sequence lengths, dense models too
        **(_experts(hf, recipe.parallel, cuda) if hf.moe_layers else {}),
        **_stages(hf.num_layers, recipe.parallel),
        **_recompute(recipe.memory),
        **_fp8(recipe.precision),
    )
    return PairConfig(**options)


def check_fp8(precision: Precision, device: str, has_experts: bool = False) -> None:
    """Raises RecipeError where FP8 cannot run. Without Transformer Engine, Megatron-Core trains an FP8 configuration
    in bf16 and gives no warning."""
    if precision.fp8 == "none":
        return
    if device != "cuda":
        raise RecipeError(f"precision.fp8={precision.fp8} needs a CUDA device; on this one set precision.fp8=none")
    if not has_transformer_engine():
        raise RecipeError(
            f"precision.fp8={precision.fp8} needs Transformer Engine, which is not installed here; "
            "use the image of docker/, or set precision.fp8=none"
        )

    if precision.fp8 == "blockwise" and has_experts:
        raise RecipeError(
            "precision.fp8=blockwise quantises tiles of 128 tokens, and Megatron-Core pads each expert's tokens to 16; "
            "for a model with experts set precision.fp8 to tensorwise or none"
        )


def check_states(recipe: Recipe, device: str) -> None:
    """Raises RecipeError where the optimizer's states cannot be kept as the recipe says."""
    if recipe.has_compact_states and (device != "cuda" or not has_transformer_engine()):
        raise RecipeError(
            "memory.master_weights=remainders and memory.moments=bf16 need Transformer Engine's AdamW on a CUDA "
            "device; here set both to fp32"
        )


def check_attention(recipe: Recipe, device: str) -> None:
    """Raises RecipeError where the attention kernel that the recipe names cannot run."""
    if device == "cuda":
        pick_kernel(recipe.model.attention, DTYPES[recipe.precision.dtype])
    elif recipe.model.attention != "auto":
        raise RecipeError(f"model.attention={recipe.model.attention} names a CUDA kernel; on a CPU set it to auto")


def has_transformer_engine() -> bool:
    """Whether Transformer Engine's layers can be used.

    Raises:
        RecipeError: it is installed and cannot be imported; without it training would be slower, and different.
    """
    problem = import_problem("transformer_engine.pytorch")
    if problem and "its import fails" in problem:
        raise RecipeError(f"Transformer Engine {problem}; reinstall it for this PyTorch, or remove it")
    return problem is None


def _stages(num_layers: int, parallel: Parallel) -> dict[str, int]:
    layers = layers_of_stage(num_layers, parallel.pipeline)
    return {} if layers[0] == layers[-1] else {"num_layers_in_last_pipeline_stage": layers[-1]}


def _experts(hf: HFModelConfig, parallel: Parallel, cuda: bool) -> dict[str, Any]:
    """Top-k routing as Hugging Face computes it, without a loss that balances the experts: preference pairs are few."""
    every_layer = len(hf.moe_layers) == hf.num_layers
    return {
        "num_moe_experts": hf.num_experts,
        "moe_router_topk": hf.experts_per_token,
        "moe_ffn_hidden_size": hf.expert_ffn_size,
        "moe_layer_freq": 1 if every_layer else [int(layer in hf.moe_layers) for layer in range(hf.num_layers)],
        "moe_router_pre_softmax": not hf.norm_topk,  # else softmax over the chosen alone: their weights sum to 1
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_grouped_gemm": cuda and has_transformer_engine(),
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.expert_tensor,
    }


def _recompute(memory: Memory) -> dict[str, Any]:
    if memory.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    if memory.recompute == "none" and memory.recompute_above_tokens is None:
        return {}
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return {**full, "recompute_above_tokens": memory.recompute_above_tokens}


def _fp8(precision: Precision) -> dict[str, Any]:
    if precision.fp8 == "none":
        return {}
    if precision.fp8 == "tensorwise":
        ends = {"num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 1}
        return {"fp8": "hybrid", "fp8_recipe": "tensorwise", "first_last_layers_bf16": True, **ends}
    return {"fp8": "e4m3", "fp8_recipe": "blockwise"}

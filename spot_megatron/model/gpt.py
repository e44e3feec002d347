"""GPTModel that returns the log-probability of every scored token of a pack."""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from spot_megatron.hf.config import HFModelConfig
from spot_megatron.model.attention.pair import PairAttention, PairSeqParams
from spot_megatron.model.config import has_transformer_engine
from spot_megatron.model.embedding import embed
from spot_megatron.model.logprob import linear_logprob
from spot_megatron.model.norm import RMSNorm
from spot_megatron.parallel.split import padded_vocab_size
from spot_megatron.parallel.versions import mark_split_weights


class PairGPT(GPTModel):
    """Megatron's GPTModel over packs of preference pairs.

    `forward(input_ids [1, T], position_ids [1, T], attention_mask=None, packed_seq_params=PairSeqParams)` gives
    hidden states, and on the last pipeline stage the log-probabilities [S] of `head_target` in nats.
    """

    def __init__(self, *args: Any, real_vocab_size: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.real_vocab_size = real_vocab_size
        self.head_is_embedding = self.share_embeddings_and_output_weights and self.pre_process and self.post_process
        if self.head_is_embedding:
            # Megatron would add the placeholder of a gradient that lies in its buffer already.
            self.embedding.word_embeddings.weight.zero_out_wgrad = False
        # Megatron's block of layers reads from its config, at each forward, whether to recompute them.
        self.keeping_config = copy.copy(self.config)
        self.keeping_config.recompute_granularity = None

    def forward(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """See the class. Only packs of more than `recompute_above_tokens` positions are recomputed, if it is set."""
        most = self.config.recompute_above_tokens
        if most is not None:
            is_short = input_ids.shape[1] * self.config.context_parallel_size <= most
            self.decoder.config = self.keeping_config if is_short else self.config
        return super().forward(input_ids, *args, **kwargs)

    def _preprocess(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Rotary embeddings by position id: both suffixes continue the positions of their prefix."""
        if self.pre_process:
            embedded = self._embed(kwargs["input_ids"][0])
            # Layers that are recomputed have gradients only if their input has one, which a frozen embedding's has not.
            kwargs["decoder_input"] = embedded.requires_grad_() if torch.is_grad_enabled() else embedded
        decoder_input, rotary_pos_emb, *rest = super()._preprocess(*args, **kwargs)
        return decoder_input, rotary_pos_emb.index_select(0, kwargs["position_ids"][0]), *rest

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        del args
        if not self.post_process:
            return hidden_states
        layout: PairSeqParams = kwargs["packed_seq_params"]
        # One gather: the last shared position predicts the first token of both suffixes, so it occurs twice;
        # positions of the prompt do not occur.
        scored_SH = self._whole_pack(hidden_states)[:, 0].index_select(0, layout.head_position)
        holder = self.embedding.word_embeddings if self.head_is_embedding else self.output_layer
        weight_VpH = _weight_of(holder)
        group = self.pg_collection.tp
        return linear_logprob(
            scored_SH,
            weight_VpH,
            layout.head_target,
            vocab_size=self.real_vocab_size,
            vocab_start=group.rank() * weight_VpH.shape[0],
            group=group,
            is_embedding=self.head_is_embedding,
        )

    def _embed(self, ids_T: Tensor) -> Tensor:
        """[T, 1, H] on every tensor rank, or its part of the positions when the sequence is split."""
        weight_VpH = _weight_of(self.embedding.word_embeddings)
        part_T1H = embed(ids_T, weight_VpH, vocab_start=self.pg_collection.tp.rank() * weight_VpH.shape[0])[:, None]
        if self.config.sequence_parallel:
            return tensor_parallel.reduce_scatter_to_sequence_parallel_region(part_T1H)
        return tensor_parallel.reduce_from_tensor_model_parallel_region(part_T1H)

    def _whole_pack(self, hidden_states: Tensor) -> Tensor:
        """[T, 1, H] on every tensor rank; each rank's gradient is a part of the sum over ranks."""
        if self.config.sequence_parallel:
            return tensor_parallel.gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=True)
        return tensor_parallel.copy_to_tensor_model_parallel_region(hidden_states)


def _weight_of(module: torch.nn.Module) -> Tensor:
    """The weight of a module that is not called itself. Megatron's DDP waits in a hook of that call until the updated
    weight has been gathered, so the hook runs here."""
    for hook in module._forward_pre_hooks.values():
        hook(module, ())
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def build_model(config: TransformerConfig, hf: HFModelConfig) -> list[PairGPT]:
    """This rank's pipeline chunks, on this process's device, with weights not yet loaded."""
    num_chunks = config.virtual_pipeline_model_parallel_size or 1
    chunks = []
    for chunk in range(num_chunks):
        vp_stage = chunk if num_chunks > 1 else None
        model = PairGPT(
            config=config,
            transformer_layer_spec=_block_spec(config, vp_stage),
            vocab_size=padded_vocab_size(hf.vocab_size, config.tensor_model_parallel_size),
            max_sequence_length=hf.max_positions,
            pre_process=mpu.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            share_embeddings_and_output_weights=hf.tied,
            position_embedding_type="rope",
            rotary_base=hf.rope_theta,
            rope_scaling=hf.rope_factor is not None,
            rope_scaling_factor=hf.rope_factor or 1.0,
            vp_stage=vp_stage,
            real_vocab_size=hf.vocab_size,
        )
        mark_split_weights(model)
        _mark_expert_weights(model)
        # Picked by position id, so the table must be whole: Megatron would cut it for context parallelism.
        model.rotary_pos_emb.cp_group = None
        chunks.append(model.cuda(torch.cuda.current_device()))
    return chunks


def _mark_expert_weights(model: PairGPT) -> None:
    """Has the experts' gradients summed over the ranks that hold copies of them, which are not those of other weights,
    and counted in the gradient norm on every tensor rank.

    Megatron sums them only if experts are split. Unsplit under tensor parallelism each tensor rank would train its
    experts on its own part of the sequence alone, and they would drift apart. Up to 0.18.2 it leaves the mark for the
    norm out of Transformer Engine's grouped weights (Megatron-LM issue 5916). Every rank's shard of them in the
    distributed optimizer is another one, so each counts.
    """
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            parameter.allreduce = False
            parameter.tensor_model_parallel = True


def _block_spec(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Transformer Engine's layers where it is installed and CUDA in use, else Megatron's; both with PairAttention."""
    engine = not config.use_cpu_initialization and has_transformer_engine()
    make = _engine_layer if engine else _local_layer
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    kinds = [_num_experts(config, layer) for layer in range(first, first + num_layers)]
    layers, norm = {}, RMSNorm if not engine else _engine_norm()
    for num_experts in set(kinds):
        layers[num_experts] = make(config, num_experts)
        layers[num_experts].submodules.self_attention.submodules.core_attention = PairAttention
    return TransformerBlockSubmodules(layer_specs=[layers[kind] for kind in kinds], layer_norm=norm)


def _num_experts(config: TransformerConfig, layer: int) -> int | None:
    """Experts of the layer with this global number, counted from 0; None for a dense layer."""
    has_experts = config.moe_layer_freq[layer] if isinstance(config.moe_layer_freq, list) else True
    return config.num_moe_experts if has_experts else None


def _engine_norm() -> type:
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm


def _engine_layer(config: TransformerConfig, num_experts: int | None) -> ModuleSpec:
    return get_gpt_layer_with_transformer_engine_spec(
        num_experts=num_experts, moe_grouped_gemm=config.moe_grouped_gemm, qk_layernorm=config.qk_layernorm
    )


def _local_layer(config: TransformerConfig, num_experts: int | None) -> ModuleSpec:
    layer = get_gpt_layer_local_spec(num_experts=num_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    if config.qk_layernorm:
        attention = layer.submodules.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if num_experts is not None:
        # Transformer Engine does not fuse this norm before experts, so its checkpoints have it under its own name.
        layer.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.")
    return layer

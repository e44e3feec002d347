"""The weight map: which Hugging Face tensors make up which Megatron parameter. One table, read in both directions.

Each entry gives the Hugging Face tensors with their shapes, the parameter's name under Megatron-Core's local spec and
under its Transformer Engine spec (which fuses a norm into the linear layer after it), and the sharding. `{layer}` and
`{expert}` are global numbers on the Hugging Face side; a rank's own numbering starts at 0, so `resolve` takes its
offsets. A new model family needs entries here and nothing else. This module does not import PyTorch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

from spot_megatron.errors import WeightError
from spot_megatron.hf.config import HFModelConfig

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"


class Sharding(Enum):
    """The merge of Hugging Face tensors into a parameter, and the dimension that tensor parallelism splits."""

    REPLICATED = "replicated"  # the same on every rank: norms, routers
    COLUMNS = "columns"  # split along dim 1: a linear layer whose input is split
    ROWS = "rows"  # split along dim 0: an adapter's B in a linear layer whose output is split
    VOCAB = "vocab"  # split along dim 0 after padding V to Vp
    QKV = "qkv"  # q, k, v interleaved by query group, split along dim 0 by whole groups
    GATE_UP = "gate_up"  # each rank's gate rows, then its up rows


TARGETS = {  # of adapters (LoRA), by the names of a recipe's lora.targets
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


def target_modules(targets: Sequence[str]) -> tuple[str, ...]:
    """The Hugging Face modules that recipe targets name, each once, in the model's order."""
    wanted = {module for target in targets for module in TARGETS.get(target, (target,))}
    return tuple(module for group in TARGETS.values() for module in group if module in wanted)


@dataclass(frozen=True)
class ParameterMapping:
    """A Megatron parameter (of each layer in `layers`, of each expert) and the Hugging Face tensors merged into it.

    Attributes:
        hf: names of the tensors, in the order in which weights.shards.merge takes them.
        shapes: their shapes, before tensor parallelism and padding.
        local: the parameter's name under the local spec.
        te: its name under the Transformer Engine spec.
        layers: global numbers of the layers that have the parameter; None outside the layers.
        num_experts: 0 outside the experts.
        exported: False if another entry exports the same tensor: the output layer of a model with tied embeddings.
    """

    hf: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    local: str
    te: str
    sharding: Sharding
    layers: tuple[int, ...] | None = None
    num_experts: int = 0
    exported: bool = True

    def instances(self) -> Iterator[tuple[int, int]]:
        """Every (layer, expert) by global number; 0 outside the layers or the experts."""
        for layer in (0,) if self.layers is None else self.layers:
            for expert in range(max(self.num_experts, 1)):
                yield layer, expert

    def adapted(self, modules: Sequence[str]) -> tuple[bool, ...]:
        """Of each tensor: whether it is the matrix of one of `modules`, such as q_proj."""
        leaves = [name.split(".")[-2:] for name in self.hf]
        return tuple(kind == "weight" and module in modules for module, kind in leaves)

    def hf_names(self, layer: int, expert: int) -> tuple[str, ...]:
        return tuple(name.format(layer=layer, expert=expert) for name in self.hf)

    @property
    def checkpoint_key(self) -> str:
        """The name in a Megatron distributed checkpoint, with `{layer}`; experts share one key."""
        shared = re.sub(r"weight\{expert\}$", "weight", self.te)
        return shared.replace("mlp.experts.", "mlp.experts.experts.")


def weight_map(config: HFModelConfig) -> tuple[ParameterMapping, ...]:
    """The table of a model with this config."""
    hidden, ffn, vocab, dim = config.hidden_size, config.intermediate_size, config.vocab_size, config.head_dim
    query, key = config.query_width, config.key_value_width
    experts, expert_ffn = config.num_experts, config.expert_ffn_size
    every, dense, moe = tuple(range(config.num_layers)), config.dense_layers, config.moe_layers
    biased, normed = every if config.qkv_bias else (), every if config.qk_norm else ()
    table = [
        _outside({EMBEDDING: (vocab, hidden)}, "embedding.word_embeddings.weight", Sharding.VOCAB),
        # in all layers
        _inside(
            every,
            {"input_layernorm.weight": (hidden,)},
            "input_layernorm.weight",
            Sharding.REPLICATED,
            te="self_attention.linear_qkv.layer_norm_weight",
        ),
        _inside(
            every,
            {
                "self_attn.q_proj.weight": (query, hidden),
                "self_attn.k_proj.weight": (key, hidden),
                "self_attn.v_proj.weight": (key, hidden),
            },
            "self_attention.linear_qkv.weight",
            Sharding.QKV,
        ),
        _inside(
            biased,
            {"self_attn.q_proj.bias": (query,), "self_attn.k_proj.bias": (key,), "self_attn.v_proj.bias": (key,)},
            "self_attention.linear_qkv.bias",
            Sharding.QKV,
        ),
        _inside(normed, {"self_attn.q_norm.weight": (dim,)}, "self_attention.q_layernorm.weight", Sharding.REPLICATED),
        _inside(normed, {"self_attn.k_norm.weight": (dim,)}, "self_attention.k_layernorm.weight", Sharding.REPLICATED),
        _inside(
            every, {"self_attn.o_proj.weight": (hidden, query)}, "self_attention.linear_proj.weight", Sharding.COLUMNS
        ),
        # in dense layers
        _inside(
            dense,
            {"post_attention_layernorm.weight": (hidden,)},
            "pre_mlp_layernorm.weight",
            Sharding.REPLICATED,
            te="mlp.linear_fc1.layer_norm_weight",
        ),
        _inside(
            dense,
            {"mlp.gate_proj.weight": (ffn, hidden), "mlp.up_proj.weight": (ffn, hidden)},
            "mlp.linear_fc1.weight",
            Sharding.GATE_UP,
        ),
        _inside(dense, {"mlp.down_proj.weight": (hidden, ffn)}, "mlp.linear_fc2.weight", Sharding.COLUMNS),
        # in layers with experts
        _inside(moe, {"post_attention_layernorm.weight": (hidden,)}, "pre_mlp_layernorm.weight", Sharding.REPLICATED),
        _inside(moe, {"mlp.gate.weight": (experts, hidden)}, "mlp.router.weight", Sharding.REPLICATED),
        _inside(
            moe,
            {
                "mlp.experts.{expert}.gate_proj.weight": (expert_ffn, hidden),
                "mlp.experts.{expert}.up_proj.weight": (expert_ffn, hidden),
            },
            "mlp.experts.local_experts.{expert}.linear_fc1.weight",
            Sharding.GATE_UP,
            te="mlp.experts.linear_fc1.weight{expert}",
            num_experts=experts,
        ),
        _inside(
            moe,
            {"mlp.experts.{expert}.down_proj.weight": (hidden, expert_ffn)},
            "mlp.experts.local_experts.{expert}.linear_fc2.weight",
            Sharding.COLUMNS,
            te="mlp.experts.linear_fc2.weight{expert}",
            num_experts=experts,
        ),
        _outside({"model.norm.weight": (hidden,)}, "decoder.final_layernorm.weight", Sharding.REPLICATED),
        _outside(
            {EMBEDDING if config.tied else LM_HEAD: (vocab, hidden)},
            "output_layer.weight",
            Sharding.VOCAB,
            exported=not config.tied,
        ),
    ]
    return tuple(mapping for mapping in table if mapping.layers != ())


def _outside(
    hf: Mapping[str, tuple[int, ...]], megatron: str, sharding: Sharding, *, exported: bool = True
) -> ParameterMapping:
    """An entry outside the layers."""
    return ParameterMapping(tuple(hf), tuple(hf.values()), megatron, megatron, sharding, exported=exported)


def _inside(
    layers: tuple[int, ...],
    hf: Mapping[str, tuple[int, ...]],
    local: str,
    sharding: Sharding,
    *,
    te: str | None = None,
    num_experts: int = 0,
) -> ParameterMapping:
    """An entry inside `layers`; names follow the layer's prefix."""
    return ParameterMapping(
        hf=tuple("model.layers.{layer}." + name for name in hf),
        shapes=tuple(hf.values()),
        local="decoder.layers.{layer}." + local,
        te="decoder.layers.{layer}." + (te or local),
        sharding=sharding,
        layers=layers,
        num_experts=num_experts,
    )


def resolve(
    mappings: tuple[ParameterMapping, ...], name: str, layer_offset: int, expert_offset: int = 0
) -> tuple[ParameterMapping, tuple[str, ...]]:
    """The mapping of the Megatron parameter `name` (local or Transformer Engine spec), and its Hugging Face names.

    Args:
        layer_offset: global number of the pipeline stage's first layer.
        expert_offset: global number of the rank's first expert.

    Raises:
        WeightError: no entry matches the parameter.
    """
    for mapping in mappings:
        for template in {mapping.local, mapping.te}:
            match = _pattern(template).fullmatch(name)
            if not match:
                continue
            numbers = {key: int(text) for key, text in match.groupdict().items()}
            layer, expert = numbers.get("layer", 0) + layer_offset, numbers.get("expert", 0) + expert_offset
            # Dense layers and layers with experts share a name.
            if mapping.layers is None or layer in mapping.layers:
                return mapping, mapping.hf_names(layer, expert)
    raise WeightError(
        f"the Megatron parameter {name!r} has no counterpart in a Hugging Face folder of this model family; "
        "add it to the weight map (spot_megatron/hf/names.py)"
    )


@lru_cache(maxsize=256)
def _pattern(template: str) -> re.Pattern[str]:
    """`decoder.layers.{layer}.x` -> a pattern with a group `layer` of digits."""
    return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(template)))


def hf_shapes(config: HFModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a Hugging Face folder of this model, without a tied `lm_head`."""
    return {
        name: shape
        for mapping in weight_map(config)
        for layer, expert in mapping.instances()
        for name, shape in zip(mapping.hf_names(layer, expert), mapping.shapes, strict=True)
    }


def is_derived(name: str) -> bool:
    """True for rotary frequencies: older folders store them, but they follow from config.json."""
    return name.endswith("rotary_emb.inv_freq")

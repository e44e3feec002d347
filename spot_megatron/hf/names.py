"""Which Hugging Face tensors make up which Megatron parameter: one table, read in both directions.

A row gives the Hugging Face names, the parameter's name under Megatron-Core's local spec and under its Transformer
Engine spec (which fuses a norm into the linear layer behind it), and how the tensors are laid out. Names hold `{layer}`
and `{expert}`, always the global numbers on the Hugging Face side; a rank's own numbering starts at 0, so `resolve`
takes its offsets. Another family is more rows, nothing else. No PyTorch here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import lru_cache

from spot_megatron.errors import WeightError
from spot_megatron.hf.config import HFModelConfig

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
HF_LAYER, LAYER = "model.layers.{layer}.", "decoder.layers.{layer}."


class Layout(Enum):
    """How a parameter is put together and which dimension tensor parallelism cuts."""

    REPLICATED = "replicated"  # the same on every rank: norms, routers
    COLUMNS = "columns"  # cut along dim 1: a linear layer whose input is split
    VOCAB = "vocab"  # cut along dim 0 after padding V to Vp
    QKV = "qkv"  # q, k, v interleaved by query group, cut along dim 0 by whole groups
    GATE_UP = "gate_up"  # each rank's gate rows, then its up rows


@dataclass(frozen=True)
class Row:
    """One Megatron parameter (of each layer in `layers`, of each expert) and the Hugging Face tensors in it.

    `hf` and `shapes` run in parallel: the names and whole shapes (before tensor parallelism and padding) of the parts,
    in the order in which layout.merge takes them. `layers` is None outside of the layers, `num_experts` 0 outside of
    experts. `exported` is False for a parameter whose value the exported folder holds under another row already: the
    output layer of a model with tied embeddings.
    """

    hf: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    local: str
    te: str
    layout: Layout
    layers: tuple[int, ...] | None = None
    num_experts: int = 0
    exported: bool = True

    def places(self) -> Iterator[tuple[int, int]]:
        """Every (layer, expert) of the row, by global number; 0 where there is none."""
        for layer in (0,) if self.layers is None else self.layers:
            for expert in range(max(self.num_experts, 1)):
                yield layer, expert

    def hf_names(self, layer: int, expert: int) -> tuple[str, ...]:
        return tuple(name.format(layer=layer, expert=expert) for name in self.hf)

    @property
    def checkpoint_key(self) -> str:
        """The name in a Megatron distributed checkpoint, with `{layer}`; experts share one key."""
        shared = re.sub(r"weight\{expert\}$", "weight", self.te)
        return shared.replace("mlp.experts.", "mlp.experts.experts.")


def rows_for(config: HFModelConfig) -> tuple[Row, ...]:
    """The table of a model with this config: embedding, layers (as templates), final norm, output layer."""
    vocab_shape = (config.vocab_size, config.hidden_size)
    head = EMBEDDING if config.tied else LM_HEAD
    output = _row([head], [vocab_shape], "output_layer.weight", Layout.VOCAB)
    return (
        _row([EMBEDDING], [vocab_shape], "embedding.word_embeddings.weight", Layout.VOCAB),
        *(replace(row, layers=tuple(range(config.num_layers))) for row in _attention_rows(config)),
        *(replace(row, layers=config.dense_layers) for row in _dense_rows(config)),
        *(replace(row, layers=config.moe_layers) for row in _expert_rows(config)),
        _row(["model.norm.weight"], [(config.hidden_size,)], "decoder.final_layernorm.weight", Layout.REPLICATED),
        replace(output, exported=not config.tied),
    )


def _attention_rows(config: HFModelConfig) -> list[Row]:
    hidden = config.hidden_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_groups * config.head_dim
    attn, attention = HF_LAYER + "self_attn.", LAYER + "self_attention."
    qkv = [attn + "q_proj.", attn + "k_proj.", attn + "v_proj."]
    lengths = [q_size, kv_size, kv_size]
    rows = [
        _row(
            [HF_LAYER + "input_layernorm.weight"],
            [(hidden,)],
            LAYER + "input_layernorm.weight",
            Layout.REPLICATED,
            te=attention + "linear_qkv.layer_norm_weight",
        ),
        _row(
            [name + "weight" for name in qkv],
            [(length, hidden) for length in lengths],
            attention + "linear_qkv.weight",
            Layout.QKV,
        ),
        _row([attn + "o_proj.weight"], [(hidden, q_size)], attention + "linear_proj.weight", Layout.COLUMNS),
    ]
    if config.qkv_bias:
        biases = [name + "bias" for name in qkv]
        rows += [_row(biases, [(length,) for length in lengths], attention + "linear_qkv.bias", Layout.QKV)]
    if config.qk_norm:
        rows += [
            _row(
                [f"{attn}{part}_norm.weight"],
                [(config.head_dim,)],
                f"{attention}{part}_layernorm.weight",
                Layout.REPLICATED,
            )
            for part in "qk"
        ]
    return rows


def _dense_rows(config: HFModelConfig) -> list[Row]:
    hidden, ffn = config.hidden_size, config.intermediate_size
    return [
        _row(
            [HF_LAYER + "post_attention_layernorm.weight"],
            [(hidden,)],
            LAYER + "pre_mlp_layernorm.weight",
            Layout.REPLICATED,
            te=LAYER + "mlp.linear_fc1.layer_norm_weight",
        ),
        _row(
            [HF_LAYER + "mlp.gate_proj.weight", HF_LAYER + "mlp.up_proj.weight"],
            [(ffn, hidden), (ffn, hidden)],
            LAYER + "mlp.linear_fc1.weight",
            Layout.GATE_UP,
        ),
        _row([HF_LAYER + "mlp.down_proj.weight"], [(hidden, ffn)], LAYER + "mlp.linear_fc2.weight", Layout.COLUMNS),
    ]


def _expert_rows(config: HFModelConfig) -> list[Row]:
    if not config.moe_layers:
        return []
    hidden, ffn, num_experts = config.hidden_size, config.expert_ffn_size, config.num_experts
    hf, local, te = HF_LAYER + "mlp.experts.{expert}.", LAYER + "mlp.experts.local_experts.{expert}.", "mlp.experts."
    norm = [HF_LAYER + "post_attention_layernorm.weight"]
    fc1 = _row(
        [hf + "gate_proj.weight", hf + "up_proj.weight"],
        [(ffn, hidden), (ffn, hidden)],
        local + "linear_fc1.weight",
        Layout.GATE_UP,
        te=LAYER + te + "linear_fc1.weight{expert}",
    )
    fc2 = _row(
        [hf + "down_proj.weight"],
        [(hidden, ffn)],
        local + "linear_fc2.weight",
        Layout.COLUMNS,
        te=LAYER + te + "linear_fc2.weight{expert}",
    )
    return [
        _row(norm, [(hidden,)], LAYER + "pre_mlp_layernorm.weight", Layout.REPLICATED),
        _row([HF_LAYER + "mlp.gate.weight"], [(num_experts, hidden)], LAYER + "mlp.router.weight", Layout.REPLICATED),
        replace(fc1, num_experts=num_experts),
        replace(fc2, num_experts=num_experts),
    ]


def _row(
    hf: Sequence[str], shapes: Sequence[tuple[int, ...]], local: str, layout: Layout, *, te: str | None = None
) -> Row:
    assert len(hf) == len(shapes)
    return Row(tuple(hf), tuple(shapes), local, te or local, layout)


def resolve(rows: tuple[Row, ...], name: str, layer_offset: int, expert_offset: int = 0) -> tuple[Row, tuple[str, ...]]:
    """The row of the Megatron parameter `name` (local or Transformer Engine spelling), and its Hugging Face names.

    `layer_offset` is the global number of the pipeline stage's first layer, `expert_offset` that of the rank's first
    expert.

    Raises:
        WeightError: no row describes the parameter.
    """
    for row in rows:
        for template in {row.local, row.te}:
            match = _pattern(template).fullmatch(name)
            if not match:
                continue
            numbers = {key: int(text) for key, text in match.groupdict().items()}
            layer, expert = numbers.get("layer", 0) + layer_offset, numbers.get("expert", 0) + expert_offset
            if row.layers is None or layer in row.layers:  # dense layers and those with experts share a name
                return row, row.hf_names(layer, expert)
    raise WeightError(
        f"the Megatron parameter {name!r} has no counterpart in a Hugging Face folder of this family: "
        "the model was built with an option that the weight map (spot_megatron/hf/names.py) does not know"
    )


@lru_cache(maxsize=256)
def _pattern(template: str) -> re.Pattern[str]:
    """`decoder.layers.{layer}.x` -> a pattern with a group `layer` of digits."""
    return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(template)))


def hf_shapes(config: HFModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a Hugging Face folder of this model holds (without a tied `lm_head`)."""
    return {
        name: shape
        for row in rows_for(config)
        for layer, expert in row.places()
        for name, shape in zip(row.hf_names(layer, expert), row.shapes, strict=True)
    }


def is_derived(name: str) -> bool:
    """True for a tensor that old folders carry but that follows from config.json: the rotary frequencies."""
    return name.endswith("rotary_emb.inv_freq")

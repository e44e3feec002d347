"""The weight map, read both ways."""

from dataclasses import replace

import pytest

from spot_megatron.errors import WeightError
from spot_megatron.hf.config import HFModelConfig, read_hf_config
from spot_megatron.hf.index import HFIndex
from spot_megatron.hf.names import Sharding, hf_shapes, is_derived, resolve, weight_map
from tests.weights.models import make_folder

CONFIG = HFModelConfig(
    family="qwen3",
    num_layers=3,
    hidden_size=32,
    intermediate_size=48,
    num_heads=4,
    num_groups=2,
    head_dim=16,
    vocab_size=100,
    max_positions=64,
    norm_eps=1e-6,
    rope_theta=1e6,
    tied=False,
    initializer_range=0.02,
    dtype="float32",
)

QWEN2 = replace(CONFIG, family="qwen2", head_dim=8)
LLAMA = replace(CONFIG, family="llama", head_dim=8, rope_factor=8.0)
MOE = replace(CONFIG, family="qwen3_moe", num_experts=4, experts_per_token=2, expert_ffn_size=24, moe_layers=(0, 1, 2))
MIXED_MOE = replace(MOE, moe_layers=(0, 2))
CONFIGS = {"qwen3": CONFIG, "qwen2": QWEN2, "llama": LLAMA, "qwen3_moe": MOE, "qwen3_moe_some": MIXED_MOE}


@pytest.mark.parametrize("family", CONFIGS)
def test_names_of_transformers(family, tmp_path):
    """The table lists exactly what transformers saves, with its shapes."""
    config = CONFIGS[family]
    changes = dict(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_groups,
        head_dim=config.head_dim,
    )
    if config.moe_layers:
        changes["moe_intermediate_size"] = config.expert_ffn_size
    folder = make_folder(tmp_path, family=family, tied=False, **changes)
    assert hf_shapes(config) == {name: span.shape for name, span in HFIndex(folder).spans.items()}
    assert read_hf_config(folder).moe_layers == config.moe_layers


def test_local_and_engine_names_meet_at_the_same_tensors():
    mappings = weight_map(CONFIG)
    prefix = "decoder.layers.1."
    for local, engine, hf in [
        ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
        ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight"),
    ]:
        for spelling in (local, engine):
            mapping, names = resolve(mappings, prefix + spelling, layer_offset=0)
            assert names == (f"model.layers.1.{hf}",)
            assert mapping.sharding is Sharding.REPLICATED


@pytest.mark.parametrize(
    ("local", "engine", "hf"),
    [
        ("mlp.experts.local_experts.1.linear_fc1.weight", "mlp.experts.linear_fc1.weight1", ["gate_proj", "up_proj"]),
        ("mlp.experts.local_experts.1.linear_fc2.weight", "mlp.experts.linear_fc2.weight1", ["down_proj"]),
    ],
)
def test_a_rank_counts_its_experts_from_its_offset(local, engine, hf):
    for spelling in (local, engine):
        _, names = resolve(weight_map(MOE), f"decoder.layers.0.{spelling}", layer_offset=1, expert_offset=2)
        assert names == tuple(f"model.layers.1.mlp.experts.3.{part}.weight" for part in hf)


def test_the_norm_before_experts_is_not_fused():
    mappings, prefix = weight_map(MIXED_MOE), "decoder.layers.0."
    mapping, _ = resolve(mappings, prefix + "pre_mlp_layernorm.weight", layer_offset=0)
    assert mapping.te == mapping.local
    mapping, _ = resolve(mappings, prefix + "pre_mlp_layernorm.weight", layer_offset=1)
    assert mapping.te != mapping.local
    with pytest.raises(WeightError):
        resolve(mappings, prefix + "mlp.linear_fc1.weight", layer_offset=2)


def test_a_stage_counts_its_layers_from_its_offset():
    mapping, names = resolve(weight_map(CONFIG), "decoder.layers.0.self_attention.linear_qkv.weight", layer_offset=2)
    assert names == tuple(f"model.layers.2.self_attn.{part}_proj.weight" for part in "qkv")
    assert mapping.shapes == ((64, 32), (32, 32), (32, 32))


@pytest.mark.parametrize("name", ["decoder.layers.0.mlp.router.weight", "decoder.layers.x.mlp.linear_fc1.weight", ""])
def test_unknown_parameter(name):
    with pytest.raises(WeightError, match="no counterpart"):
        resolve(weight_map(CONFIG), name, layer_offset=0)


def test_tied_head_is_the_embedding_and_is_exported_once():
    tied, untied = weight_map(replace(CONFIG, tied=True)), weight_map(CONFIG)
    mapping, names = resolve(tied, "output_layer.weight", 0)
    assert (names, mapping.exported) == (("model.embed_tokens.weight",), False)
    mapping, names = resolve(untied, "output_layer.weight", 0)
    assert (names, mapping.exported) == (("lm_head.weight",), True)
    assert "lm_head.weight" not in hf_shapes(replace(CONFIG, tied=True))


def test_rotary_frequencies_are_no_weights():
    assert is_derived("model.layers.0.self_attn.rotary_emb.inv_freq")
    assert not is_derived("model.norm.weight")

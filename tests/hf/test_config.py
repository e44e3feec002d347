"""config.json: what is refused, each time with the key."""

from __future__ import annotations

import json

import pytest

from spot_megatron.errors import WeightError
from spot_megatron.hf.config import read_hf_config

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 101,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
}


def refused(folder, changes, message):
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    with pytest.raises(WeightError, match=message):
        read_hf_config(folder)


def test_the_plain_config_is_accepted(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": None}))
    assert read_hf_config(tmp_path).num_layers == 2


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_leftover_quantization_config(tmp_path, key):
    """Exported over plain weights, it would make servers dequantize what is not quantized."""
    refused(tmp_path, {key: {"quant_method": "fp8"}}, rf"config\.json.*remove the key {key} if the weights")


@pytest.mark.parametrize("value", [0, -1, 2.0, "2", True, 10**6, 10**400, [2]])
def test_sizes(tmp_path, value):
    refused(tmp_path, {"num_hidden_layers": value}, "num_hidden_layers=.* must be a whole number from 1 to 10000")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": "Qwen3ForCausalLM"}, "list of names"),
        ({"architectures": ["GPT2LMHeadModel"]}, "supported are"),
        ({"rope_theta": [1]}, "wrong type"),
        ({"rope_theta": None, "rope_parameters": 3}, "wrong type"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope type 'yarn'"),
    ],
)
def test_other_values(tmp_path, changes, message):
    refused(tmp_path, changes, message)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 10**5, b"[]", b"3"])
def test_damaged_files(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(WeightError, match=r"config\.json"):
        read_hf_config(tmp_path)


def test_missing_keys(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in CONFIG.items() if k != "vocab_size"}))
    with pytest.raises(WeightError, match="lacks the key 'vocab_size'"):
        read_hf_config(tmp_path)

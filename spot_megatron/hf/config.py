"""The part of a Hugging Face config.json that shapes a model, checked once and typed.

Reads files of transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spot_megatron.errors import WeightError

FAMILIES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}

# Constants of Llama 3's rotary scaling in Megatron-Core; only `factor` can be set there.
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class HFModelConfig:
    """Shape of a decoder. Sizes are counts of elements; `head_dim` is per head, `num_groups` the key-value heads.

    `intermediate_size` is that of dense layers. Layers in `moe_layers` (numbered from 0) have `num_experts` experts of
    `expert_ffn_size`, of which a token sees `experts_per_token`; `norm_topk` makes their weights sum to 1.
    `rope_factor` is the factor of Llama 3's rotary scaling, None without scaling.
    """

    family: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_groups: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    tied: bool
    initializer_range: float
    dtype: str
    rope_factor: float | None = None
    num_experts: int = 0
    experts_per_token: int = 0
    expert_ffn_size: int = 0
    norm_topk: bool = True
    moe_layers: tuple[int, ...] = ()

    @property
    def qk_norm(self) -> bool:
        return self.family in ("qwen3", "qwen3_moe")

    @property
    def qkv_bias(self) -> bool:
        return self.family == "qwen2"

    @property
    def dense_layers(self) -> tuple[int, ...]:
        return tuple(layer for layer in range(self.num_layers) if layer not in self.moe_layers)

    @property
    def moe_share(self) -> float:
        """Share of the layers that have experts."""
        return len(self.moe_layers) / self.num_layers

    @property
    def gated(self) -> bool:
        """True if the first MLP matrix has a gate beside its up projection (SwiGLU), as in every supported family."""
        return True

    @property
    def query_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def key_value_width(self) -> int:
        """Of the keys, and of the values."""
        return self.num_groups * self.head_dim

    @property
    def qkv_width(self) -> int:
        return self.query_width + 2 * self.key_value_width

    @property
    def mlp_in_width(self) -> int:
        """Outputs of a dense layer's first MLP matrix: gate and up, or up alone."""
        return (2 if self.gated else 1) * self.intermediate_size

    @property
    def attention_weights(self) -> int:
        """Parameters of one layer's attention matrices."""
        return self.hidden_size * (self.qkv_width + self.query_width)

    @property
    def mlp_weights(self) -> int:
        """Parameters of one dense layer's MLP matrices."""
        return self.hidden_size * (self.mlp_in_width + self.intermediate_size)

    @property
    def expert_weights(self) -> int:
        """Parameters of one expert."""
        return 3 * self.hidden_size * self.expert_ffn_size

    @property
    def router_weights(self) -> int:
        return self.hidden_size * self.num_experts

    @property
    def small_weights(self) -> int:
        """Norms and biases of one layer."""
        return 2 * self.hidden_size + 2 * self.head_dim * self.qk_norm + self.qkv_width * self.qkv_bias

    @property
    def embedding_weights(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """All parameters; a tied embedding is counted once."""
        layers = self.num_layers * (self.attention_weights + self.small_weights)
        layers += len(self.dense_layers) * self.mlp_weights
        layers += len(self.moe_layers) * (self.router_weights + self.num_experts * self.expert_weights)
        return layers + self.hidden_size + self.embedding_weights * (1 if self.tied else 2)

    @property
    def active_weights(self) -> int:
        """Matrix parameters that a token is multiplied with: the LM head is one of them, the embedding is not."""
        layers = self.num_layers * self.attention_weights + len(self.dense_layers) * self.mlp_weights
        layers += len(self.moe_layers) * (self.router_weights + self.experts_per_token * self.expert_weights)
        return layers + self.embedding_weights


def read_hf_config(folder: str | Path) -> HFModelConfig:
    """Reads `folder`/config.json.

    Raises:
        WeightError: the file is missing, is not JSON, names an unsupported architecture, has a size that is not a
            positive whole number, or uses an option that the Megatron model does not reproduce (quantization,
            sliding windows, rope scaling other than Llama 3's, another activation, biases other than Qwen2's).
    """
    path = Path(folder) / "config.json"
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise WeightError(f"{path} does not exist: model.hf must be a Hugging Face model folder") from None
    except OSError as error:
        raise WeightError(f"{path} cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise WeightError(f"{path} is not JSON: {error}; fetch it again") from None
    if not isinstance(raw, dict):
        raise WeightError(f"{path} does not hold a JSON object")
    names = raw.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise WeightError(f"{path}: architectures must be a list of names")
    family = next((FAMILIES[name] for name in names if name in FAMILIES), None)
    if family is None:
        raise WeightError(f"{path}: architectures is {names}; supported are {sorted(FAMILIES)}")
    _refuse_unsupported(raw, path)
    _check_sizes(raw, path)
    try:
        theta, factor = _rope(raw, path)
        return HFModelConfig(
            family=family,
            num_layers=raw["num_hidden_layers"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_heads=raw["num_attention_heads"],
            num_groups=raw.get("num_key_value_heads") or raw["num_attention_heads"],
            head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
            vocab_size=raw["vocab_size"],
            max_positions=raw["max_position_embeddings"],
            norm_eps=raw["rms_norm_eps"],
            rope_theta=theta,
            rope_factor=factor,
            tied=bool(raw.get("tie_word_embeddings", False)),
            initializer_range=raw.get("initializer_range", 0.02),
            dtype=raw.get("dtype") or raw.get("torch_dtype") or "bfloat16",
            **(_experts(raw, path) if family == "qwen3_moe" else {}),
        )
    except KeyError as error:
        raise WeightError(f"{path} lacks the key {error}, which {names[0]} needs") from None
    except (TypeError, ValueError) as error:
        raise WeightError(f"{path} holds a value of the wrong type: {error}") from None


# Sizes and their upper bounds, far above every model: they decide how much memory is allocated.
_SIZES = {
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 10_000),
    **dict.fromkeys(("num_experts", "num_local_experts", "num_experts_per_tok"), 10_000),
    **dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size", "head_dim"), 10**7),
    **dict.fromkeys(("vocab_size", "max_position_embeddings"), 10**9),
}


def _check_sizes(raw: dict[str, Any], path: Path) -> None:
    for key, largest in _SIZES.items():
        value = raw.get(key)
        if value is not None and not (type(value) is int and 1 <= value <= largest):
            raise WeightError(f"{path}: {key}={value!r} must be a whole number from 1 to {largest}")


def _experts(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """The layers with experts, and the routing options."""
    num_experts = raw["num_local_experts" if "num_local_experts" in raw else "num_experts"]  # transformers 5, 4
    step, dense = raw["decoder_sparse_step"], raw.get("mlp_only_layers") or []
    chosen, norm_topk = raw["num_experts_per_tok"], raw["norm_topk_prob"]
    layers = [n for n in range(raw["num_hidden_layers"]) if n not in dense and num_experts > 0 and (n + 1) % step == 0]
    if not layers:
        raise WeightError(f"{path}: no layer has experts (num_experts, mlp_only_layers, decoder_sparse_step)")
    if norm_topk and chosen == 1:
        raise WeightError(f"{path}: norm_topk_prob with num_experts_per_tok=1 gives every expert the weight 1")
    return {
        "num_experts": num_experts,
        "experts_per_token": chosen,
        "expert_ffn_size": raw["moe_intermediate_size"],
        "norm_topk": norm_topk,
        "moe_layers": tuple(layers),
    }


def _rope(raw: dict[str, Any], path: Path) -> tuple[float, float | None]:
    """`rope_theta`, and the factor of Llama 3's scaling (None without), from either generation of transformers."""
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    if "rope_theta" in raw:
        rope.setdefault("rope_theta", raw["rope_theta"])
    if "rope_theta" not in rope:
        raise WeightError(f"{path} has neither rope_theta nor rope_parameters.rope_theta")
    theta, kind = float(rope["rope_theta"]), rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise WeightError(f"{path}: rope type {kind!r} is not supported; 'default' and 'llama3' are")
    for key, constant in LLAMA3_ROPE.items():
        if rope.get(key) != constant:
            raise WeightError(
                f"{path}: llama3 rope with {key}={rope.get(key)} is not supported; Megatron-Core computes with "
                f"{constant}"
            )
    return theta, float(rope["factor"])


def _refuse_unsupported(raw: dict[str, Any], path: Path) -> None:
    """Raises WeightError for a model that Megatron would compute differently."""
    for key in ("quantization_config", "compression_config"):
        if raw.get(key) is not None:
            raise WeightError(
                f"{path}: {key} is set, but quantized models are not supported; remove the key {key} if the weights "
                "are already float32, float16 or bfloat16, otherwise dequantize the model first"
            )
    checks = {
        "hidden_act": raw.get("hidden_act", "silu") == "silu",
        "attention_bias": not raw.get("attention_bias", False),
        "mlp_bias": not raw.get("mlp_bias", False),
        "use_sliding_window": not raw.get("use_sliding_window", False),
        "layer_types": set(raw.get("layer_types") or ["full_attention"]) == {"full_attention"},
        "attention_dropout": not raw.get("attention_dropout", 0.0),
    }
    for key, fine in checks.items():
        if not fine:
            raise WeightError(f"{path}: {key}={raw[key]!r} is not supported by this model builder")

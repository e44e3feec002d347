"""Published models, so that a plan needs neither weights nor a network."""

from __future__ import annotations

from pathlib import Path

from spot_megatron.errors import RecipeError
from spot_megatron.files import did_you_mean
from spot_megatron.hf.config import HFModelConfig, read_hf_config


def published(
    family: str,
    layers: int,
    hidden: int,
    ffn: int,
    heads: int,
    groups: int,
    vocab: int,
    tied: bool = False,
    head_dim: int = 128,
    expert_ffn: int = 0,
    num_experts: int = 0,
    top_k: int = 0,
    config: type[HFModelConfig] = HFModelConfig,
) -> HFModelConfig:
    """A config of published sizes. With experts, every layer has them. Fields that shape no parameter (positions, rope,
    epsilon) have valid values and not the published ones."""
    return config(
        family=family,
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_heads=heads,
        num_groups=groups,
        head_dim=head_dim,
        vocab_size=vocab,
        max_positions=32_768,
        norm_eps=1e-6,
        rope_theta=1e6,
        tied=tied,
        initializer_range=0.02,
        dtype="bfloat16",
        num_experts=num_experts,
        experts_per_token=top_k,
        expert_ffn_size=expert_ffn,
        moe_layers=tuple(range(layers)) if num_experts else (),
    )


def _qwen3(layers: int, hidden: int, ffn: int, heads: int, tied: bool = False) -> HFModelConfig:
    return published("qwen3", layers, hidden, ffn, heads, 8, 151_936, tied)


def _qwen3_moe(layers: int, hidden: int, ffn: int, heads: int, expert_ffn: int) -> HFModelConfig:
    return published(
        "qwen3_moe", layers, hidden, ffn, heads, 4, 151_936, expert_ffn=expert_ffn, num_experts=128, top_k=8
    )


# Source of every row: config.json of the hub repository of that name.
PUBLISHED = {
    "Qwen/Qwen3-0.6B": _qwen3(28, 1024, 3072, 16, tied=True),
    "Qwen/Qwen3-1.7B": _qwen3(28, 2048, 6144, 16, tied=True),
    "Qwen/Qwen3-4B": _qwen3(36, 2560, 9728, 32, tied=True),
    "Qwen/Qwen3-8B": _qwen3(36, 4096, 12_288, 32),
    "Qwen/Qwen3-14B": _qwen3(40, 5120, 17_408, 40),
    "Qwen/Qwen3-32B": _qwen3(64, 5120, 25_600, 64),
    "Qwen/Qwen3-30B-A3B": _qwen3_moe(48, 2048, 6144, 32, 768),
    "Qwen/Qwen3-235B-A22B": _qwen3_moe(94, 4096, 12_288, 64, 1536),
    "meta-llama/Llama-3.1-8B": published("llama", 32, 4096, 14_336, 32, 8, 128_256),
}
# Elements of the tensors in the safetensors files of each repository; a tied lm_head is counted once.
PUBLISHED_PARAMETERS = {
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "Qwen/Qwen3-235B-A22B": 235_093_634_560,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
}
_VARIANTS = ("", "-Base", "-Instruct", "-Instruct-2507", "-Thinking-2507")  # other weights of the same sizes


def published_name(name: str) -> str | None:
    """The entry of PUBLISHED for a hub id or a variant of it."""
    bases = (name.removesuffix(variant) for variant in _VARIANTS if name.endswith(variant))
    return next((base for base in bases if base in PUBLISHED), None)


def planned_model(name: str) -> HFModelConfig:
    """The config of a recipe's `model.hf`: that of the local folder, else the published one.

    Raises:
        RecipeError: it is neither a folder nor a published model.
        WeightError: the folder's config.json cannot be used.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return read_hf_config(folder)
    base = published_name(name)
    if base is None:
        hint = did_you_mean(name, PUBLISHED) or "."
        raise RecipeError(
            f"model.hf: {name} is not a local folder, and its sizes are not known{hint} "
            f"Known without a folder: {', '.join(PUBLISHED)}. For another model, put its config.json (a few kB) into a "
            "folder and set model.hf to that"
        )
    return PUBLISHED[base]

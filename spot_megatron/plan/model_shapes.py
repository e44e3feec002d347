"""Sizes of a model and how many parameters each part has: all that memory and time depend on.

A local folder's config.json is read; for hub ids that are not on this machine there is a table of published shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from spot_megatron.errors import RecipeError
from spot_megatron.files import did_you_mean
from spot_megatron.hf.config import HFModelConfig, read_hf_config


@dataclass(frozen=True)
class ModelShape:
    """A decoder. Sizes are counts of elements; `head_dim` is per head, `num_groups` the key-value heads.

    `ffn` is the width of dense layers, `expert_ffn` that of one expert; `num_moe_layers` layers have experts.
    """

    name: str
    num_layers: int
    hidden: int
    ffn: int
    num_heads: int
    num_groups: int
    head_dim: int
    vocab: int
    tied: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    gated: bool = True  # SwiGLU; every supported family is, published GPT runs are not
    num_experts: int = 0
    top_k: int = 0
    expert_ffn: int = 0
    num_moe_layers: int = 0

    @property
    def query_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def group_width(self) -> int:
        return self.num_groups * self.head_dim

    @property
    def qkv_width(self) -> int:
        return self.query_width + 2 * self.group_width

    @property
    def num_dense_layers(self) -> int:
        return self.num_layers - self.num_moe_layers

    @property
    def ffn_in(self) -> int:
        """Outputs of a dense layer's first MLP matrix: gate and up, or up alone."""
        return (2 if self.gated else 1) * self.ffn

    @property
    def attention_weights(self) -> int:
        """Parameters of one layer's attention matrices."""
        return self.hidden * (self.qkv_width + self.query_width)

    @property
    def mlp_weights(self) -> int:
        """Parameters of one dense layer's MLP matrices."""
        return self.hidden * (self.ffn_in + self.ffn)

    @property
    def one_expert_weights(self) -> int:
        return 3 * self.hidden * self.expert_ffn

    @property
    def router_weights(self) -> int:
        return self.hidden * self.num_experts

    @property
    def small_weights(self) -> int:
        """Norms and biases of one layer."""
        return 2 * self.hidden + 2 * self.head_dim * self.qk_norm + self.qkv_width * self.qkv_bias

    @property
    def embedding_weights(self) -> int:
        return self.vocab * self.hidden

    @property
    def num_parameters(self) -> int:
        """All parameters, a tied embedding counted once."""
        layers = self.num_layers * (self.attention_weights + self.small_weights)
        layers += self.num_dense_layers * self.mlp_weights
        layers += self.num_moe_layers * (self.router_weights + self.num_experts * self.one_expert_weights)
        return layers + self.hidden + self.embedding_weights * (1 if self.tied else 2)

    @property
    def active_weights(self) -> int:
        """Matrix parameters that one token meets, the LM head included, the embedding look-up not."""
        layers = self.num_layers * self.attention_weights + self.num_dense_layers * self.mlp_weights
        layers += self.num_moe_layers * (self.router_weights + self.top_k * self.one_expert_weights)
        return layers + self.embedding_weights

    @classmethod
    def from_hf(cls, name: str, hf: HFModelConfig) -> ModelShape:
        return cls(
            name=name,
            num_layers=hf.num_layers,
            hidden=hf.hidden_size,
            ffn=hf.intermediate_size,
            num_heads=hf.num_heads,
            num_groups=hf.num_groups,
            head_dim=hf.head_dim,
            vocab=hf.vocab_size,
            tied=hf.tied,
            qk_norm=hf.qk_norm,
            qkv_bias=hf.qkv_bias,
            num_experts=hf.num_experts,
            top_k=hf.experts_per_token,
            expert_ffn=hf.expert_ffn_size,
            num_moe_layers=len(hf.moe_layers),
        )

    def as_hf(self) -> HFModelConfig:
        """A config of these sizes. What shapes no parameter is not known and has a value that is only valid; of layers
        with experts the number is right, not which they are."""
        dense = "qwen3" if self.qk_norm else "qwen2" if self.qkv_bias else "llama"
        return HFModelConfig(
            family="qwen3_moe" if self.num_experts else dense,
            num_layers=self.num_layers,
            hidden_size=self.hidden,
            intermediate_size=self.ffn,
            num_heads=self.num_heads,
            num_groups=self.num_groups,
            head_dim=self.head_dim,
            vocab_size=self.vocab,
            max_positions=32_768,
            norm_eps=1e-6,
            rope_theta=1e6,
            tied=self.tied,
            initializer_range=0.02,
            dtype="bfloat16",
            num_experts=self.num_experts,
            experts_per_token=self.top_k,
            expert_ffn_size=self.expert_ffn,
            moe_layers=tuple(range(self.num_moe_layers)),
        )


def _qwen3(
    size: str, layers: int, hidden: int, ffn: int, heads: int, groups: int = 8, tied: bool = False
) -> ModelShape:
    return ModelShape(f"Qwen/Qwen3-{size}", layers, hidden, ffn, heads, groups, 128, 151_936, tied, qk_norm=True)


def _qwen3_moe(size: str, layers: int, hidden: int, ffn: int, heads: int, expert_ffn: int) -> ModelShape:
    return ModelShape(
        f"Qwen/Qwen3-{size}", layers, hidden, ffn, heads, 4, 128, 151_936, qk_norm=True,
        num_experts=128, top_k=8, expert_ffn=expert_ffn, num_moe_layers=layers,
    )  # fmt: skip


# Source of every row: config.json of the hub repository of that name.
PUBLISHED = {
    shape.name: shape
    for shape in (
        _qwen3("0.6B", 28, 1024, 3072, 16, tied=True),
        _qwen3("1.7B", 28, 2048, 6144, 16, tied=True),
        _qwen3("4B", 36, 2560, 9728, 32, tied=True),
        _qwen3("8B", 36, 4096, 12_288, 32),
        _qwen3("14B", 40, 5120, 17_408, 40),
        _qwen3("32B", 64, 5120, 25_600, 64),
        _qwen3_moe("30B-A3B", 48, 2048, 6144, 32, 768),
        _qwen3_moe("235B-A22B", 94, 4096, 12_288, 64, 1536),
        ModelShape("meta-llama/Llama-3.1-8B", 32, 4096, 14_336, 32, 8, 128, 128_256),
    )
}
_VARIANTS = ("-Base", "-Instruct", "-Instruct-2507", "-Thinking-2507")  # other weights of the same shape


def model_shape(name: str) -> ModelShape:
    """The shape of a recipe's `model.hf`.

    Raises:
        RecipeError: it is neither a folder nor a hub id of the table.
        WeightError: the folder's config.json cannot be used.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return ModelShape.from_hf(name, read_hf_config(folder))
    for variant in ("", *_VARIANTS):
        if name.endswith(variant) and name.removesuffix(variant) in PUBLISHED:
            return PUBLISHED[name.removesuffix(variant)]
    raise RecipeError(
        f"model.hf: {name} is not a folder and its shape is not known"
        + (did_you_mean(name, PUBLISHED) or ".")
        + f" Known without a folder: {', '.join(PUBLISHED)}. For another model put its config.json (a few kB) into a "
        "folder and set model.hf to that"
    )

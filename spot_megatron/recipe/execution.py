"""The schema's sections that say how a run is computed and not what: parallel sizes, precision, memory."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from spot_megatron.recipe.section import Section


class Parallel(Section):
    """How the model and a micro-batch are split over ranks. The data-parallel size is what is left of the world."""

    tensor: int = Field(1, ge=1, description="Tensor-parallel size: ranks that split every matrix.")
    sequence: bool = Field(
        False, description="Also splits the activations between matrices by tokens over the tensor ranks."
    )
    pipeline: int = Field(1, ge=1, description="Pipeline-parallel size: stages of consecutive layers.")
    virtual_pipeline: int | None = Field(
        None, ge=2, description="Chunks of layers a pipeline stage (interleaved schedule). null: one."
    )
    context: int = Field(1, ge=1, description="Context-parallel size: ranks that split the tokens of a micro-batch.")
    expert: int = Field(1, ge=1, description="Expert-parallel size: ranks that split the experts of a layer.")
    expert_tensor: int = Field(1, ge=1, description="Tensor-parallel size inside an expert.")
    timeout_minutes: float = Field(
        30, gt=0, description="Minutes after which a waiting collective is aborted and the run ends; see heartbeat/."
    )

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one replica of the model."""
        return self.tensor * self.pipeline * self.context


class Precision(Section):
    """Number formats of weights, matrix products and gradients."""

    dtype: Literal["fp32", "bf16"] = Field("bf16", description="Type of the weights and activations of the model.")
    fp8: Literal["none", "tensorwise", "blockwise"] = Field(
        "none",
        description="FP8 matrix products (Hopper and newer, Transformer Engine): one scale a tensor, or one a block of "
        "128 values.",
    )
    grad_dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="Type in which gradients are accumulated and reduced; bf16 saves 2 bytes a parameter."
    )


class Memory(Section):
    """Memory of activations and optimizer states."""

    recompute: Literal["none", "selective", "full"] = Field(
        "none",
        description="Activations computed again in the backward pass: none, selective (attention), or full (layers).",
    )
    recompute_above_tokens: int | None = Field(
        None,
        ge=1,
        description="With recompute none: a micro-batch of several pairs stays within this many tokens and keeps its "
        "activations; a longer pair is alone in its micro-batch and is recomputed in full. null: no recomputation.",
    )
    master_weights: Literal["fp32", "remainders"] = Field(
        "fp32",
        description="Optimizer's copy of bf16 weights: fp32 (4 bytes a parameter), or remainders (the low 16 bits of "
        "fp32 beside the bf16 weight, 2 bytes).",
    )
    moments: Literal["fp32", "bf16"] = Field("fp32", description="Type of AdamW's two moments.")

"""How parallel sizes divide a model over the ranks of a job.

Ranks of a node are neighbours. Megatron-Core orders ranks tensor, context, data, pipeline (fastest first), and for the
experts tensor, expert, data, pipeline; a group's stride determines how many of its ranks share a node.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from spot_megatron.errors import RecipeError
from spot_megatron.hf.config import HFModelConfig
from spot_megatron.recipe import Parallel

VOCAB_MULTIPLE = 16  # rows of each tensor rank's embedding and head are a multiple of this, for tensor cores


@dataclass(frozen=True)
class Split:
    """`num_gpus` ranks under `parallel`. `nodes` of `gpus_per_node`."""

    parallel: Parallel
    num_gpus: int
    gpus_per_node: int = 8

    @property
    def data(self) -> int:
        """Replicas of the model: ranks that see other pairs."""
        return self.num_gpus // self.parallel.model_ranks

    @property
    def dense_shards(self) -> int:
        """Ranks that share the optimizer state of everything but experts: data x context."""
        return self.data * self.parallel.context

    @property
    def expert_shards(self) -> int:
        """Ranks that share the optimizer state of the same experts."""
        p = self.parallel
        return self.num_gpus // (p.expert * p.expert_tensor * p.pipeline)

    @property
    def num_nodes(self) -> int:
        return math.ceil(self.num_gpus / self.gpus_per_node)

    @property
    def sequence_shards(self) -> int:
        """Tensor ranks that split the rows between the matrices: norms and residuals."""
        return self.parallel.tensor if self.parallel.sequence else 1

    def layers_of_stage(self, num_layers: int) -> list[int]:
        """Layers of each pipeline rank."""
        return layers_of_stage(num_layers, self.parallel.pipeline)

    def layers_in_flight(self, num_layers: int, stage: int, num_microbatches: int) -> float:
        """Layers whose activations a rank holds at its peak, summed over the micro-batches in flight.

        One-forward-one-backward: stage i holds pipeline - i micro-batches. Interleaved: its first chunks run ahead
        (Megatron-Core schedules.py, get_pp_rank_microbatches: warm-up of 2 (p - i - 1) + (v - 1) p chunks, plus one).
        """
        p, chunks = self.parallel.pipeline, self.parallel.virtual_pipeline or 1
        layers = self.layers_of_stage(num_layers)[stage]
        if chunks == 1:
            return layers * min(num_microbatches, p - stage)
        ahead = 2 * (p - stage - 1) + (chunks - 1) * p + 1
        return layers / chunks * min(num_microbatches * chunks, ahead)


def layers_of_stage(num_layers: int, pipeline: int) -> list[int]:
    """Layers of each pipeline rank. If they do not divide evenly, the last rank, which has the LM head, gets fewer."""
    most = math.ceil(num_layers / pipeline)
    return [most] * (pipeline - 1) + [num_layers - most * (pipeline - 1)]


def padded_vocab_size(vocab_size: int, tensor: int) -> int:
    """Rows of the embedding over all tensor ranks, padding included."""
    multiple = VOCAB_MULTIPLE * tensor
    return math.ceil(vocab_size / multiple) * multiple


def check_split(hf: HFModelConfig, split: Split) -> None:
    """Raises RecipeError where the parallel sizes do not divide the GPUs or the model."""
    p = split.parallel
    if split.num_gpus % p.model_ranks:
        raise RecipeError(
            f"{split.num_gpus} processes cannot hold models of {p.model_ranks} ranks each (parallel.tensor {p.tensor} "
            f"x pipeline {p.pipeline} x context {p.context}); use a multiple of {p.model_ranks}"
        )
    expert_ranks = p.expert * p.expert_tensor * p.pipeline
    if split.num_gpus % expert_ranks:
        raise RecipeError(
            f"{split.num_gpus} processes cannot hold experts over {expert_ranks} ranks (parallel.expert {p.expert} x "
            f"expert_tensor {p.expert_tensor} x pipeline {p.pipeline}); use a multiple of {expert_ranks}"
        )
    check_parallel(hf, p)


def check_parallel(hf: HFModelConfig, parallel: Parallel) -> None:
    """Raises RecipeError where a parallel size does not divide the part of the model that it splits."""
    head_ranks = parallel.tensor * parallel.context  # context parallelism exchanges positions for heads in attention
    fitting = [n for n in range(1, hf.num_groups + 1) if hf.num_heads % n == 0 == hf.num_groups % n]
    if head_ranks not in fitting:
        raise RecipeError(
            f"parallel.tensor={parallel.tensor} x parallel.context={parallel.context} does not divide the model's "
            f"{hf.num_groups} key-value heads and {hf.num_heads} attention heads; set their product to one of {fitting}"
        )
    if hf.dense_layers:
        _check_divides("parallel.tensor", parallel.tensor, "intermediate_size", hf.intermediate_size)
    _check_stages(hf.num_layers, parallel)
    _check_experts(hf, parallel)


def _check_stages(num_layers: int, parallel: Parallel) -> None:
    stages = parallel.pipeline * (parallel.virtual_pipeline or 1)
    if num_layers < stages:
        raise RecipeError(f"parallel.pipeline: {num_layers} layers cannot fill {stages} stages")
    if parallel.virtual_pipeline and num_layers % stages:
        raise RecipeError(
            f"parallel.virtual_pipeline: {num_layers} layers do not split evenly over "
            f"{parallel.pipeline} x {parallel.virtual_pipeline} virtual stages"
        )
    if layers_of_stage(num_layers, parallel.pipeline)[-1] < 1:
        raise RecipeError(f"parallel.pipeline={parallel.pipeline} leaves stages of the {num_layers} layers empty")


def _check_experts(hf: HFModelConfig, parallel: Parallel) -> None:
    if not hf.moe_layers:
        if parallel.expert > 1 or parallel.expert_tensor > 1:
            raise RecipeError("parallel.expert and parallel.expert_tensor: this model has no experts; leave both at 1")
        return
    _check_divides("parallel.expert", parallel.expert, "experts", hf.num_experts)
    _check_divides("parallel.expert_tensor", parallel.expert_tensor, "moe_intermediate_size", hf.expert_ffn_size)
    if parallel.tensor > 1 and not parallel.sequence:
        raise RecipeError(
            f"parallel.tensor={parallel.tensor} with experts needs parallel.sequence=true: "
            "Megatron-Core dispatches each tensor rank's own part of the sequence"
        )


def _check_divides(key: str, size: int, part: str, count: int) -> None:
    if count % size:
        raise RecipeError(f"{key}={size} does not divide the model's {count} {part}")

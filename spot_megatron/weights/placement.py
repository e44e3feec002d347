"""The ranks that hold each parameter, from Megatron's process groups."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state as mpu

from spot_megatron.hf.names import ParameterMapping
from spot_megatron.model.gpt import PairGPT


@dataclass(frozen=True)
class ReplicaGroup:
    """The tensor-parallel ranks that together hold one replica of a parameter.

    Attributes:
        ranks: their process group; this process is one of them.
        replica: number of this replica.
        num_replicas: number of replicas in the data-parallel group.
    """

    ranks: dist.ProcessGroup
    replica: int
    num_replicas: int


@dataclass(frozen=True)
class Placement:
    """Experts are split and replicated over other ranks than the rest of the model."""

    shared: ReplicaGroup
    experts: ReplicaGroup
    expert_rank: int
    expert_size: int

    @classmethod
    def of_megatron(cls) -> Placement:
        """Reads Megatron's initialized process groups."""
        return cls(
            shared=ReplicaGroup(
                mpu.get_tensor_model_parallel_group(),
                mpu.get_data_parallel_rank(with_context_parallel=True),
                mpu.get_data_parallel_world_size(with_context_parallel=True),
            ),
            experts=ReplicaGroup(
                mpu.get_expert_tensor_parallel_group(),
                mpu.get_expert_data_parallel_rank(),
                mpu.get_expert_data_parallel_world_size(),
            ),
            expert_rank=mpu.get_expert_model_parallel_rank(),
            expert_size=mpu.get_expert_model_parallel_world_size(),
        )

    def replica_group(self, mapping: ParameterMapping) -> ReplicaGroup:
        """The ranks that hold the mapping's parameters."""
        return self.experts if mapping.num_experts else self.shared

    def expert_offset(self, num_experts: int) -> int:
        """The global number of this rank's first expert."""
        return self.expert_rank * (num_experts // self.expert_size)


def layer_offset(chunk: PairGPT) -> int:
    """The global number of a model chunk's first layer, counted from 0, for any pipeline split."""
    layers = chunk.decoder.layers
    return layers[0].layer_number - 1 if len(layers) else 0

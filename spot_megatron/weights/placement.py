"""Which part of the model this process holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state as mpu

from spot_megatron.hf.names import Row
from spot_megatron.model.gpt import PairGPT


@dataclass(frozen=True)
class Part:
    """The ranks that together hold a parameter (`group`), and which of its copies this process belongs to."""

    group: dist.ProcessGroup
    copy: int
    num_copies: int


@dataclass(frozen=True)
class Placement:
    """Experts are split and copied over other ranks than the rest of the model."""

    shared: Part
    experts: Part
    expert_rank: int
    expert_size: int

    @classmethod
    def of_megatron(cls) -> Placement:
        """From Megatron's own groups, once they are set up."""
        return cls(
            shared=Part(
                mpu.get_tensor_model_parallel_group(),
                mpu.get_data_parallel_rank(with_context_parallel=True),
                mpu.get_data_parallel_world_size(with_context_parallel=True),
            ),
            experts=Part(
                mpu.get_expert_tensor_parallel_group(),
                mpu.get_expert_data_parallel_rank(),
                mpu.get_expert_data_parallel_world_size(),
            ),
            expert_rank=mpu.get_expert_model_parallel_rank(),
            expert_size=mpu.get_expert_model_parallel_world_size(),
        )

    def part(self, row: Row) -> Part:
        """Who holds the row's parameters."""
        return self.experts if row.num_experts else self.shared

    def expert_offset(self, num_experts: int) -> int:
        """The global number of this rank's first expert."""
        return self.expert_rank * (num_experts // self.expert_size)


def layer_offset(chunk: PairGPT) -> int:
    """The global number of a chunk's first layer, counted from 0: right under any pipeline layout."""
    layers = chunk.decoder.layers
    return layers[0].layer_number - 1 if len(layers) else 0

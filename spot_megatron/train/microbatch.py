"""A pack on its way through the model: this rank's positions on the device, and sums over the pairs' sides."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from megatron.core import parallel_state as mpu
from megatron.core import tensor_parallel
from torch import Tensor

from spot_megatron.data.pack import Pack
from spot_megatron.model.attention.pair import PairSeqParams, own_positions, pair_seq_params
from spot_megatron.objective.reward import segment_sums
from spot_megatron.parallel.device import to_device


@dataclass(frozen=True)
class MicroBatch:
    """A pack, and this context-parallel rank's share of it on the device."""

    pack: Pack
    layout: PairSeqParams
    input_ids: Tensor  # [1, T / context ranks]
    position_ids: Tensor  # [1, T / context ranks]


def microbatch(pack: Pack, device: torch.device, context_rank: int = 0, context_size: int = 1) -> MicroBatch:
    """Copies this context-parallel rank's positions of `pack` to `device`."""
    positions = own_positions(pack, context_rank, context_size)

    def own(array: np.ndarray) -> Tensor:
        return to_device(array[positions], device)[None]

    layout = pair_seq_params(pack, device, context_rank, context_size)
    return MicroBatch(pack, layout, own(pack.input_ids), own(pack.position_ids))


def side_sums(batch: MicroBatch, logp_S: Tensor) -> tuple[Tensor, Tensor]:
    """([B], [B]) log-probability sums of the chosen and the rejected sides of a micro-batch."""
    return segment_sums(logp_S.double(), batch.layout.head_segment, len(batch.pack.pair_index), over_context_ranks)


def over_context_ranks(sums: Tensor) -> Tensor:
    """Adds the sums of the ranks that hold a pack's other positions; the gradient goes to each rank's own part."""
    return tensor_parallel.reduce_from_tensor_model_parallel_region(sums, group=mpu.get_context_parallel_group())

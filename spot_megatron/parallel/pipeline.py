"""Shapes of the hidden states that pipeline stages send each other.

Packs differ in length. Megatron-Core's `variable_seq_lengths` therefore sends a shape ahead of every tensor and waits
for the device until it can be read. Every stage of a pipeline has the step's packs, so the shapes are known on the
host: `known_shapes` hands them out in the order in which the tensors arrive.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from megatron.core import parallel_state as mpu
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table


def arrivals(num_microbatches: int, num_chunks: int, group_size: int, is_end: bool) -> list[int]:
    """The micro-batches of the tensors that a rank receives from one of its neighbours, in their order.

    A neighbour sends in the order in which it computes, for each of its `num_chunks` model chunks; `group_size`
    consecutive micro-batches run through a chunk before the next chunk's turn. This is the order of hidden states from
    the previous rank, and equally of gradients from the next one. The first rank (the last one for gradients) is an
    end: the neighbour's final chunk has nothing to send to it.
    """
    table = get_schedule_table(num_microbatches, num_chunks, group_size)
    return [microbatch for microbatch, chunk in table if not (is_end and chunk == num_chunks - 1)]


@contextmanager
def known_shapes(config: ModelParallelConfig, positions: Sequence[int], forward_only: bool) -> Iterator[None]:
    """While one step runs: no shapes are exchanged.

    Args:
        positions: length of each pack of the step, in the order of its micro-batches.
    """
    if config.pipeline_model_parallel_size == 1:
        yield
        return
    shards = config.context_parallel_size * (config.tensor_model_parallel_size if config.sequence_parallel else 1)
    shapes = [[length // shards, 1, config.hidden_size] for length in positions]
    num_chunks = config.virtual_pipeline_model_parallel_size or 1
    group_size = config.microbatch_group_size_per_vp_stage or config.pipeline_model_parallel_size
    rank, size = mpu.get_pipeline_model_parallel_rank(), mpu.get_pipeline_model_parallel_world_size()
    hidden, gradients = (
        deque(arrivals(len(positions), num_chunks, group_size, is_end)) for is_end in (rank == 0, rank == size - 1)
    )

    def next_shapes(
        self: Any, send_next: Any, send_prev: Any, recv_prev: bool, recv_next: bool
    ) -> tuple[list[int] | None, list[int] | None]:
        from_prev = shapes[hidden.popleft()] if recv_prev else None
        return from_prev, shapes[gradients.popleft()] if recv_next else None

    exchange = P2PCommunicator._communicate_shapes
    P2PCommunicator._communicate_shapes = next_shapes
    try:
        yield
    finally:
        P2PCommunicator._communicate_shapes = exchange
    assert not hidden and (forward_only or not gradients), "the schedule received fewer tensors than expected"

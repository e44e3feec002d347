"""In which order tensors arrive at a pipeline rank. That Megatron's schedules agree: tests/train/test_parity.py."""

from __future__ import annotations

import torch

from spot_megatron.parallel.pipeline import arrivals, known_shapes
from tests.support import SHAPE, make_recipe, one_process


def test_one_chunk_a_rank_receives_every_microbatch_in_order():
    assert arrivals(3, 1, 2, is_end=False) == [0, 1, 2]
    assert arrivals(3, 1, 2, is_end=True) == []


def test_interleaved_chunks_take_turns_by_groups():
    """Two chunks, two micro-batches a turn: 0 1 through the first, 0 1 through the second, then 2 3."""
    assert arrivals(4, 2, 2, is_end=False) == [0, 1, 0, 1, 2, 3, 2, 3]
    assert arrivals(4, 2, 2, is_end=True) == [0, 1, 2, 3]


def test_one_stage_exchanges_nothing(tmp_path):
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    from spot_megatron.model.config import transformer_config

    exchange = P2PCommunicator._communicate_shapes
    recipe = make_recipe(tmp_path)
    with one_process(recipe), known_shapes(transformer_config(SHAPE, recipe, "cpu"), [4], forward_only=False):
        assert P2PCommunicator._communicate_shapes is exchange
    assert torch.distributed.is_initialized() is False

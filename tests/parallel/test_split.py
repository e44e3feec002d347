"""How models are divided: limits that Megatron-Core's configuration accepts, and its own pipeline schedule."""

from __future__ import annotations

import itertools

import pytest
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches

from spot_megatron.errors import RecipeError
from spot_megatron.hf.config import HFModelConfig
from spot_megatron.model.config import transformer_config
from spot_megatron.parallel.split import Split, check_parallel, check_split
from spot_megatron.recipe import Parallel
from tests.support import SHAPE, make_recipe

EXPERTS = dict(family="qwen3_moe", num_experts=8, experts_per_token=2, expert_ffn_size=24, moe_layers=(0, 1, 2, 3))
MOE = HFModelConfig(**{**vars(SHAPE), **EXPERTS})


def refuses(check, *arguments) -> bool:
    try:
        check(*arguments)
    except RecipeError:
        return True
    return False


@pytest.mark.parametrize("hf", [SHAPE, MOE], ids=["dense", "experts"])
def test_accepts_exactly_the_sizes_that_divide_the_model(tmp_path, hf):
    """Over every small combination; Megatron-Core's own checks pass for each that is accepted."""
    sizes = itertools.product((1, 2, 3, 4), (1, 2, 3, 5), (None, 2), (1, 2), (1, 2, 3), (1, 2), (False, True))
    refused = 0
    for tensor, pipeline, chunks, context, expert, expert_tensor, sequence in sizes:
        if (sequence and tensor == 1) or (chunks and pipeline == 1):
            continue  # load_recipe refuses these
        parallel = Parallel(
            tensor=tensor, sequence=sequence, pipeline=pipeline, virtual_pipeline=chunks, context=context,
            expert=expert, expert_tensor=expert_tensor,
        )  # fmt: skip
        divides = hf.num_groups % (tensor * context) == 0 == hf.num_heads % (tensor * context)
        divides &= bool(hf.moe_layers) or hf.intermediate_size % tensor == 0
        divides &= hf.num_layers >= pipeline * (chunks or 1)
        divides &= hf.num_layers > (pipeline - 1) * -(-hf.num_layers // pipeline)  # the last stage has a layer
        divides &= not chunks or hf.num_layers % (pipeline * chunks) == 0
        if hf.moe_layers:
            divides &= hf.num_experts % expert == 0 and hf.expert_ffn_size % expert_tensor == 0
            divides &= tensor == 1 or sequence
        else:
            divides &= expert == expert_tensor == 1
        assert refuses(check_parallel, hf, parallel) == refuses(check_split, hf, Split(parallel, 7200)) == (not divides)
        if divides:
            transformer_config(hf, make_recipe(tmp_path, parallel=parallel.model_dump()), "cpu")
        refused += not divides
    assert refused > 10


@pytest.mark.parametrize(
    ("parallel", "num_gpus", "words"),
    [
        ({"tensor": 2, "pipeline": 2}, 6, "multiple of 4"),
        ({"expert": 4}, 6, "multiple of 4"),
        ({"tensor": 3}, 6, "one of"),
        ({"pipeline": 5}, 5, "cannot fill"),
    ],
)
def test_refusals_name_the_remedy(parallel, num_gpus, words):
    with pytest.raises(RecipeError, match=words):
        check_split(MOE, Split(Parallel(**parallel), num_gpus))


@pytest.mark.parametrize(
    ("stages", "chunks", "num_microbatches"), [(2, 1, 4), (4, 1, 2), (4, 2, 8), (2, 4, 4), (4, 8, 4)]
)
def test_micro_batches_in_flight(monkeypatch, stages, chunks, num_microbatches):
    """Warm-up of Megatron-Core's schedules, plus the one that runs, on every stage."""
    from megatron.core import parallel_state

    layers = stages * chunks * 3
    split = Split(Parallel(pipeline=stages, virtual_pipeline=chunks if chunks > 1 else None), stages)
    for stage in range(stages):
        monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_world_size", lambda: stages)
        monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_rank", lambda stage=stage: stage)
        monkeypatch.setattr(
            parallel_state, "get_virtual_pipeline_model_parallel_world_size", lambda: chunks if chunks > 1 else None
        )
        total, _, warm_up, _ = get_pp_rank_microbatches(num_microbatches, chunks, stages, forward_only=False)
        in_flight = min(total, warm_up + 1) * layers / (stages * chunks)
        assert split.layers_in_flight(layers, stage, num_microbatches) == in_flight


def test_shards():
    split = Split(Parallel(tensor=2, context=2, pipeline=4, expert=8, sequence=True), 64)
    assert (split.data, split.dense_shards, split.expert_shards, split.num_nodes) == (4, 8, 2, 8)
    assert split.layers_of_stage(94) == [24, 24, 24, 22]

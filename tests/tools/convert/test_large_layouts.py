"""Qwen3-32B and Qwen3-235B-A22B at their recipes' parallel splits, on meta tensors: every rank's model, no weights."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch.testing._internal.distributed.fake_pg import FakeStore

from spot_megatron.hf.config import HFModelConfig
from spot_megatron.hf.names import LM_HEAD, ParameterMapping, Sharding, hf_shapes, resolve, weight_map
from spot_megatron.model.config import transformer_config
from spot_megatron.model.gpt import build_model
from spot_megatron.parallel.cpu import redirect_cuda
from spot_megatron.parallel.split import padded_vocab_size
from spot_megatron.recipe import Recipe
from spot_megatron.weights.placement import Placement, layer_offset
from spot_megatron.weights.shards import merge, tp_index
from tests.support import make_recipe

COMMON = dict(
    head_dim=128,
    vocab_size=151_936,
    max_positions=40_960,
    norm_eps=1e-6,
    rope_theta=1e6,
    tied=False,
    initializer_range=0.02,
    dtype="bfloat16",
)
# https://huggingface.co/Qwen/Qwen3-32B and Qwen3-235B-A22B, config.json
QWEN3_32B = HFModelConfig(
    family="qwen3",
    num_layers=64,
    hidden_size=5120,
    intermediate_size=25_600,
    num_heads=64,
    num_groups=8,
    **COMMON,
)
QWEN3_235B = HFModelConfig(
    family="qwen3_moe",
    num_layers=94,
    hidden_size=4096,
    intermediate_size=12_288,
    num_heads=64,
    num_groups=4,
    num_experts=128,
    experts_per_token=8,
    expert_ffn_size=1536,
    moe_layers=tuple(range(94)),
    **COMMON,
)
NUM_PARAMETERS = {"32b": 32_762_123_264, "235b": 235_093_634_560}
CASES = {
    "32b": (QWEN3_32B, 16, {"tensor": 4, "pipeline": 2}),
    "32b_tp8": (QWEN3_32B, 8, {"tensor": 8, "sequence": True}),
    "235b": (QWEN3_235B, 64, {"tensor": 4, "sequence": True, "pipeline": 16, "expert": 4}),
    "235b_etp": (QWEN3_235B, 64, {"tensor": 2, "sequence": True, "pipeline": 8, "expert": 4, "expert_tensor": 2}),
}


@contextmanager
def one_of(world: int, rank: int, recipe: Recipe) -> Iterator[None]:
    """Megatron's groups as rank `rank` of `world` would see them; nothing is sent anywhere."""
    parallel = recipe.parallel
    redirect_cuda()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        mpu.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            expert_model_parallel_size=parallel.expert,
            create_gloo_process_groups=False,
            expert_tensor_parallel_size=parallel.expert_tensor,
        )
        model_parallel_cuda_manual_seed(0)
        yield
    finally:
        mpu.destroy_model_parallel()
        dist.destroy_process_group()


def piece(mapping: ParameterMapping, part: int, rank: int, size: int) -> tuple[tuple[int, int], ...]:
    """The interval of each dimension of a Hugging Face tensor that a tensor-parallel rank holds."""
    shape = mapping.shapes[part]
    whole = (padded_vocab_size(shape[0], size), *shape[1:]) if mapping.sharding is Sharding.VOCAB else shape
    index = tp_index(whole, mapping.sharding, rank, size)
    cut = [part.indices(length)[:2] for part, length in itertools.zip_longest(index, shape, fillvalue=slice(None))]
    return tuple(cut)


@pytest.mark.parametrize("case", ["32b", "32b_tp8", "235b", pytest.param("235b_etp", marks=pytest.mark.slow)])
def test_every_tensor_is_somewhere_once(tmp_path, case):
    """Over all ranks, the pieces of each tensor cover it without overlap, and every parameter has its merged shape."""
    config, world, split = CASES[case]
    recipe = make_recipe(tmp_path, parallel=split, precision={"dtype": "bf16"})
    rows, tp = weight_map(config), recipe.parallel.tensor
    pieces: dict[str, dict[tuple, int]] = {}
    for rank in range(world):
        with one_of(world, rank, recipe):
            with torch.device("meta"):
                (chunk,) = build_model(transformer_config(config, recipe, "cpu"), config)
            placement = Placement.of_megatron()
            for name, parameter in chunk.named_parameters():
                mapping, names = resolve(rows, name, layer_offset(chunk), placement.expert_offset(config.num_experts))
                group = placement.replica_group(mapping).ranks
                cuts = [piece(mapping, part, group.rank(), group.size()) for part in range(len(names))]
                if mapping.sharding is Sharding.VOCAB:
                    expected = (padded_vocab_size(config.vocab_size, tp) // tp, config.hidden_size)
                else:
                    shapes = [[stop - start for start, stop in cut] for cut in cuts]
                    parts = [torch.empty(shape, device="meta") for shape in shapes]
                    expected = tuple(merge(parts, mapping.sharding, config.head_dim).shape)
                assert tuple(parameter.shape) == expected, name
                for hf_name, cut in zip(names, cuts, strict=True):
                    found = pieces.setdefault(hf_name, {})
                    found[cut] = found.get(cut, 0) + 1
    shapes = hf_shapes(config)
    assert pieces.keys() == shapes.keys()
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == NUM_PARAMETERS[case.split("_")[0]]
    for name, cuts in pieces.items():
        volume = sum(torch.Size([stop - start for start, stop in cut]).numel() for cut in cuts)
        assert volume == torch.Size(shapes[name]).numel(), name
        assert len({tuple(start for start, _ in cut) for cut in cuts}) == len(cuts), name
        copies = set(cuts.values())  # every piece has as many holders as every other
        assert len(copies) == 1, name
    assert LM_HEAD in pieces

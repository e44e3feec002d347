"""A recipe's global batches: how pairs are dealt to data-parallel ranks and packed into micro-batches."""

from __future__ import annotations

from spot_megatron.data.costs import cost_model
from spot_megatron.data.dataset import PreferencePairDataset
from spot_megatron.data.sampler import BatchSampler
from spot_megatron.hf.config import HFModelConfig
from spot_megatron.parallel.groups import Topology
from spot_megatron.recipe import Recipe
from spot_megatron.train import packing

PASS_PAIRS = 256  # pairs of a data-parallel rank that are dealt together, in quadratic time


def training_batches(
    recipe: Recipe, dataset: PreferencePairDataset, hf: HFModelConfig, topology: Topology
) -> BatchSampler:
    """The batches of every optimizer step."""
    layout = recipe.data.layout
    costs = dataset.costs(layout, cost_model(hf), packing.recomputed_above(recipe.memory))
    return packing.training_sampler(recipe, dataset.pairs, dataset.num_positions(layout), costs, topology.data_size)


def one_pass(recipe: Recipe, dataset: PreferencePairDataset, hf: HFModelConfig, topology: Topology) -> BatchSampler:
    """Every pair once, for a forward pass over the data; planning it takes time in proportion to the pairs."""
    data = recipe.data
    return BatchSampler(
        dataset.num_positions(data.layout),
        dataset.costs(data.layout, cost_model(hf), None),
        batch_pairs=PASS_PAIRS * topology.data_size,
        epochs=1,
        order="shuffled",
        seed=recipe.seed,
        max_steps=None,
        dp_size=topology.data_size,
        tokens_per_microbatch=data.tokens_per_microbatch,
        pairs_per_microbatch=data.pairs_per_microbatch,
        microbatch_multiple=packing.microbatch_multiple(recipe),
        ids=[pair.id for pair in dataset.pairs],
    )

"""A recipe's global batches: how pairs are dealt to data-parallel ranks and packed into micro-batches."""

from __future__ import annotations

from typing import Literal

from spot_megatron.data.costs import cost_model
from spot_megatron.data.dataset import PreferencePairDataset
from spot_megatron.data.mixture import FileShare, mix_files
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
    train = recipe.train
    return _batches(
        recipe,
        dataset,
        hf,
        topology,
        batch_pairs=train.batch_pairs,
        epochs=train.epochs,
        order=recipe.data.order,
        max_steps=train.max_steps,
        shared_tokens=packing.shared_tokens(recipe),
        recomputed_above=packing.recomputed_above(recipe.memory),
        shares=mix_files(dataset.pairs, recipe.pair_weights),
    )


def one_pass(recipe: Recipe, dataset: PreferencePairDataset, hf: HFModelConfig, topology: Topology) -> BatchSampler:
    """Every pair once, for a forward pass over the data; planning it takes time in proportion to the pairs."""
    return _batches(
        recipe,
        dataset,
        hf,
        topology,
        batch_pairs=PASS_PAIRS * topology.data_size,
        epochs=1,
        order="shuffled",
        max_steps=None,
        shared_tokens=None,
        recomputed_above=None,
        shares=None,
    )


def _batches(
    recipe: Recipe,
    dataset: PreferencePairDataset,
    hf: HFModelConfig,
    topology: Topology,
    *,
    batch_pairs: int,
    epochs: int,
    order: Literal["shuffled", "file"],
    max_steps: int | None,
    shared_tokens: int | None,
    recomputed_above: int | None,
    shares: list[FileShare] | None,
) -> BatchSampler:
    data = recipe.data
    return BatchSampler(
        dataset.num_positions(data.layout),
        dataset.costs(data.layout, cost_model(hf), recomputed_above),
        batch_pairs=batch_pairs,
        epochs=epochs,
        order=order,
        seed=recipe.seed,
        max_steps=max_steps,
        dp_size=topology.data_size,
        tokens_per_microbatch=data.tokens_per_microbatch,
        pairs_per_microbatch=data.pairs_per_microbatch,
        shared_tokens=shared_tokens,
        microbatch_multiple=topology.pipeline_size if recipe.parallel.virtual_pipeline else 1,
        ids=[pair.id for pair in dataset.pairs],
        shares=shares,
    )

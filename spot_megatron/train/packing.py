"""Packs and batches of a recipe, for training and for its plan."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spot_megatron.data.mixture import mix_files
from spot_megatron.data.records import TokenPair
from spot_megatron.data.sampler import BatchSampler
from spot_megatron.recipe import Memory, Recipe


def pack_multiple(recipe: Recipe) -> int:
    """Packs are padded to a multiple of this: ranks split them evenly, and FP8 kernels want whole tiles."""
    tile = {"none": 1, "tensorwise": 16, "blockwise": 128}[recipe.precision.fp8]
    return tile * recipe.parallel.context * (recipe.parallel.tensor if recipe.parallel.sequence else 1)


def recomputed_above(memory: Memory) -> int | None:
    """Rows above which a pack's layers are recomputed; None for never."""
    return 0 if memory.recompute == "full" else memory.recompute_above_tokens


def shared_tokens(recipe: Recipe) -> int | None:
    """The most tokens of a pack of several pairs, if not those of any pack: padded, it is not recomputed."""
    above, multiple = recipe.memory.recompute_above_tokens, pack_multiple(recipe)
    return None if above is None else max(1, above // multiple * multiple)


def training_sampler(
    recipe: Recipe, pairs: Sequence[TokenPair], positions: np.ndarray, costs: np.ndarray, dp_size: int
) -> BatchSampler:
    """The batches of every optimizer step over `dp_size` data-parallel ranks.

    Args:
        pairs: N of them, whose files the recipe may weight differently.
        positions: [N], the positions that each pair takes in a pack.
        costs: [N], relative compute time of each pair, by which pairs are dealt to ranks.
    """
    data, train = recipe.data, recipe.train
    return BatchSampler(
        positions,
        costs,
        batch_pairs=train.batch_pairs,
        epochs=train.epochs,
        order=data.order,
        seed=recipe.seed,
        max_steps=train.max_steps,
        dp_size=dp_size,
        tokens_per_microbatch=data.tokens_per_microbatch,
        pairs_per_microbatch=data.pairs_per_microbatch,
        shared_tokens=shared_tokens(recipe),
        microbatch_multiple=microbatch_multiple(recipe),
        ids=[pair.id for pair in pairs],
        shares=mix_files(pairs, recipe.pair_weights),
    )


def microbatch_multiple(recipe: Recipe) -> int:
    """Micro-batches of a rank and step are a multiple of this, which the interleaved schedule needs."""
    return recipe.parallel.pipeline if recipe.parallel.virtual_pipeline else 1

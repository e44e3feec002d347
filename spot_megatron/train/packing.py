"""What a recipe says about packs: training and its plan read it here."""

from __future__ import annotations

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

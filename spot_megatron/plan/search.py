"""Search of the cheapest changes that make a recipe fit, and of the fastest configurations on given GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

from spot_megatron.errors import PairError, RecipeError
from spot_megatron.hf.config import HFModelConfig
from spot_megatron.plan.estimate import Estimate, Planner, with_changes
from spot_megatron.recipe import Recipe

MOST_GPUS = 4096
KEPT = (2048, 3072, 4096, 6144, 8192)
PACKS = (4096, 6144, 8192, 12_288, 16_384, 24_576)


@dataclass(frozen=True)
class Option:
    """Changes to a recipe (dotted keys), and the estimate with them. `num_gpus` differs if more GPUs are needed."""

    changes: dict[str, Any]
    num_gpus: int
    estimate: Estimate

    @property
    def flags(self) -> str:
        """As given after --set."""
        words = {True: "true", False: "false", None: "null"}
        return " ".join(
            f"{key}={value if type(value) in (int, str) else words[value]}" for key, value in self.changes.items()
        )


def cheapest_fits(planner: Planner, recipe: Recipe, num_gpus: int, most: int = 3) -> list[Option]:
    """Changes with which the recipe fits, fastest first: one or two changes, else three, else more GPUs."""
    single = list(_changes(planner, recipe))
    quick = Planner(planner.workload, planner.model, planner.gpu, most_steps=3)
    while num_gpus <= MOST_GPUS:
        for counts in ((1, 2), (3,)):
            merged = [_merge(group) for count in counts for group in combinations(single, count)]
            options = _fitting(quick, recipe, num_gpus, [changes for changes in merged if changes])
            if options:
                return _fastest(planner, recipe, options, most)
        num_gpus *= 2
    return []


def _merge(group: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """One set of changes, empty if two of the group change the same key."""
    merged: dict[str, Any] = {}
    for changes in group:
        if merged.keys() & changes.keys():
            return {}
        merged |= changes
    return merged


def _changes(planner: Planner, recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Single changes that need less memory."""
    p, data = recipe.parallel, recipe.data
    if recipe.precision.grad_dtype == "fp32" and recipe.precision.dtype == "bf16":
        yield {"precision.grad_dtype": "bf16"}
    if recipe.memory.recompute != "full":
        yield {"memory.recompute": "full", "memory.recompute_above_tokens": None}
    if recipe.memory.recompute == "none":
        for positions in KEPT:
            if positions < (recipe.memory.recompute_above_tokens or data.tokens_per_microbatch):
                yield {"memory.recompute_above_tokens": positions}
    longest = int(planner.workload.counts[data.layout][:, 0].max())
    for tokens in PACKS:
        if longest <= tokens < data.tokens_per_microbatch:
            yield {"data.tokens_per_microbatch": tokens}
    for factor in (2, 4, 8):
        yield {"parallel.pipeline": p.pipeline * factor}
        yield {"parallel.tensor": p.tensor * factor, "parallel.sequence": True}
        yield {"parallel.context": p.context * factor}
        if planner.model.num_experts:
            yield {"parallel.expert": p.expert * factor}


def _fitting(planner: Planner, recipe: Recipe, num_gpus: int, candidates: list[dict[str, Any]]) -> list[Option]:
    options = []
    for changes in candidates:
        changed = with_changes(recipe, changes)
        if _memory_fits(planner, changed, num_gpus):
            estimate = _try(planner, changed, num_gpus)
            if estimate is not None and estimate.fits:
                options.append(Option(changes, num_gpus, estimate))
    return options


def _memory_fits(planner: Planner, recipe: Recipe, num_gpus: int) -> bool:
    """A quick look with the fewest micro-batches that fill the pipeline; False if the parallel sizes are invalid."""
    if (recipe.memory.recompute_above_tokens or 0) >= recipe.data.tokens_per_microbatch:
        return False
    try:
        memory = planner.memory(recipe, num_gpus, recipe.parallel.pipeline)
    except RecipeError:
        return False
    return memory.total <= planner.gpu.usable_bytes


def _try(planner: Planner, recipe: Recipe, num_gpus: int) -> Estimate | None:
    """None if the configuration cannot run."""
    try:
        return planner.estimate(recipe, num_gpus)
    except (RecipeError, PairError):
        return None


def best_configurations(planner: Planner, recipe: Recipe, num_gpus: int, most: int = 5) -> list[Option]:
    """The configurations that fit and take least time. Precision, data and objective are the recipe's."""
    quick = Planner(planner.workload, planner.model, planner.gpu, most_steps=3)
    options = _fitting(quick, recipe, num_gpus, list(_configurations(planner, recipe, num_gpus)))
    return _fastest(planner, recipe, options, most)


def _fastest(planner: Planner, recipe: Recipe, options: list[Option], most: int) -> list[Option]:
    """The fastest of quickly estimated options, estimated over more steps, with only what they change in the recipe."""
    exact = []
    for option in sorted(options, key=lambda option: option.estimate.seconds)[: 2 * most]:
        differs = {key: value for key, value in option.changes.items() if value != _value(recipe, key)}
        estimate = planner.estimate(option.estimate.recipe, option.num_gpus)
        exact.append(Option(differs, option.num_gpus, estimate))
    return sorted(exact, key=lambda option: option.estimate.seconds)[:most]


def _value(recipe: Recipe, key: str) -> Any:
    section, _, leaf = key.partition(".")
    return getattr(getattr(recipe, section), leaf)


def _configurations(planner: Planner, recipe: Recipe, num_gpus: int) -> Iterator[dict[str, Any]]:
    model, data = planner.model, recipe.data
    longest = int(planner.workload.counts[data.layout][:, 0].max())
    packs = sorted({data.tokens_per_microbatch, *(tokens for tokens in PACKS if tokens >= longest)})[:4]
    splits = product((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8, 16), _expert_sizes(model, num_gpus))
    for tensor, context, pipeline, expert in splits:
        if num_gpus % (tensor * context * pipeline) or tensor * context > min(8, model.num_groups):
            continue
        for chunks in _chunks(model, pipeline):
            ways = [("none", None), ("full", None), *(("none", positions) for positions in KEPT)]
            for (recompute, kept), tokens in product(ways, packs):
                yield {
                    "parallel.tensor": tensor,
                    "parallel.sequence": tensor > 1,
                    "parallel.context": context,
                    "parallel.pipeline": pipeline,
                    "parallel.virtual_pipeline": chunks,
                    "parallel.expert": expert,
                    "memory.recompute": recompute,
                    "memory.recompute_above_tokens": kept,
                    "data.tokens_per_microbatch": tokens,
                }


def _expert_sizes(model: HFModelConfig, num_gpus: int) -> list[int]:
    if not model.num_experts:
        return [1]
    return [n for n in (1, 2, 4, 8, 16, 32, 64) if model.num_experts % n == 0 and num_gpus % n == 0]


def _chunks(model: HFModelConfig, pipeline: int) -> list[int | None]:
    """Without interleaving, and with chunks of few layers."""
    fitting = [v for v in (2, 3, 4) if pipeline > 1 and model.num_layers % (pipeline * v) == 0]
    return [None, *fitting[-1:]]

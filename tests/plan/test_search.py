"""Advice must be true: every change that is proposed fits, and nothing cheaper was left out."""

from __future__ import annotations

import pytest

from spot_megatron.errors import RecipeError
from spot_megatron.plan.estimate import Planner, make_planner, with_changes
from spot_megatron.plan.hardware import find_gpu
from spot_megatron.plan.search import best_configurations, cheapest_fits
from spot_megatron.recipe import Recipe, load_recipe


@pytest.fixture
def recipe_for(tmp_path):
    """A recipe of one model: data parallel, fp32 gradients, packs of 16384 rows, full recompute, changed as given."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "{name: plan, output: out, data: {pairs: none.jsonl, tokens_per_microbatch: 16384}, memory: {recompute: full}}"
    )
    return lambda model, *changes: load_recipe(path, [f"model.hf={model}", *changes])


def planner_for(recipe: Recipe, gpu: str = "h800") -> Planner:
    return make_planner(recipe, find_gpu(gpu), assume=["pairs=600", "response=1500"])


def test_changes_that_fit_are_sorted_by_time(recipe_for):
    recipe = recipe_for("Qwen/Qwen3-8B", "memory.recompute=none")
    planner = planner_for(recipe)
    assert not planner.estimate(recipe, 8).fits
    options = cheapest_fits(planner, recipe, 8)
    assert options
    assert all(option.estimate.fits and option.num_gpus == 8 for option in options)
    seconds = [option.estimate.seconds for option in options]
    assert seconds == sorted(seconds)
    for changes in ({"memory.recompute": "full"}, {"parallel.tensor": 2, "parallel.sequence": True}):
        alone = planner.estimate(with_changes(recipe, changes), 8)
        assert not alone.fits or alone.seconds >= 0.99 * seconds[0]


def test_flags_are_what_the_command_line_takes(recipe_for):
    recipe = recipe_for("Qwen/Qwen3-8B", "memory.recompute=none")
    option = cheapest_fits(planner_for(recipe), recipe, 8)[0]
    again = recipe_for("Qwen/Qwen3-8B", "memory.recompute=none", *option.flags.split())
    assert again == option.estimate.recipe


def test_more_gpus_where_nothing_else_helps(recipe_for):
    recipe = recipe_for("Qwen/Qwen3-235B-A22B")
    options = cheapest_fits(planner_for(recipe), recipe, 8)
    assert options
    assert all(option.num_gpus > 8 and option.estimate.fits for option in options)


def test_best_layouts_fit_and_beat_the_recipe(recipe_for):
    recipe = recipe_for("Qwen/Qwen3-30B-A3B", "memory.recompute=full", "parallel.expert=8", "precision.grad_dtype=bf16")
    planner = planner_for(recipe, "h200")
    found = best_configurations(planner, recipe, 8)
    own = planner.estimate(recipe, 8)
    assert own.fits
    assert len(found) == 5
    assert all(option.estimate.fits for option in found)
    assert found[0].estimate.seconds <= own.seconds
    assert all(option.estimate.recipe.precision == recipe.precision for option in found)


def test_best_layouts_name_only_changes(recipe_for):
    recipe = recipe_for("Qwen/Qwen3-0.6B", "memory.recompute=none")
    found = best_configurations(planner_for(recipe), recipe, 8)
    for option in found:
        assert with_changes(recipe, option.changes) == option.estimate.recipe
        for key, value in option.changes.items():
            section, _, leaf = key.partition(".")
            assert getattr(getattr(recipe, section), leaf) != value


def test_unknown_gpu_and_missing_fp8(recipe_for):
    with pytest.raises(RecipeError, match="did you mean h800"):
        find_gpu("h880")
    recipe = recipe_for("Qwen/Qwen3-8B", "precision.fp8=tensorwise")
    with pytest.raises(RecipeError, match=r"a100 has no FP8.*precision\.fp8=none"):
        planner_for(recipe, "a100").estimate(recipe, 8)


def test_warnings(recipe_for):
    recipe = recipe_for("Qwen/Qwen3-0.6B", "train.batch_pairs=4")
    words = planner_for(recipe).estimate(recipe, 8).warnings
    assert any("fewer than the 8 data-parallel ranks" in word for word in words)
    sane = recipe_for("Qwen/Qwen3-0.6B", "train.batch_pairs=256")
    assert not planner_for(sane).estimate(sane, 8).warnings

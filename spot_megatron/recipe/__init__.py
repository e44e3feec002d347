"""Recipes: the schema, and the reader of recipe files. `python -m spot_megatron.recipe` prints every key."""

from spot_megatron.recipe.execution import Memory, Parallel, Precision
from spot_megatron.recipe.load import RECIPE_FOLDER, find_recipe, load_recipe, parallel_sizes
from spot_megatron.recipe.schema import (
    Checkpoint,
    Data,
    Evaluation,
    Export,
    Logging,
    Lora,
    Model,
    Objective,
    Optim,
    Recipe,
    Shift,
    Train,
)
from spot_megatron.recipe.section import Section

__all__ = [
    "RECIPE_FOLDER",
    "Checkpoint",
    "Data",
    "Evaluation",
    "Export",
    "Logging",
    "Lora",
    "Memory",
    "Model",
    "Objective",
    "Optim",
    "Parallel",
    "Precision",
    "Recipe",
    "Section",
    "Shift",
    "Train",
    "find_recipe",
    "load_recipe",
    "parallel_sizes",
]

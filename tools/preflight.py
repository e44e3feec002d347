"""Checks that take seconds, made before training processes start: device, model folder, split, pair files, questions.

The processes check the same again; here a mistake is reported at once and by one process.
"""

from __future__ import annotations

from pathlib import Path

from spot_megatron.data.holdout import hold_out
from spot_megatron.data.records import TokenPair, read_pairs, read_probe
from spot_megatron.errors import RecipeError, WeightError
from spot_megatron.hf.config import read_hf_config
from spot_megatron.hf.index import HFIndex, check_folder
from spot_megatron.parallel.split import Split, check_split
from spot_megatron.recipe import Recipe
from tools.eval.questions import read_questions


def check_recipe(recipe: Recipe, num_processes: int, num_gpus: int) -> None:
    """Raises UserError for what would stop the training's processes before their first update.

    Args:
        num_processes: of all nodes together.
        num_gpus: of this node.
    """
    if recipe.device == "cuda" and not num_gpus:
        raise RecipeError("device=cuda, but PyTorch finds no CUDA device here; set device=auto or device=cpu")
    folder = Path(recipe.model.hf).expanduser()
    if folder.is_dir():
        config, index = read_hf_config(folder), HFIndex(folder)
        check_folder(index, config)
        check_split(config, Split(recipe.parallel, num_processes))
    _check_device(recipe, folder, num_gpus)
    records = read_pairs(recipe.pair_files, recipe.data.format)
    if recipe.validation.pair_files:
        records += read_pairs(recipe.validation.pair_files, recipe.data.format)
    elif recipe.validation.fraction:
        hold_out(records, recipe.validation.fraction)
    if recipe.validation.probe is not None:
        records += read_probe(Path(recipe.validation.probe))
    if folder.is_dir() and any(not isinstance(record, TokenPair) for record in records):
        _check_tokenizer(folder, "data.pairs or validation: the data are text")
    if recipe.evaluation.questions is not None:
        read_questions(Path(recipe.evaluation.questions))
        if folder.is_dir():
            _check_tokenizer(folder, "evaluation.questions: the questions are text")


def _check_device(recipe: Recipe, folder: Path, num_gpus: int) -> None:
    """A model that no CPU run can train in reasonable time is refused before it is downloaded."""
    if num_gpus or recipe.device == "cpu":
        return
    if not folder.is_dir() and recipe.precision.dtype == "bf16":
        raise RecipeError(
            f"no GPU was found, and {recipe.name} trains {recipe.model.hf} in bf16: run it on GPUs, try the recipe "
            "qwen3_tiny_spot here, or set device=cpu to download the model and train it on CPUs all the same"
        )


def _check_tokenizer(folder: Path, reason: str) -> None:
    if not any(folder.glob("tokenizer*")):
        raise WeightError(
            f"{reason}, and {folder} has no tokenizer; copy the model's tokenizer.json and tokenizer_config.json there"
        )

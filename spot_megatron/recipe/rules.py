"""Combinations of recipe keys that cannot work together. The model's own limits are checked in parallel/split.py."""

from __future__ import annotations

from pathlib import Path

from spot_megatron.errors import RecipeError
from spot_megatron.recipe.schema import Lora, Recipe


def check_combinations(recipe: Recipe, path: Path) -> None:
    """Raises RecipeError with every violated rule; `path` is the recipe's file, for the message."""
    broken = [message for message, is_broken in _rules(recipe).items() if is_broken]
    if broken:
        raise RecipeError(f"{path}: " + "; ".join(broken))


def _rules(recipe: Recipe) -> dict[str, bool]:
    """Message -> whether the recipe violates the rule."""
    parallel, objective, optim, precision, memory, export = (
        recipe.parallel, recipe.objective, recipe.optim, recipe.precision, recipe.memory, recipe.export
    )  # fmt: skip
    shift, validation = objective.shift, recipe.validation
    measures = validation.holds_out_pairs or validation.probe is not None
    best_of_pairs = validation.keep_best not in (None, "probe")
    return {
        "parallel.sequence=true requires parallel.tensor of 2 or more": parallel.sequence and parallel.tensor == 1,
        "parallel.virtual_pipeline requires parallel.pipeline of 2 or more": (
            parallel.virtual_pipeline is not None and parallel.pipeline == 1
        ),
        f"objective.shift.kind={shift.kind} applies only to objective.name=spot_bco; with {objective.name} set it to "
        "none": shift.kind != "none" and objective.name != "spot_bco",
        "objective.label_smoothing applies only to objective.name=dpo or spot_bce; with any other set it to 0": (
            objective.label_smoothing > 0 and objective.name not in ("dpo", "spot_bce")
        ),
        "objective.shift.decay applies only to objective.shift.kind=ema": (
            shift.kind != "ema" and "decay" in shift.model_fields_set and shift.decay != 0.9
        ),
        "objective.shift.kind=cumulative_inclusive requires parallel.pipeline=1": (
            shift.kind == "cumulative_inclusive" and parallel.pipeline > 1
        ),
        "lora.alpha, lora.targets and lora.adapter require lora.rank; set it (with lora.adapter, to its `r`)": (
            recipe.lora.rank is None and recipe.lora != Lora()
        ),
        "export.adapter=true requires lora.rank; set export.adapter=false to train all weights": (
            export.adapter and recipe.lora.rank is None
        ),
        f"precision.fp8={precision.fp8} does not work with lora.rank; set precision.fp8=none": (
            precision.fp8 != "none" and recipe.lora.rank is not None
        ),
        "optim.min_lr must not exceed optim.lr": optim.min_lr > optim.lr,
        "optim.min_lr requires optim.schedule=linear or cosine": optim.schedule == "constant" and optim.min_lr > 0,
        "optim.betas must be in [0, 1)": not all(0 <= beta < 1 for beta in optim.betas),
        f"precision.fp8={precision.fp8} requires precision.dtype=bf16": (
            precision.fp8 != "none" and precision.dtype != "bf16"
        ),
        "precision.grad_dtype=bf16 requires precision.dtype=bf16": (
            precision.grad_dtype == "bf16" and precision.dtype == "fp32"
        ),
        "memory.recompute_above_tokens requires memory.recompute=none": (
            memory.recompute_above_tokens is not None and memory.recompute != "none"
        ),
        "memory.recompute_above_tokens must be below data.tokens_per_microbatch; remove it to disable recomputation": (
            (memory.recompute_above_tokens or 0) >= recipe.data.tokens_per_microbatch
        ),
        "memory.master_weights=remainders and memory.moments=bf16 require precision.dtype=bf16": (
            precision.dtype == "fp32" and recipe.has_compact_states
        ),
        f"precision.fp8={precision.fp8} requires memory.master_weights=fp32 and memory.moments=fp32 (Megatron-Core)": (
            precision.fp8 != "none" and recipe.has_compact_states
        ),
        "validation.pairs and validation.fraction both hold out pairs; set only one of them": (
            bool(validation.pairs) and validation.fraction > 0
        ),
        "validation.pairs names no file": validation.pairs in ("", []),
        f"validation.keep_best={validation.keep_best} requires validation.pairs or validation.fraction": (
            best_of_pairs and not validation.holds_out_pairs
        ),
        "validation.keep_best=probe requires validation.probe": (
            validation.keep_best == "probe" and validation.probe is None
        ),
        "validation.patience requires validation.keep_best, which says which validation is better": (
            validation.patience is not None and validation.keep_best is None
        ),
        "validation.every_steps requires validation.pairs, validation.fraction or validation.probe": (
            validation.every_steps != type(validation)().every_steps and not measures
        ),
        "evaluation.questions requires export.hf=true": (
            recipe.evaluation.questions is not None and not recipe.export.hf
        ),
    }

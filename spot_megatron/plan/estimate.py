"""Memory and time of one recipe on given GPUs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from spot_megatron.errors import RecipeError
from spot_megatron.hf.config import HFModelConfig
from spot_megatron.parallel.split import Split, check_split
from spot_megatron.plan import time
from spot_megatron.plan.hardware import GPUS_PER_NODE, THIS_PROJECT, Gpu, Software
from spot_megatron.plan.inputs import PlanInput
from spot_megatron.plan.memory import RankMemory, bytes_per_parameter, checkpoint_bytes, host_bytes_of_save, rank_memory
from spot_megatron.plan.models import planned_model
from spot_megatron.plan.time import StepTime
from spot_megatron.plan.trained import num_trained, trained_of_rank
from spot_megatron.plan.workload import (
    Assumptions,
    Load,
    Workload,
    assumed_pairs,
    pairs_of_files,
    plan_steps,
    with_validation,
)
from spot_megatron.recipe import Recipe

HOST_WATTS_PER_GPU = 300.0  # processors, network and fans of a node, shared by its GPUs: DGX H100, 10.2 kW at most
GPU_POWER_SHARE = 0.9  # of the board's limit while training (assumed)


@dataclass(frozen=True)
class Estimate:
    """Memory of the fullest rank and seconds of every part of the run."""

    recipe: Recipe
    inputs: PlanInput
    workload: Workload
    load: Load
    memory: RankMemory
    step: StepTime
    reference: float

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.inputs.gpu.usable_bytes

    @cached_property
    def parts(self) -> dict[str, float]:
        """Seconds of the run by part."""
        every = self.recipe.checkpoint.every_steps
        saves = (self.load.num_steps - 1) // every if every else 0
        saves += not self.recipe.export.has_result  # after the last step
        disk = time.DISK_BYTES_PER_SECOND
        export = 2 * self.inputs.model.num_parameters / disk if self.recipe.export.hf else 0.0
        return {
            "start-up": time.start_seconds(self.inputs),
            "reference pass": self.reference,
            "training": self.load.num_steps * self.step.total,
            "validation": self._num_validations * self.reference * self.workload.validation_share,
            "checkpoints": saves * self._one_checkpoint / (disk * self.inputs.split.num_nodes),
            "export": export,
        }

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def tokens_per_second(self) -> float:
        """Of the training loop over all GPUs, counting a pair as two sequences."""
        return self.load.num_tokens / self.parts["training"]

    @property
    def unique_tokens_per_second(self) -> float:
        return self.load.num_unique_tokens / self.parts["training"]

    @property
    def mfu(self) -> float:
        """Model FLOPs of unique tokens in the training loop, of the GPUs' bf16 peak (fp32's in fp32)."""
        gpu, is_frozen = self.inputs.gpu, self.recipe.lora.rank is not None
        peak = (gpu.fp32 if self.recipe.precision.dtype == "fp32" else gpu.bf16) * 1e12 * self.inputs.split.num_gpus
        return time.model_flops(self.inputs.model, self.load, is_frozen) / self.parts["training"] / peak

    @property
    def gpu_hours(self) -> float:
        return self.seconds * self.inputs.split.num_gpus / 3600

    @property
    def kilowatt_hours(self) -> float:
        return self.gpu_hours * (self.inputs.gpu.watts * GPU_POWER_SHARE + HOST_WATTS_PER_GPU) / 1000

    @property
    def checkpoint_bytes(self) -> float:
        """On disk: the checkpoints that are kept, with the best one, one being written, and the export."""
        keeps_best = self.recipe.validation.keep_best is not None
        kept = (self.recipe.checkpoint.keep + 1 + keeps_best) * self._one_checkpoint
        return kept + 2 * self.inputs.model.num_parameters * self.recipe.export.hf

    @property
    def host_bytes_of_save(self) -> float:
        """Of a node, besides what its processes hold anyway, while a checkpoint is saved."""
        split = self.inputs.split
        ranks_of_node = min(split.num_gpus, split.gpus_per_node)
        weights, _, _ = bytes_per_parameter(self.recipe.precision, self.recipe.memory)
        return ranks_of_node * host_bytes_of_save(self.inputs, weights * sum(trained_of_rank(self.inputs, 0)))

    @property
    def _one_checkpoint(self) -> int:
        return checkpoint_bytes(num_trained(self.inputs.model, self.recipe.lora), self.recipe.precision)

    @property
    def _num_validations(self) -> int:
        """Before the first update, every few steps, and the reference passes of the held-out pairs and the probe."""
        return 2 + math.ceil(self.load.num_steps / self.recipe.validation.every_steps)

    @property
    def warnings(self) -> list[str]:
        return _warnings(self)


class Planner:
    """Estimates of variants of a recipe on one workload. Packs that variants have in common are computed once."""

    def __init__(
        self,
        workload: Workload,
        model: HFModelConfig,
        gpu: Gpu,
        most_steps: int = 12,
        software: Software = THIS_PROJECT,
    ) -> None:
        self.workload = workload
        self.software = software
        self.model = model
        self.gpu = gpu
        self.most_steps = most_steps
        self._loads: dict[tuple[Any, ...], Load] = {}

    def estimate(self, recipe: Recipe, num_gpus: int) -> Estimate:
        """Raises RecipeError or PairError if this configuration cannot run."""
        inputs = self._inputs(recipe, num_gpus)
        load = self._load(recipe, inputs.split)
        return Estimate(
            recipe=recipe,
            inputs=inputs,
            workload=self.workload,
            load=load,
            memory=self.memory(recipe, num_gpus, load.num_microbatches),
            step=time.step_time(inputs, load),
            reference=time.reference_seconds(inputs, load),
        )

    def memory(self, recipe: Recipe, num_gpus: int, num_microbatches: int) -> RankMemory:
        """With the fullest pack that the recipe allows."""
        return rank_memory(self._inputs(recipe, num_gpus), recipe.data.tokens_per_microbatch, num_microbatches)

    def _inputs(self, recipe: Recipe, num_gpus: int) -> PlanInput:
        if recipe.precision.fp8 != "none" and self.gpu.fp8 is None:
            raise RecipeError(
                f"precision.fp8={recipe.precision.fp8}: {self.gpu.name} has no FP8; set precision.fp8=none"
            )
        split = Split(recipe.parallel, num_gpus, GPUS_PER_NODE)
        check_split(self.model, split)
        return PlanInput(self.model, split, recipe.precision, recipe.memory, self.gpu, self.software, recipe.lora)

    def _load(self, recipe: Recipe, split: Split) -> Load:
        data, p = recipe.data, recipe.parallel
        interleaved = p.pipeline if p.virtual_pipeline else 1
        key = (
            split.data,
            data.tokens_per_microbatch,
            recipe.memory,
            interleaved,
            p.context,
            split.sequence_shards,
            recipe.precision.fp8,
        )
        if key not in self._loads:
            self._loads[key] = plan_steps(recipe, split, self.workload, self.model, self.most_steps)
        return self._loads[key]


def make_planner(recipe: Recipe, gpu: Gpu, files: Sequence[Path] = (), assume: Sequence[str] = ()) -> Planner:
    """Pairs from `files`, else from the recipe's files if they exist, else assumed. Missing files are in the warnings.

    Raises:
        UserError: the model's sizes are not known, or the pairs cannot be used.
    """
    model = planned_model(recipe.model.hf)
    if files and assume:
        raise RecipeError("--assume describes pairs that do not exist yet; leave it out with --pairs")
    missing = [] if files or assume else [path for path in recipe.pair_files if not path.exists()]
    if missing and len(missing) < len(recipe.pair_files):
        raise RecipeError(
            f"data.pairs: {', '.join(map(str, missing))} does not exist; correct the path, or give --pairs"
        )
    if not files and not assume and not missing:
        files = recipe.pair_files
    workload = pairs_of_files(recipe, files) if files else assumed_pairs(Assumptions.parse(assume), recipe)
    workload = with_validation(replace(workload, missing=tuple(map(str, missing))), recipe)
    return Planner(workload, model, gpu)


def with_changes(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """The recipe with dotted keys replaced."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        section, _, leaf = key.partition(".")
        sections.setdefault(section, {})[leaf] = value
    updated = {name: getattr(recipe, name).model_copy(update=values) for name, values in sections.items()}
    return recipe.model_copy(update=updated)


def _warnings(estimate: Estimate) -> list[str]:
    recipe, split, step = estimate.recipe, estimate.inputs.split, estimate.step
    found = []
    if estimate.workload.missing:
        found.append(
            f"data.pairs: {', '.join(estimate.workload.missing)} does not exist, so the pairs' lengths are assumed: "
            "give the file, or describe the pairs with --assume"
        )
    over = estimate.workload.dropped.get("over_tokens_per_microbatch", 0)
    if over:
        found.append(
            f"{over} of the assumed pairs take more positions than data.tokens_per_microbatch="
            f"{recipe.data.tokens_per_microbatch}, at which training stops: lower data.max_tokens or raise the budget"
        )
    if recipe.train.batch_pairs < split.data:
        found.append(
            f"train.batch_pairs={recipe.train.batch_pairs} is fewer than the {split.data} data-parallel ranks: "
            "some always wait; use fewer GPUs or split the model more"
        )
    elif step.imbalance > 0.1 * step.total:
        found.append(
            f"ranks wait {step.imbalance / step.total:.0%} of a step for the slowest one: few pairs a rank "
            f"({recipe.train.batch_pairs} over {split.data} ranks); a larger batch or fewer ranks balances better"
        )
    if recipe.parallel.tensor * recipe.parallel.context > split.gpus_per_node:
        found.append("tensor x context ranks span nodes: their collectives run over the network")
    return found

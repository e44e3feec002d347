"""Megatron's DDP and distributed AdamW under a recipe, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from spot_megatron.model.config import DTYPES
from spot_megatron.model.gpt import PairGPT
from spot_megatron.parallel.versions import grads_for_norm
from spot_megatron.recipe import Optim, Recipe


@dataclass
class Policy:
    """The model in training: bare chunks, the same wrapped for data parallelism, and their optimizer."""

    bare: list[PairGPT]
    wrapped: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    weight_decay: float
    clip_grad_norm: float  # 0: gradients are not clipped

    def zero_grad(self) -> None:
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def squared_grad_norm(self) -> Tensor:
        """[] float64, on the device: this rank's part of the squared gradient norm, which is the sum over all ranks.

        Call it once after a step's gradients are complete; `update` uses what it prepares.
        """
        self.optimizer.prepare_grads()
        grads = [grad for part in self.parts for grad in grads_for_norm(part)]
        if not grads:
            return torch.zeros((), dtype=torch.float64, device=self.wrapped[0].buffers[0].grad_data.device)
        return torch.stack(torch._foreach_norm(grads, dtype=torch.float32)).double().square().sum()

    def update(self, lr: float, grad_norm: float) -> None:
        """One AdamW step at `lr`. Gradients are clipped by `grad_norm`, their norm over all ranks."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            # Megatron only notes which parameters decay; its scheduler, which this project does not use, applies it.
            group["weight_decay"] = self.weight_decay * group["wd_mult"]
        if self.clip_grad_norm:
            for part in self.parts:
                compact = part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
                clip_grad_by_total_norm_fp32(part.get_parameters(), self.clip_grad_norm, grad_norm, compact)
        self.optimizer.step_with_ready_grads()
        for chunk in self.wrapped:
            if chunk.ddp_config.overlap_param_gather and chunk.bucket_size is None:
                chunk.start_param_sync()  # in one piece: nothing of it would hide behind this chunk's own forward pass

    @property
    def parts(self) -> list[DistributedOptimizer]:
        """The optimizers that are stepped together: one, or one for experts besides.

        Without one that has no parameters here, as of experts on a pipeline stage of dense layers.
        """
        every = getattr(self.optimizer, "chained_optimizers", [self.optimizer])
        return [part for part in every if not part.is_stub_optimizer and part.get_parameters()]

    def gather_weights(self) -> None:
        """Blocks until updated weights are gathered; otherwise they are gathered lazily by the next forward pass."""
        for chunk in self.wrapped:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)


def make_trainable(chunks: list[PairGPT], recipe: Recipe) -> Policy:
    """Wraps the chunks for data-parallel training and builds their optimizer."""
    config = chunks[0].config
    num_replicas = mpu.get_data_parallel_world_size(with_context_parallel=True)
    overlap = num_replicas > 1
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=recipe.precision.grad_dtype == "fp32",
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
        bucket_size=_bucket_size(chunks[0], num_replicas),
        use_distributed_optimizer=True,
        check_for_nan_in_grad=False,  # train/finite.py checks the loss and the gradient norm of the whole step
    )
    wrapped = [
        DistributedDataParallel(config=config, ddp_config=ddp, module=chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    _fuse_weight_gradients(chunks)
    optimizer = get_megatron_optimizer(_optimizer_config(recipe), wrapped, use_gloo_process_groups=False)
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part.optimizer, torch.optim.AdamW):  # Transformer Engine's and Apex' are fused already
            for group in part.optimizer.param_groups:
                group["fused"] = True  # one pass over memory, without temporaries of 4 bytes a parameter
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    single = len(wrapped) == 1
    config.no_sync_func = wrapped[0].no_sync if single else [chunk.no_sync for chunk in wrapped]
    if overlap:
        config.grad_sync_func = wrapped[0].start_grad_sync if single else [chunk.start_grad_sync for chunk in wrapped]
    return Policy(chunks, wrapped, optimizer, recipe.optim.weight_decay, recipe.optim.clip_grad_norm)


def _fuse_weight_gradients(chunks: list[PairGPT]) -> None:
    """Makes Transformer Engine's layers add weight gradients to DDP's buffers inside the matrix product.

    Megatron's own switch for it asks for apex, which only its own LM head would need; ours (model/logprob.py) adds to
    the buffer itself.
    """
    for module in (module for chunk in chunks for module in chunk.modules()):
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = all(weight.requires_grad for weight in module.parameters(recurse=False))


def _bucket_size(chunk: PairGPT, num_replicas: int) -> int:
    """Parameters that travel together: Megatron's own size for large models, an eighth of a small one."""
    eighth = sum(parameter.numel() for parameter in chunk.parameters() if parameter.requires_grad) // 8
    return max(1, min(eighth, max(40_000_000, 1_000_000 * num_replicas)))


def _optimizer_config(recipe: Recipe) -> OptimizerConfig:
    """AdamW with decoupled weight decay; Megatron exempts one-dimensional parameters and biases."""
    optim = recipe.optim
    dtype = DTYPES[recipe.precision.dtype]
    options: dict[str, Any] = dict(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_eps=optim.eps,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
    )
    if recipe.has_compact_states:
        options |= _compact_states(recipe)
    if recipe.precision.fp8 != "none":
        options["fp8_recipe"] = recipe.precision.fp8
    return OptimizerConfig(**options)


def _compact_states(recipe: Recipe) -> dict[str, Any]:
    """Transformer Engine's AdamW, which takes gradients in the buffers' own type and keeps states in the recipe's."""
    moments = DTYPES[recipe.memory.moments]
    return {
        "use_precision_aware_optimizer": True,
        "store_param_remainders": recipe.memory.master_weights == "remainders",
        "main_grads_dtype": DTYPES[recipe.precision.grad_dtype],
        "exp_avg_dtype": moments,
        "exp_avg_sq_dtype": moments,
    }


def learning_rate(optim: Optim, step: int, num_steps: int) -> float:
    """The rate of update `step` (from 0) of `num_steps`.

    It rises linearly over the warm-up, whose first step is already above 0, and reaches `lr` at its end; then it falls
    towards `min_lr`, which it would reach at update `num_steps`.
    """
    warmup = math.ceil(optim.warmup_fraction * num_steps)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    peak = max(warmup - 1, 0)
    progress = (step - peak) / (num_steps - peak)
    fraction = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
    }[optim.schedule]
    return optim.min_lr + (optim.lr - optim.min_lr) * fraction

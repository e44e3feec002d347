"""Process groups. Besides the dry run's fake ones, the only place that starts torch.distributed's and Megatron's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from spot_megatron.errors import RecipeError
from spot_megatron.parallel.adamw import clip_in_place
from spot_megatron.parallel.cpu import redirect_cuda
from spot_megatron.parallel.device import use_expandable_segments
from spot_megatron.recipe import Parallel


@dataclass(frozen=True)
class Topology:
    """This process's place. Ranks count from 0; `data` spans the replicas of the model,
    `context` the ranks that split the tokens of a pack."""

    rank: int
    world: int
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    context_rank: int
    context_size: int
    data_rank: int
    data_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1


def pick_device(wanted: str) -> str:
    """ "cuda" or "cpu" for a recipe's `device`.

    Raises:
        RecipeError: cuda is asked for and there is none.
    """
    has_cuda = torch.cuda.is_available()
    if wanted == "cuda" and not has_cuda:
        raise RecipeError("device: cuda, but PyTorch sees no CUDA device here; use device: auto or cpu")
    return "cuda" if has_cuda and wanted != "cpu" else "cpu"


@contextmanager
def parallel_groups(parallel: Parallel, device: str, seed: int) -> Iterator[Topology]:
    """Starts the process groups that `parallel` asks for, and destroys them when the body has succeeded.

    After an error other ranks may be in the middle of a collective, in which destroying the groups would block until
    the time-out; the process's end frees them. Reads torchrun's environment; without it, one process is the world.

    Raises:
        RecipeError: the number of processes is not a multiple of the ranks that hold one model, or this process has no
            device.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world % parallel.model_ranks:
        raise RecipeError(
            f"{world} processes cannot hold models of {parallel.model_ranks} ranks each "
            f"(parallel.tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context}); "
            f"start a multiple of {parallel.model_ranks} processes"
        )
    backend = _start_device(device)
    timeout = timedelta(minutes=parallel.timeout_minutes)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=rank, world_size=world, timeout=timeout)
    succeeded = False
    try:
        mpu.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
            context_parallel_size=parallel.context,
            expert_model_parallel_size=parallel.expert,
            expert_tensor_parallel_size=parallel.expert_tensor,
            distributed_timeout_minutes=parallel.timeout_minutes,
        )
        model_parallel_cuda_manual_seed(seed)
        yield Topology(
            rank=rank,
            world=world,
            tensor_rank=mpu.get_tensor_model_parallel_rank(),
            tensor_size=parallel.tensor,
            pipeline_rank=mpu.get_pipeline_model_parallel_rank(),
            pipeline_size=parallel.pipeline,
            context_rank=mpu.get_context_parallel_rank(),
            context_size=parallel.context,
            data_rank=mpu.get_data_parallel_rank(),
            data_size=mpu.get_data_parallel_world_size(),
            device=torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device("cpu"),
        )
        succeeded = True
    finally:
        if succeeded or world == 1:
            mpu.destroy_model_parallel()
            dist.destroy_process_group()


def _start_device(device: str) -> str:
    """Selects this process's device; returns the backend of its collectives."""
    if device == "cuda":
        local_rank, num_devices = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local_rank >= num_devices:
            raise RecipeError(
                f"process {local_rank} of this node has no GPU: PyTorch sees {num_devices}; start at most as many "
                "processes on a node, and check CUDA_VISIBLE_DEVICES"
            )
        use_expandable_segments()
        torch.cuda.set_device(local_rank)
        clip_in_place()
        return "cpu:gloo,cuda:nccl"
    redirect_cuda()
    return "gloo"

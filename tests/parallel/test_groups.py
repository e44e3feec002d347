"""Starting and ending the process groups, as far as one process shows it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from spot_megatron.errors import RecipeError
from spot_megatron.parallel import device, groups
from spot_megatron.recipe import Parallel


def test_a_process_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(RecipeError, match="process 4 of this node has no GPU: PyTorch sees 4"):
        groups._start_device("cuda")


@pytest.mark.parametrize(("world", "left"), [(1, False), (2, True)])
def test_groups_are_destroyed_after_success_or_where_no_other_rank_can_wait(monkeypatch, world, left):
    """With other ranks an error leaves them alone: one of those may be in a collective that this one never enters."""
    initialize = dist.init_process_group

    def start(backend, **options):
        return initialize(backend, rank=0, world_size=1, store=dist.HashStore())  # the other rank never comes

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setattr(dist, "init_process_group", start)
    try:
        with pytest.raises(ZeroDivisionError), groups.parallel_groups(Parallel(), "cpu", 1):
            _ = 1 / 0
        assert dist.is_initialized() is left
    finally:
        if dist.is_initialized():
            groups.mpu.destroy_model_parallel()
            dist.destroy_process_group()
    with groups.parallel_groups(Parallel(), "cpu", 1):
        pass
    assert not dist.is_initialized()


def test_settings_that_cuda_reads_when_it_starts(monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on: None)
    device.use_expandable_segments()
    device.make_deterministic(torch.device("cuda"))
    assert device.os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert device.os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    device.use_expandable_segments()
    assert device.os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "max_split_size_mb:64"

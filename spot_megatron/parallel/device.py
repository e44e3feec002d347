"""Settings of PyTorch's CUDA, and arrays on their way to the device."""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import Tensor


def use_expandable_segments() -> None:
    """Has PyTorch's allocator grow its segments: every pack has a length of its own, and blocks of fixed segments that
    fit none of the later ones would be lost. Without effect once CUDA has started, which is when PyTorch reads its
    allocator's settings; the caller's own setting stays."""
    if "PYTORCH_ALLOC_CONF" not in os.environ and not torch.cuda.is_initialized():
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def make_deterministic(device: torch.device) -> None:
    """The same bits from the same inputs. Call it before the first matrix product."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS' own workspaces change with its streams
    else:
        torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """`array` on `device`; to CUDA through page-locked memory, so that the host does not wait for the device."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)

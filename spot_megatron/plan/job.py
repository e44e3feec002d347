"""What a plan is made for: a model, its split, precision and recompute mode, on a GPU, under some software."""

from __future__ import annotations

from dataclasses import dataclass

from spot_megatron.parallel.split import Split
from spot_megatron.plan.hardware import THIS_PROJECT, Gpu, Link, Software, link
from spot_megatron.plan.model_shapes import ModelShape
from spot_megatron.recipe import Memory, Precision

HBM_SHARE = 0.8  # of the data sheet's bandwidth, by element-wise kernels


@dataclass(frozen=True)
class Job:
    """Everything that memory and time depend on, besides the pairs."""

    shape: ModelShape
    split: Split
    precision: Precision
    memory: Memory
    gpu: Gpu
    software: Software = THIS_PROJECT

    @property
    def element_bytes(self) -> int:
        return 4 if self.precision.dtype == "fp32" else 2

    @property
    def bandwidth(self) -> float:
        return self.gpu.hbm * 1e9 * HBM_SHARE

    def group(self, size: int, stride: int) -> Link:
        return link(self.gpu, size, stride, self.split.gpus_per_node)

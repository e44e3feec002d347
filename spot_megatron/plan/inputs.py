"""The input of a plan: model, parallel sizes, precision and memory options, GPU and software."""

from __future__ import annotations

from dataclasses import dataclass, field

from spot_megatron.hf.config import HFModelConfig
from spot_megatron.parallel.split import Split
from spot_megatron.plan.hardware import THIS_PROJECT, Gpu, Link, Software, link
from spot_megatron.recipe import Lora, Memory, Precision

HBM_SHARE = 0.8  # of the data sheet's bandwidth, by element-wise kernels


@dataclass(frozen=True)
class PlanInput:
    """All that memory and time depend on, except the pairs."""

    model: HFModelConfig
    split: Split
    precision: Precision
    memory: Memory
    gpu: Gpu
    software: Software = THIS_PROJECT
    lora: Lora = field(default_factory=Lora)

    @property
    def element_bytes(self) -> int:
        return 4 if self.precision.dtype == "fp32" else 2

    @property
    def bandwidth(self) -> float:
        return self.gpu.hbm * 1e9 * HBM_SHARE

    def group(self, size: int, stride: int) -> Link:
        return link(self.gpu, size, stride, self.split.gpus_per_node)

"""GPUs and links: rates of the data sheets, and the share of them that training reaches.

Every rate that is *reached* is a calibration with one published run as its source, named beside it;
tests/plan/test_published.py says which rows calibrate and which are held out.
"""

from __future__ import annotations

from dataclasses import dataclass

from spot_megatron.errors import RecipeError
from spot_megatron.files import did_you_mean

GIB = 2**30
TERA = 1e12
GPUS_PER_NODE = 8

# Kept free of the plan: the caching allocator's fragmentation. NVIDIA saw an H100 run out of memory at 58.8 GB
# allocated without expandable segments, and none with them (Megatron-Bridge, memory tuning notes); of 79.6 GiB about 74
# can be used.
USABLE_SHARE = 0.93
WORKSPACE_GIB = 2.5  # CUDA context, cuBLAS and Transformer Engine workspaces, NCCL buffers (common reserve on H100)


@dataclass(frozen=True)
class Gpu:
    """Peak rates in TFLOP/s (dense), bandwidths in GB/s each way, memory in GiB as the driver shows it."""

    name: str
    memory: float
    bf16: float
    fp8: float | None
    fp32: float  # without TF32, PyTorch's default
    hbm: float
    nvlink: float  # reached by collectives inside a node
    network: float  # reached by a GPU's network card between nodes
    watts: float
    gemm_share_bf16: float  # of the peak, by the matrices of a large model
    gemm_share_fp8: float
    attention: float  # TFLOP/s of cuDNN's or FlashAttention-3's causal kernels, forward and backward
    flash2: float  # TFLOP/s of FlashAttention-2, which pair attention calls

    def gemm(self, precision: str) -> float:
        """FLOP/s that matrix products reach in "fp32", "bf16" or "fp8"."""
        if precision == "fp32":
            return self.fp32 * self.gemm_share_bf16 * TERA
        if precision == "bf16":
            return self.bf16 * self.gemm_share_bf16 * TERA
        assert self.fp8 is not None
        return self.fp8 * self.gemm_share_fp8 * TERA

    @property
    def memory_bytes(self) -> int:
        return int(self.memory * GIB)

    @property
    def usable_bytes(self) -> float:
        return self.memory_bytes * USABLE_SHARE


# Shares of the peak, each from one published run (rows "calibrates" of tests/plan/published.py):
HOPPER_BF16 = 0.583  # Qwen3-8B bf16 on 16 H100, 512.7 TFLOP/s (Megatron-Bridge model verification, 2026-07)
HOPPER_FP8 = 0.623  # Llama-3-8B FP8 current scaling on 8 H100, 744 TFLOP/s (Megatron-Bridge 25.11)
BLACKWELL_FP8 = 0.551  # Llama-3-8B FP8 on 8 B200, 1576 TFLOP/s (Megatron-Bridge 25.11)
BLACKWELL_BF16 = HOPPER_BF16  # no published dense bf16 run on B200 was found: assumed as on Hopper
AMPERE_BF16 = 0.663  # GPT 530B on 2240 A100, 54.2% of the peak (arXiv 2205.05198)

# FlashAttention-3 (arXiv 2407.08608): FA2 reaches 35% of an H100; FA3 and cuDNN, forward and backward together, about
# half. FA2 on A100, head size 128, causal: about 185 TFLOP/s (arXiv 2307.08691).
HOPPER_ATTENTION, HOPPER_FLASH2 = 480.0, 280.0

# Data sheets: H100 SXM 989/1979 TFLOP/s, 3.35 TB/s, 700 W; H200 the same cores, 141 GB, 4.8 TB/s; A100 312, 2.04 TB/s,
# 400 W; B200 2250/4500, 8 TB/s, 1000 W. NVLink reached: H100 350 of 450 GB/s (as planned by NVIDIA's own layouts);
# H800 160 of 200 (DeepSeek-V3 issue 479); others in proportion to their NVLink. Network: 400 Gbit/s a GPU (A100: 200),
# 80% reached.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h800", 79.6, 989, 1979, 67, 3350, 160, 45, 700, HOPPER_BF16, HOPPER_FP8, HOPPER_ATTENTION, HOPPER_FLASH2),
        Gpu("h100", 79.6, 989, 1979, 67, 3350, 350, 45, 700, HOPPER_BF16, HOPPER_FP8, HOPPER_ATTENTION, HOPPER_FLASH2),
        Gpu("h200", 140.4, 989, 1979, 67, 4800, 350, 45, 700, HOPPER_BF16, HOPPER_FP8, HOPPER_ATTENTION, HOPPER_FLASH2),
        Gpu("a100", 79.3, 312, None, 19.5, 2039, 233, 22, 400, AMPERE_BF16, 0.0, 150, 150),
        Gpu("b200", 179.0, 2250, 4500, 80, 8000, 700, 45, 1000, BLACKWELL_BF16, BLACKWELL_FP8, 1000, HOPPER_FLASH2),
    )
}


def find_gpu(name: str) -> Gpu:
    """A GPU of the table. Raises RecipeError naming the known ones."""
    gpu = GPUS.get(name.lower())
    if gpu is None:
        hint = did_you_mean(name.lower(), GPUS) or "."
        raise RecipeError(f"GPU {name!r} is not known{hint} Choose one of {', '.join(GPUS)}")
    return gpu


@dataclass(frozen=True)
class Software:
    """Fusions and overlaps of the training code. `*_exposed` are the shares of collectives that are not overlapped."""

    fused_swiglu: bool
    fused_rope: bool
    pair_attention: bool  # FlashAttention-2 in two calls, with the prefix's keys gathered
    tiled_head: bool  # model/logprob.py, which never holds all logits; otherwise a fused cross entropy on them
    tensor_exposed: float
    gather_exposed: float  # of the parameters after an update
    dispatch_once: bool  # a token goes once to each rank (DeepEP, HybridEP), not once to each expert


# model/config.py fuses activation and rotary embedding; variable packs leave no room for overlapped tensor collectives;
# experts use all-to-all. The forward pass hides the gathering of all but the first weights (train/optim.py; assumed).
THIS_PROJECT = Software(
    fused_swiglu=True,
    fused_rope=True,
    pair_attention=True,
    tiled_head=True,
    tensor_exposed=1.0,
    gather_exposed=0.1,
    dispatch_once=False,
)


@dataclass(frozen=True)
class Link:
    """Bandwidths of one group of ranks, bytes/s a rank."""

    nvlink: float
    network: float
    size: int
    in_node: int  # ranks of the group in one node

    def ring(self, num_bytes: float) -> float:
        """Seconds of an all-gather or reduce-scatter whose full tensor has `num_bytes`."""
        rate = self.nvlink if self.in_node >= self.size else min(self.nvlink, self.in_node * self.network)
        return num_bytes * (self.size - 1) / self.size / rate

    def all_to_all(self, num_bytes: float) -> float:
        """Seconds in which every rank sends `num_bytes` in equal parts to all ranks of the group."""
        inside = num_bytes * (self.in_node - 1) / self.size / self.nvlink
        return inside + num_bytes * (self.size - self.in_node) / self.size / self.network


def link(gpu: Gpu, size: int, stride: int, gpus_per_node: int = GPUS_PER_NODE) -> Link:
    """The group of `size` ranks that are `stride` apart."""
    in_node = min(size, max(1, gpus_per_node // stride))
    return Link(gpu.nvlink * 1e9, gpu.network * 1e9, size, in_node)

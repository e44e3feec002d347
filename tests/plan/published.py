"""Published runs that the plan is checked against, as data. Every row names its source, and whether it calibrates.

Seven rows calibrate one constant each (plan/hardware.py, plan/kernels.py); all others are held out. `OTHER_SOFTWARE`
are published figures of software that the plan does not describe: they are printed, not asserted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from spot_megatron.hf.config import HFModelConfig
from spot_megatron.plan.hardware import Software
from spot_megatron.plan.models import PUBLISHED, published

# NVIDIA's own recipes: fused SwiGLU and cross entropy, cuDNN attention, tensor collectives half hidden by computation,
# parameters gathered under the next forward pass, tokens dispatched once to a rank.
MEGATRON_BRIDGE = Software(
    fused_swiglu=True,
    fused_rope=True,
    pair_attention=False,
    tiled_head=False,
    tensor_exposed=0.5,
    gather_exposed=0.1,
    dispatch_once=True,
)
MEGATRON_LM = Software(
    fused_swiglu=True,
    fused_rope=True,
    pair_attention=False,
    tiled_head=False,
    tensor_exposed=1.0,
    gather_exposed=0.1,
    dispatch_once=False,
)

QWEN3_8B, LLAMA3_8B = PUBLISHED["Qwen/Qwen3-8B"], PUBLISHED["meta-llama/Llama-3.1-8B"]
QWEN3_30B, QWEN3_235B = PUBLISHED["Qwen/Qwen3-30B-A3B"], PUBLISHED["Qwen/Qwen3-235B-A22B"]


@dataclass(frozen=True)
class GPTConfig(HFModelConfig):
    """A GPT of Megatron's published runs, whose MLP is not gated."""

    @property
    def gated(self) -> bool:
        return False


LLAMA3_70B = published("llama", 80, 8192, 28_672, 64, 8, 128_256)
LLAMA31_405B = published("llama", 126, 16_384, 53_248, 128, 8, 128_256)
LLAMA2_7B = published("llama", 32, 4096, 11_008, 32, 32, 32_000)
LLAMA2_13B = published("llama", 40, 5120, 13_824, 40, 40, 32_000)
LLAMA2_70B = published("llama", 80, 8192, 28_672, 64, 8, 32_000)
GPT_175B = published("gpt", 96, 12_288, 49_152, 96, 96, 131_072, config=GPTConfig)
GPT_530B = published("gpt", 105, 20_480, 81_920, 128, 128, 51_200, tied=True, head_dim=160, config=GPTConfig)
GPT_7B = published("gpt", 32, 4096, 16_384, 32, 8, 131_072, config=GPTConfig)
GPT_15B = published("gpt", 32, 6144, 24_576, 48, 8, 256_000, config=GPTConfig)


def _mixtral(layers: int, hidden: int, ffn: int, heads: int) -> HFModelConfig:
    return published("mixtral", layers, hidden, ffn, heads, 8, 32_000, expert_ffn=ffn, num_experts=8, top_k=2)


MIXTRAL_8X7B = _mixtral(32, 4096, 14_336, 32)
MIXTRAL_8X22B = _mixtral(56, 6144, 16_384, 48)
NAMES = {
    **{config: name for name, config in PUBLISHED.items()},
    LLAMA3_70B: "Llama-3-70B",
    LLAMA31_405B: "Llama-3.1-405B",
    LLAMA2_7B: "Llama-2-7B",
    LLAMA2_13B: "Llama-2-13B",
    LLAMA2_70B: "Llama-2-70B",
    GPT_175B: "GPT 175B",
    GPT_530B: "GPT 530B",
    GPT_7B: "GPT 7B",
    GPT_15B: "GPT 15B",
    MIXTRAL_8X7B: "Mixtral 8x7B",
    MIXTRAL_8X22B: "Mixtral 8x22B",
}


@dataclass(frozen=True)
class Speed:
    """One published throughput, in tokens a second and GPU."""

    source: str
    model: HFModelConfig
    gpu: str
    num_gpus: int
    sequence: int
    batch: int  # sequences of a step
    micro: int  # of a micro-batch
    tokens_per_second: float
    parallel: dict[str, Any] = field(default_factory=dict)
    fp8: bool = False
    recompute: str = "none"
    software: Software = MEGATRON_BRIDGE
    calibrates: str = ""


def _parallel(**sizes: int) -> dict[str, Any]:
    """Sequence parallelism wherever there is tensor parallelism, as in all of these runs."""
    return {"sequence": sizes.get("tensor", 1) > 1, **sizes}


def mfu_of_530b(mfu: float) -> float:
    """arXiv 2205.05198 counts 72 L h^2 (1 + s / 6h + V / 12 L h) FLOPs a token; an A100's peak is 312 TFLOP/s."""
    layers, hidden, vocab, sequence = 105, 20_480, 51_200, 2048
    flops = 72 * layers * hidden**2 * (1 + sequence / (6 * hidden) + vocab / (12 * layers * hidden))
    return mfu * 312e12 / flops


def mfu_of_175b(mfu: float) -> float:
    """Megatron-LM's README counts matrices and, without causality, attention; an H100's peak is 989 TFLOP/s."""
    return mfu * 989e12 / (6 * GPT_175B.active_weights + 12 * 4096 * GPT_175B.hidden_size * GPT_175B.num_layers)


def tflops_of_70b(tflops: float) -> float:
    """Megatron-Bridge counts matrices and causal attention."""
    return tflops * 1e12 / (6 * LLAMA3_70B.active_weights + 6 * 4096 * LLAMA3_70B.query_width * LLAMA3_70B.num_layers)


ARCHIVE = "Megatron-Bridge performance summary"
TUNING = "Megatron-Bridge memory tuning notes"
TP4_PP8 = _parallel(tensor=4, pipeline=8, virtual_pipeline=5)
LARGEST = _parallel(tensor=8, pipeline=8, context=2, virtual_pipeline=8)
EP16 = _parallel(expert=16)
MOE_235B = _parallel(tensor=2, pipeline=8, virtual_pipeline=4, expert=32)
A100_530B = _parallel(tensor=8, pipeline=35, virtual_pipeline=3)

SPEEDS = [
    Speed(
        "Megatron-Bridge model verification, 2026-07", QWEN3_8B, "h100", 16, 4096, 1024, 1, 10_456,
        calibrates="HOPPER_BF16",
    ),
    Speed(f"{ARCHIVE} 25.11", LLAMA3_8B, "h100", 8, 8192, 128, 1, 14_451, fp8=True, calibrates="HOPPER_FP8"),
    Speed(f"{ARCHIVE} 25.09", LLAMA3_8B, "h100", 8, 8192, 128, 1, 14_079, fp8=True),
    Speed(f"{ARCHIVE} 26.02", LLAMA3_70B, "h100", 64, 8192, 256, 1, 1621, TP4_PP8, fp8=True),
    Speed(f"{ARCHIVE} 25.11", LLAMA3_70B, "h100", 64, 8192, 128, 1, 1602, TP4_PP8, fp8=True),
    Speed(
        f"{ARCHIVE} 26.06, SFT", LLAMA3_70B, "h100", 32, 4096, 32, 1, 1638,
        _parallel(tensor=4, pipeline=4, virtual_pipeline=5), fp8=True,
    ),
    Speed(f"{TUNING}, more PP", LLAMA3_70B, "h100", 32, 4096, 32, 1, tflops_of_70b(668), TP4_PP8, fp8=True),
    Speed(
        f"{TUNING}, more TP", LLAMA3_70B, "h100", 32, 4096, 32, 1, tflops_of_70b(508.7),
        _parallel(tensor=8, pipeline=4, virtual_pipeline=5), fp8=True, calibrates="HOST_SECONDS_TENSOR",
    ),
    Speed(f"{ARCHIVE} 26.02", LLAMA31_405B, "h100", 1024, 8192, 1536, 1, 311, LARGEST, fp8=True),
    Speed(f"{ARCHIVE} 25.11", LLAMA31_405B, "h100", 1024, 8192, 512, 1, 292, LARGEST, fp8=True),
    # The batch of NeMo's fine-tuning rows is not in the source that was read; 32 sequences are assumed.
    Speed("NeMo 24.07, SFT", LLAMA2_7B, "h100", 8, 4096, 32, 1, 17_120, fp8=True),
    Speed(
        "NeMo 24.07, SFT", LLAMA2_13B, "h100", 8, 4096, 32, 1, 9741,
        _parallel(pipeline=4, virtual_pipeline=10), fp8=True,
    ),
    Speed(
        "NeMo 24.07, SFT", LLAMA2_70B, "h100", 16, 4096, 32, 1, 1833,
        _parallel(tensor=4, pipeline=4, virtual_pipeline=20), fp8=True,
    ),
    # Megatron-LM's README gives MFU and GPUs; the split over them is assumed.
    Speed(
        "Megatron-LM README, 47% MFU", GPT_175B, "h100", 96, 4096, 1152, 1, mfu_of_175b(0.47),
        _parallel(tensor=8, pipeline=12),
    ),
    Speed(f"{ARCHIVE} 25.11", LLAMA3_8B, "b200", 8, 8192, 128, 2, 30_624, fp8=True, calibrates="BLACKWELL_FP8"),
    Speed(
        f"{ARCHIVE} 25.11", LLAMA31_405B, "b200", 128, 8192, 64, 1, 661,
        _parallel(tensor=4, pipeline=8, context=2, virtual_pipeline=8), fp8=True,
    ),
    Speed(
        "Megatron-Bridge model verification, 2026-07", QWEN3_30B, "h100", 16, 4096, 1024, 1, 8655, EP16,
        calibrates="EXPERT_HALF_WIDTH",
    ),
    Speed(f"{ARCHIVE} 26.02-26.06, EP16", QWEN3_30B, "h100", 16, 4096, 1024, 1, 8942, EP16, fp8=True),
    Speed(
        f"{ARCHIVE} 26.02-26.06, PP2 EP8", QWEN3_30B, "h100", 16, 4096, 1024, 1, 8942,
        _parallel(pipeline=2, virtual_pipeline=12, expert=8), fp8=True,
    ),
    Speed("AutoModel key features", QWEN3_30B, "h100", 8, 4096, 512, 4, 11_842, _parallel(expert=8)),
    Speed(
        f"{ARCHIVE} 26.02", QWEN3_30B, "b200", 8, 4096, 512, 1, 9691, _parallel(expert=8), fp8=True,
        calibrates="HOST_SECONDS_EXPERTS",
    ),
    Speed(f"{ARCHIVE} 26.04.01", QWEN3_235B, "h100", 256, 4096, 8192, 1, 1712, MOE_235B, fp8=True),
    Speed("NVIDIA dgxc-benchmarking, qwen3", QWEN3_235B, "h100", 256, 4096, 2048, 1, 1283, MOE_235B),
    Speed(
        "arXiv 2205.05198, 54.2% MFU", GPT_530B, "a100", 2240, 2048, 2240, 1, mfu_of_530b(0.542), A100_530B,
        recompute="selective", software=MEGATRON_LM, calibrates="AMPERE_BF16",
    ),
    Speed(
        "arXiv 2205.05198, 42.1% MFU", GPT_530B, "a100", 2240, 2048, 2240, 1, mfu_of_530b(0.421), A100_530B,
        recompute="full", software=MEGATRON_LM,
    ),
]  # fmt: skip

OTHER_SOFTWARE = [
    Speed("NeMo 24.07 (a release of 2024), CP2", LLAMA3_8B, "h100", 8, 8192, 128, 1, 12_036, {"context": 2}, fp8=True),
    Speed("torchtitan FSDP, 500 W H100", LLAMA3_8B, "h100", 8, 8192, 16, 2, 6667),
    Speed("torchtitan FSDP, 500 W H100", LLAMA3_8B, "h100", 8, 8192, 16, 2, 8532, fp8=True),
    Speed("torchtitan FSDP, H200", LLAMA3_8B, "h200", 32, 8192, 64, 1, 10_938, fp8=True),
    Speed(f"{ARCHIVE} 26.02, before HybridEP", QWEN3_30B, "h100", 16, 4096, 1024, 1, 5113,
          _parallel(pipeline=2, virtual_pipeline=12, expert=8), fp8=True),
    Speed("Megatron-Bridge model verification, untuned SFT", QWEN3_8B, "h100", 4, 2048, 32, 1, 2207,
          _parallel(tensor=4)),
    Speed("Megatron-Bridge model verification, untuned SFT", QWEN3_30B, "h100", 16, 2048, 32, 1, 3395, EP16),
]  # fmt: skip


@dataclass(frozen=True)
class Peak:
    """Memory that Megatron-LM's continuous tests record on H100 (golden_values_dev_dgx_h100.json), last pipeline rank.

    `steady` is allocated between steps (states), `peak` at most; bytes. `dropout` adds the two masks a layer that the
    plan leaves out. The number of GPUs is known for the two runs on one node.
    """

    source: str
    model: HFModelConfig
    num_gpus: int
    parallel: dict[str, Any]
    tokens: int
    num_microbatches: int
    steady: float
    peak: float
    dropout: bool = False
    knows_gpus: bool = False


PEAKS = [
    Peak("gpt3_7b_tp4_pp1_memory_speed", GPT_7B, 8, {"tensor": 4}, 16_384, 2, 20_663_519_232, 57_143_791_616,
         dropout=True, knows_gpus=True),
    Peak("gpt3_7b_tp1_pp4_memory_speed", GPT_7B, 8, {"pipeline": 4, "virtual_pipeline": 8}, 8192, 4, 24_540_168_192,
         60_518_293_504, dropout=True, knows_gpus=True),
    Peak("gpt3_15b_8t_release", GPT_15B, 256, _parallel(tensor=8), 16_384, 3, 12_875_218_944, 27_765_456_896),
    Peak("mixtral_8x7b_tp1pp4ep8vpp8_release", MIXTRAL_8X7B, 64,
         _parallel(tensor=2, pipeline=4, virtual_pipeline=8, expert=8), 4096, 32, 19_743_387_648, 35_508_408_320),
    Peak("mixtral_8x22b_tp2pp8ep8vpp1_release", MIXTRAL_8X22B, 128,
         _parallel(tensor=2, pipeline=8, expert=8, expert_tensor=2), 4096, 32, 23_002_929_152, 28_533_706_752),
]  # fmt: skip

"""An estimate as text of one screen, and as one JSON object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spot_megatron.plan.estimate import GPU_POWER_SHARE, HOST_WATTS_PER_GPU, Estimate
from spot_megatron.plan.hardware import GIB
from spot_megatron.plan.search import Option
from spot_megatron.plan.time import DISK_BYTES_PER_SECOND, StepTime

BAR = 28  # characters of the longest bar

# What each part of a step holds, in the order in which they are shown.
STEP_GROUPS = {
    "layers": ("matrices", "attention", "elementwise"),
    "LM head": ("head",),
    "recompute": ("recompute",),
    "waiting for the host": ("host",),
    "tensor parallel": ("tensor",),
    "context parallel": ("context",),
    "expert parallel": ("expert",),
    "pipeline bubble": ("pipeline",),
    "data parallel": ("data",),
    "optimizer, logging": ("optimizer",),
    "imbalance": ("imbalance",),
}
MEMORY_NAMES = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations",
    "transient": "LM head, one layer's backward",
    "workspace": "CUDA, NCCL, kernels",
}


def step_groups(step: StepTime) -> dict[str, float]:
    """Seconds of a step by group, without the groups that take none."""
    sums = {name: sum(getattr(step, part) for part in parts) for name, parts in STEP_GROUPS.items()}
    return {name: seconds for name, seconds in sums.items() if seconds > 0}


def text(estimate: Estimate, fits: Sequence[Option], best: Sequence[Option]) -> str:
    """The whole answer. `fits`: changes that make it fit; `best`: the fastest configurations, if requested."""
    lines = [*_heading(estimate), "", *_memory(estimate), *_fit_advice(estimate, fits), "", *_time(estimate)]
    if best:
        lines += ["", "Fastest configurations that fit", *_options(best, estimate)]
    if estimate.warnings:
        lines += ["", *(f"! {warning}" for warning in estimate.warnings)]
    lines += ["", *_assumptions(estimate)]
    return "\n".join(lines)


def _heading(estimate: Estimate) -> list[str]:
    recipe, split, load = estimate.recipe, estimate.inputs.split, estimate.load
    nodes = f"{split.num_nodes} node{'s' if split.num_nodes > 1 else ''}"
    budget = f"packs of up to {recipe.data.tokens_per_microbatch} positions"
    dropped = "".join(f", {count} {reason.replace('_', ' ')}" for reason, count in estimate.workload.dropped.items())
    saved = estimate.workload.shared_share if recipe.data.layout == "shared" else 0.0
    return [
        f"{recipe.name} on {split.num_gpus} {estimate.inputs.gpu.name.upper()} ({nodes})",
        f"  model    {recipe.model.hf}, {parameters(estimate)} parameters",
        f"  split    {split_words(estimate)}; {budget}",
        f"  pairs    {estimate.workload.source}",
        f"           {len(estimate.workload.pairs)} used{dropped}; sharing prefixes saves {saved:.0%} of the positions",
        f"  run      {load.num_steps} steps of {recipe.train.batch_pairs} pairs; most packs of a rank: "
        f"{load.num_microbatches}",
    ]


def parameters(estimate: Estimate) -> str:
    count = estimate.inputs.model.num_parameters
    return f"{count / 1e9:.2f} billion" if count >= 1e8 else f"{count / 1e6:.2f} million"


def split_words(estimate: Estimate) -> str:
    """Parallel sizes above 1, precision and recompute mode."""
    p, recipe = estimate.recipe.parallel, estimate.recipe
    names = ("tensor", "context", "pipeline", "virtual_pipeline", "expert", "expert_tensor")
    sizes = {"data": estimate.inputs.split.data, **{name: getattr(p, name) for name in names}}
    words = (
        " x ".join(f"{name.replace('_', ' ')} {size}" for name, size in sizes.items() if size and size > 1) or "1 GPU"
    )
    precision = recipe.precision.dtype if recipe.precision.fp8 == "none" else f"FP8 {recipe.precision.fp8}"
    states = ", compact optimizer states" if recipe.has_compact_states else ""
    above = recipe.memory.recompute_above_tokens
    lora = f", LoRA of rank {recipe.lora.rank}" if recipe.lora.rank is not None else ""
    recompute = recipe.memory.recompute if above is None else f"of packs above {above} positions"
    return f"{words}; {precision}, {recipe.precision.grad_dtype} gradients{states}{lora}; recompute {recompute}"


def _memory(estimate: Estimate) -> list[str]:
    gpu, memory = estimate.inputs.gpu, estimate.memory
    verdict = "fits" if estimate.fits else "DOES NOT FIT"
    where = f", pipeline stage {memory.stage}" if estimate.recipe.parallel.pipeline > 1 else ""
    title = (
        f"Memory of the fullest GPU{where}: {memory.total / GIB:.1f} GiB of {gpu.usable_bytes / GIB:.1f} usable "
        f"({gpu.memory:.1f} in all): {verdict}"
    )
    parts = {MEMORY_NAMES[name]: size / GIB for name, size in memory.parts().items()}
    return [title, *_bars(parts, "{:7.1f}")]


def _fit_advice(estimate: Estimate, fits: Sequence[Option]) -> list[str]:
    if estimate.fits:
        return []
    if not fits:
        return ["  No change of parallel sizes, recompute or pack size makes it fit on up to 4096 GPUs."]
    return ["", "The cheapest changes that make it fit", *_options(fits, estimate)]


def _options(options: Sequence[Option], estimate: Estimate) -> list[str]:
    lines = []
    for option in options:
        gpus = f" on {option.num_gpus} GPUs" if option.num_gpus != estimate.inputs.split.num_gpus else ""
        found = option.estimate
        change = f"--set {option.flags}" if option.flags else "the recipe as it is"
        lines.append(
            f"  {duration(found.seconds):>9}  {found.memory.total / GIB:5.1f} GiB  {found.mfu:4.0%} MFU  {change}{gpus}"
        )
    return lines


def _time(estimate: Estimate) -> list[str]:
    parts = {name: seconds for name, seconds in estimate.parts.items() if seconds}
    title = "Time" if estimate.fits else "Time, if it fitted"
    lines = [f"{title}: {duration(estimate.seconds)}", *_bars(parts, "{:7.0f} s")]
    lines += ["", f"An optimizer step: {estimate.step.total:.2f} s", *_bars(step_groups(estimate.step), "{:7.3f} s")]
    return [
        *lines,
        "",
        f"  {estimate.unique_tokens_per_second:,.0f} tokens/s computed, worth {estimate.tokens_per_second:,.0f} of two "
        f"sequences a pair; MFU {estimate.mfu:.0%}",
        f"  {estimate.gpu_hours:.1f} GPU-hours, about {estimate.kilowatt_hours:.1f} kWh; "
        f"{estimate.checkpoint_bytes / 1e9:.0f} GB on disk",
        f"  saving a checkpoint takes at most {estimate.host_bytes_of_save / 1e9:.1f} GB more host memory on a node",
    ]


def _bars(parts: dict[str, float], number: str) -> list[str]:
    longest = max(parts.values())
    width = max(map(len, parts))
    return [
        f"  {name:<{width}}  {number.format(value)}  {'█' * round(BAR * value / longest)}".rstrip()
        for name, value in parts.items()
    ]


def _assumptions(estimate: Estimate) -> list[str]:
    gpu = estimate.inputs.gpu
    fp8 = f", FP8 {gpu.gemm('fp8') / 1e12:.0f}" if gpu.fp8 and estimate.recipe.precision.fp8 != "none" else ""
    return [
        f"Assumed: matrices at {gpu.gemm(estimate.recipe.precision.dtype) / 1e12:.0f} TFLOP/s{fp8} (published runs are "
        f"met within 15%), NVLink {gpu.nvlink:.0f} GB/s,",
        f"network {gpu.network:.0f} GB/s a GPU, disk {DISK_BYTES_PER_SECOND / 1e9:.0f} GB/s a node, "
        f"{gpu.watts * GPU_POWER_SHARE + HOST_WATTS_PER_GPU:.0f} W a GPU with its share of the node.",
    ]


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def as_dict(estimate: Estimate, fits: Sequence[Option], best: Sequence[Option]) -> dict[str, Any]:
    """The JSON object: bytes and seconds of every part."""
    inputs, load = estimate.inputs, estimate.load
    return {
        "recipe": estimate.recipe.name,
        "model": {"name": estimate.recipe.model.hf, "parameters": inputs.model.num_parameters},
        "gpu": inputs.gpu.name,
        "gpus": inputs.split.num_gpus,
        "parallel": {**estimate.recipe.parallel.model_dump(), "data": inputs.split.data},
        "pairs": {
            "source": estimate.workload.source,
            "used": len(estimate.workload.pairs),
            "dropped": estimate.workload.dropped,
            "shared_share": estimate.workload.shared_share,
        },
        "steps": load.num_steps,
        "tokens": load.num_tokens,
        "unique_tokens": load.num_unique_tokens,
        "padding": load.padding,
        "fits": estimate.fits,
        "memory": {
            "parts": estimate.memory.parts(),
            "total": estimate.memory.total,
            "usable": inputs.gpu.usable_bytes,
            "stage": estimate.memory.stage,
        },
        "seconds": {"parts": estimate.parts, "total": estimate.seconds},
        "step_seconds": {"parts": vars(estimate.step), "total": estimate.step.total},
        "tokens_per_second": estimate.tokens_per_second,
        "unique_tokens_per_second": estimate.unique_tokens_per_second,
        "mfu": estimate.mfu,
        "gpu_hours": estimate.gpu_hours,
        "kilowatt_hours": estimate.kilowatt_hours,
        "disk_bytes": estimate.checkpoint_bytes,
        "host_bytes_of_save": estimate.host_bytes_of_save,
        "changes_that_fit": [_option_dict(option) for option in fits],
        "best_layouts": [_option_dict(option) for option in best],
        "warnings": estimate.warnings,
    }


def _option_dict(option: Option) -> dict[str, Any]:
    return {
        "changes": option.changes,
        "gpus": option.num_gpus,
        "seconds": option.estimate.seconds,
        "memory": option.estimate.memory.total,
        "mfu": option.estimate.mfu,
    }

"""The largest memory of PyTorch's CUDA allocator against `make plan`, at the width of an 8B model."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import gpu

CASES = {
    "no recompute": ["memory.recompute_above_tokens=null", "data.tokens_per_microbatch=6144"],
    "recompute above 6144": [],
    "bf16 gradients": ["precision.grad_dtype=bf16"],
    "full recompute": ["memory.recompute=full", "memory.recompute_above_tokens=null"],
}


@pytest.mark.parametrize("case", CASES)
def test_peak_is_the_plans(tmp_path, case):
    output = tmp_path / "report.json"
    options = ["--model", "8b", "--layers", "10", "--steps", "2", "--output", str(output), "--set", *CASES[case]]
    assert gpu.main(options) == 0
    report = json.loads(output.read_text())
    peak = max(report["peak_bytes"].values())
    print(f"{case}: {peak / 2**30:.2f} GiB, planned {report['planned_bytes'] / 2**30:.2f}")
    assert peak == pytest.approx(report["planned_bytes"], rel=0.05)


def test_adamw_takes_18_bytes_a_parameter():
    """bf16 weights, fp32 gradients, master and two moments: with temporaries of AdamW it would be 22."""
    torch.cuda.reset_peak_memory_stats()
    hf = gpu.MODELS["0p6b"]
    recipe = gpu.load_recipe("qwen3_0p6b_spot", ["device=cuda", "train.batch_pairs=2", "train.max_steps=2"])
    dataset = gpu.random_dataset(100, 0.5, 4, hf.vocab_size)
    with gpu.parallel_groups(recipe.parallel, "cuda", 1) as topology:
        phases = gpu.train(recipe, hf, dataset, topology)
    assert phases.peak_bytes["update"] == pytest.approx(18 * 596_049_920, rel=0.02)

"""The largest memory of PyTorch's CUDA allocator against `make plan`, at the width of an 8B model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.processes import ROOT

CASES = {
    "no recompute": ["memory.recompute_above_tokens=null", "data.tokens_per_microbatch=6144"],
    "recompute above 6144": ["memory.recompute_above_tokens=6144"],
    "bf16 gradients": ["precision.grad_dtype=bf16"],
    "full recompute": ["memory.recompute=full", "memory.recompute_above_tokens=null"],
}


def report(folder: Path, *options: str) -> dict[str, Any]:
    """What benchmarks.gpu writes, from a process of its own: Megatron-Core keeps memory until its process ends."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--steps", "2", "--output", str(folder / "report.json")]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_peak_is_the_plans(tmp_path, case):
    found = report(tmp_path, "--model", "8b", "--layers", "10", "--set", *CASES[case])
    peak = max(found["peak_bytes"].values())
    print(f"{case}: {peak / 2**30:.2f} GiB, planned {found['planned_bytes'] / 2**30:.2f}")
    assert peak == pytest.approx(found["planned_bytes"], rel=0.05)


def test_adamw_takes_18_bytes_a_parameter(tmp_path):
    """bf16 weights, fp32 gradients, master and two moments: with temporaries of AdamW it would be 22."""
    found = report(tmp_path, "--model", "0p6b", "--response", "100")
    assert found["peak_bytes"]["update"] == pytest.approx(18 * 596_049_920, rel=0.02)

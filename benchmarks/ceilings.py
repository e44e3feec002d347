"""Ceilings of this GPU: memory bandwidth and bf16 matrix products, to read the other results against.

python -m benchmarks.ceilings [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MATRIX = 8192  # rows and columns: large enough for a product's peak, small beside the memory
COPIED_BYTES = 2**32


def device_seconds(work: Callable[[], Any], repeats: int = 10, warm_up: int = 3) -> float:
    """Median seconds of `work` on the device's clock."""
    seconds = []
    for repeat in range(warm_up + repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        stop.synchronize()
        if repeat >= warm_up:
            seconds.append(start.elapsed_time(stop) / 1000)
    return statistics.median(seconds)


def ceilings(device: torch.device) -> dict[str, float]:
    """TFLOP/s of a bf16 product of square matrices, GB/s of a copy (read and written bytes)."""
    left, right = (torch.randn(MATRIX, MATRIX, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = device_seconds(lambda: left @ right)
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = device_seconds(lambda: target.copy_(source))
    return {"matrix_tflops": 2 * MATRIX**3 / product / 1e12, "memory_gb_per_second": 2 * COPIED_BYTES / copy / 1e9}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("RecipeError: this measures a GPU, and PyTorch sees none here", file=sys.stderr)
        return 2
    text = json.dumps({"device": torch.cuda.get_device_name(), **ceilings(torch.device("cuda"))}, indent=1)
    if options.output:
        options.output.write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

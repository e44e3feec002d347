"""Measures the LM head by how much of its softmax is kept for backward, and as plain log_softmax.

    python -m benchmarks.head --output benchmarks/results/head.json

One process on one thread, the variants in turns; CPU-seconds of forward and backward together. The vocabulary is
Qwen3's, the scored positions are those of a pair of 600-token responses at shared fraction 0.7. On a GPU:
benchmarks/head_gpu.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cases import VOCAB_SIZE
from spot_megatron.model.head_memory import HeadMemory
from spot_megatron.model.logprob import linear_logprob

TILE = 2**21


def plain(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return torch.log_softmax(hidden @ weight.T, dim=-1).gather(1, target[:, None])[:, 0]


def tiled(kept_bytes: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    memory = HeadMemory(TILE, kept_bytes)
    return lambda hidden, weight, target: linear_logprob(hidden, weight, target, vocab_size=VOCAB_SIZE, memory=memory)


VARIANTS = {
    "plain log_softmax": plain,
    "tiled, nothing kept": tiled(0),
    "tiled, 128 MiB kept": tiled(2**27),
    "tiled, all kept": tiled(2**40),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=780)
    parser.add_argument("--hidden", type=int, nargs="+", default=[512])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = []
    for hidden_size in options.hidden:
        hidden = torch.randn(options.rows, hidden_size, requires_grad=True)
        weight = (0.02 * torch.randn(VOCAB_SIZE, hidden_size)).requires_grad_()
        target = torch.randint(0, VOCAB_SIZE, (options.rows,))
        seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
        for repeat in range(options.repeats + 1):
            for name, variant in VARIANTS.items():
                hidden.grad = weight.grad = None
                start = time.process_time()
                variant(hidden, weight, target).sum().backward()
                if repeat:  # the first of each allocates
                    seconds[name].append(time.process_time() - start)
        for name, values in seconds.items():
            row = {"hidden": hidden_size, "rows": options.rows, "variant": name, "median": statistics.median(values)}
            report.append(row | {"min": min(values), "max": max(values)})
            print(report[-1], flush=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Compares the installed attention kernels on the pair layout on this GPU, interleaved.

    python -m benchmarks.attention [--model 8b] [--output benchmarks/results/attention_<gpu>.json]

Forward and backward of one layer over a pack of pairs, bf16. FLOP/s count unmasked products only. The fastest one
belongs first in PREFERRED of spot_megatron/model/attention/cuda.py, or in a recipe as model.attention.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import MODELS, installed, random_dataset
from benchmarks.measure import ROOT
from spot_megatron.data.pack import positions_and_products
from spot_megatron.model.attention.cuda import KERNELS, kernel_problem
from spot_megatron.model.attention.pair import PairAttention, pair_seq_params
from spot_megatron.parallel.device import use_expandable_segments


def kernel_attention(kernel: str, head_dim: int) -> PairAttention:
    """The model's attention with a kernel of our choice; it has no parameters, so that no Megatron is needed."""
    module = PairAttention.__new__(PairAttention)
    torch.nn.Module.__init__(module)
    module.kernel, module.scale, module.context_group = kernel, head_dim**-0.5, None
    return module


def seconds(module: PairAttention, inputs: list[torch.Tensor], layout: Any) -> float:
    """Duration of one forward and backward pass on the device's clock."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    out = module(*inputs, packed_seq_params=layout)
    out.backward(torch.ones_like(out))
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1000


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="8b", help="whose heads")
    parser.add_argument("--responses", type=int, nargs="+", default=[600, 2000, 6000])
    parser.add_argument("--shared", type=float, default=0.5)
    parser.add_argument("--pairs", type=int, default=2, help="in a pack")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("RecipeError: this measures a GPU, and PyTorch sees none here", file=sys.stderr)
        return 2
    use_expandable_segments()
    hf, device, name = MODELS[options.model], torch.device("cuda"), torch.cuda.get_device_name()
    results: list[dict[str, Any]] = []
    for response in options.responses:
        dataset = random_dataset(response, options.shared, options.pairs, hf.vocab_size)
        pack = dataset.pack(range(options.pairs), "shared", 128)
        layout = pair_seq_params(pack, device)
        inputs = [
            torch.randn(
                len(pack.input_ids), 1, heads, hf.head_dim, device=device, dtype=torch.bfloat16
            ).requires_grad_()
            for heads in (hf.num_heads, hf.num_groups, hf.num_groups)
        ]
        products = sum(positions_and_products(pair, "shared")[1] for pair in dataset.pairs)
        kernels = [kernel for kernel in KERNELS if kernel_problem(kernel) is None]
        modules = {kernel: kernel_attention(kernel, hf.head_dim) for kernel in kernels}
        times: dict[str, list[float]] = {kernel: [] for kernel in modules}
        for repeat in range(options.repeats + 3):
            for kernel, module in modules.items():
                elapsed = seconds(module, inputs, layout)
                if repeat >= 3:  # the first ones compile and allocate
                    times[kernel].append(elapsed)
        for kernel, values in times.items():
            median = statistics.median(values)
            results.append(
                {
                    "response": response,
                    "positions": len(pack.input_ids),
                    "kernel": kernel,
                    "milliseconds": 1000 * median,
                    "tflops": 12 * hf.num_heads * hf.head_dim * products / median / 1e12,
                }
            )
            print(results[-1], flush=True)
    packages = ("torch", "flash-attn", "transformer-engine")
    report = {"device": name, "date": date.today().isoformat(), "versions": {p: installed(p) for p in packages}}
    path = options.output or ROOT / "benchmarks/results" / f"attention_{name.replace(' ', '_')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**report, "results": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

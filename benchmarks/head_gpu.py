"""TFLOP/s of the LM head on this GPU by the size of its tiles, forward and backward, bf16.

    python -m benchmarks.head_gpu [--model 8b] [--output FILE]

FLOP/s count the three products that the head needs; computing a tile's softmax again in backward is its own affair. The
fastest size belongs into `head_memory` of spot_megatron/model/logprob.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import torch

from benchmarks.ceilings import device_seconds
from benchmarks.gpu import MODELS
from spot_megatron.model.logprob import head_memory, linear_logprob, tile_width


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="8b", help="whose vocabulary and hidden size")
    parser.add_argument("--scored", type=int, nargs="+", default=[2048, 6144], help="scored positions of a pack")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("RecipeError: this measures a GPU, and PyTorch sees none here", file=sys.stderr)
        return 2
    hf, device = MODELS[options.model], torch.device("cuda")
    shape = {"device": device, "dtype": torch.bfloat16}
    weight = (0.02 * torch.randn(hf.vocab_size, hf.hidden_size, **shape)).requires_grad_()
    weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
    default, results = head_memory(device), []
    for num_scored in options.scored:
        hidden = torch.randn(num_scored, hf.hidden_size, **shape).requires_grad_()
        target = torch.randint(0, hf.vocab_size, (num_scored,), device=device)
        for share in (4, 1, 0.25):
            memory = dataclasses.replace(default, tile_elements=int(default.tile_elements * share))

            def step(memory=memory, hidden=hidden, target=target) -> None:
                hidden.grad = weight.grad = None
                linear_logprob(hidden, weight, target, vocab_size=hf.vocab_size, memory=memory).sum().backward()

            flops = 3 * 2 * num_scored * hf.vocab_size * hf.hidden_size
            result = {
                "scored": num_scored,
                "tile": tile_width(num_scored, memory),
                "is_default": share == 1,
                "tflops": flops / device_seconds(step) / 1e12,
            }
            results.append(result)
            print(result, flush=True)
    if options.output:
        report = {"device": torch.cuda.get_device_name(), "model": options.model, "results": results}
        options.output.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Speed and memory of training on the GPUs at hand; one part of `make bench-gpu`, and under torchrun for several GPUs.

    python -m benchmarks.gpu --model 8b --layers 10 [--set precision.fp8=tensorwise ...] [--output FILE]

A Qwen3 shape with random weights, bf16, random pairs; the reference pass and some steps, timed after a warm-up step.
Parallel sizes are 1 unless --set changes them. Model FLOP/s count what the unique tokens need, without recomputation
(`model_flops`); the largest memory is compared with `make plan`'s. Results go to benchmarks/results/<gpu>.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cases import Case, make_pairs
from benchmarks.measure import ROOT
from spot_megatron.data.dataset import PreferencePairDataset
from spot_megatron.data.pack import num_targets, positions_and_products
from spot_megatron.data.records import TokenPair
from spot_megatron.data.template import TokenizedPairs
from spot_megatron.errors import RecipeError, UserError, print_error
from spot_megatron.hf.config import HFModelConfig
from spot_megatron.model.config import has_transformer_engine, transformer_config
from spot_megatron.model.gpt import build_model
from spot_megatron.objective.shift import RewardShift
from spot_megatron.parallel.groups import Topology, parallel_groups
from spot_megatron.parallel.split import Split
from spot_megatron.plan.hardware import GIB, THIS_PROJECT, find_gpu
from spot_megatron.plan.inputs import PlanInput
from spot_megatron.plan.memory import rank_memory
from spot_megatron.plan.models import PUBLISHED
from spot_megatron.recipe import Parallel, Recipe, load_recipe
from spot_megatron.train.batches import one_pass, training_batches
from spot_megatron.train.optim import make_trainable
from spot_megatron.train.packing import pack_multiple
from spot_megatron.train.reference import reference_sums
from spot_megatron.train.step import ObjectiveLoss, forward_backward, reduce_sums

# Dense bf16 TFLOP/s of NVIDIA's data sheets, by what the driver's name of the device contains.
PEAK_TFLOPS = {"H100": 989.5, "H800": 989.5, "H200": 989.5, "A100": 312.0, "A800": 312.0, "B200": 2250.0}


MODELS = {
    name: PUBLISHED[f"Qwen/Qwen3-{size}"]
    for name, size in {"0p6b": "0.6B", "1p7b": "1.7B", "4b": "4B", "8b": "8B"}.items()
}


def model_flops(hf: HFModelConfig, positions: int, products: int, scored: int) -> float:
    """Operations of a forward and backward pass of a dense model: 6 a parameter of the layers and position, 12 a
    visible key, head and head dimension, 6 a parameter of the LM head and scored position."""
    assert not hf.moe_layers
    layer = hf.attention_weights + hf.mlp_weights
    keys = 12 * hf.num_layers * hf.query_width * products
    return 6.0 * hf.num_layers * layer * positions + keys + 6.0 * hf.embedding_weights * scored


def peak_tflops(device_name: str) -> float | None:
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in device_name), None)


@dataclass
class Phases:
    """Seconds of every run of a phase, and the largest memory that PyTorch's tensors took in it."""

    device: torch.device
    longest_pack: int = 0
    most_packs: int = 0  # of a step
    seconds: dict[str, list[float]] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        yield
        if cuda:
            torch.cuda.synchronize()
            self.peak_bytes[name] = max(self.peak_bytes.get(name, 0), torch.cuda.max_memory_allocated())
        self.seconds.setdefault(name, []).append(time.perf_counter() - start)


def random_dataset(response: int, shared: float, num_pairs: int, vocab_size: int) -> PreferencePairDataset:
    def token_pair(raw: dict[str, Any]) -> TokenPair:
        sides = (np.array(raw[f"{name}_ids"], dtype=np.int32) for name in ("prompt", "chosen", "rejected"))
        return TokenPair(raw["id"], *sides, source="random")

    pairs = [token_pair(raw) for raw in make_pairs(Case(response, shared, num_pairs), vocab_size)]
    return PreferencePairDataset.build(TokenizedPairs(pairs, {}), seed=0, max_tokens=2**17, pad_id=0)


def train(recipe: Recipe, hf: HFModelConfig, dataset: PreferencePairDataset, topology: Topology) -> Phases:
    """The reference pass and all steps of `recipe` over random weights."""
    phases = Phases(topology.device)
    with phases.measure("build"):
        chunks = build_model(transformer_config(hf, recipe, topology.device.type), hf)
        for param in (param for chunk in chunks for param in chunk.parameters() if param.dim() > 1):
            torch.nn.init.normal_(param, std=hf.initializer_range)
    multiple, layout = pack_multiple(recipe), recipe.data.layout
    with phases.measure("reference"):
        plan = one_pass(recipe, dataset, hf, topology).plan(0)[topology.data_rank]
        packs = [dataset.pack(pairs, layout, multiple) for pairs in plan]
        reference = reference_sums(chunks, len(dataset), [packs], topology)
    policy = make_trainable(chunks, recipe)
    shift = RewardShift(recipe.objective.shift.kind, recipe.objective.shift.decay)
    loss = ObjectiveLoss(recipe.objective, shift, reference)
    sampler = training_batches(recipe, dataset, hf, topology)
    for step in range(sampler.num_steps):
        with phases.measure("forward_backward"):
            packs = [dataset.pack(pairs, layout, multiple) for pairs in sampler.plan(step)[topology.data_rank]]
            phases.longest_pack = max(phases.longest_pack, *(len(pack.input_ids) for pack in packs))
            phases.most_packs = max(phases.most_packs, len(packs))
            policy.zero_grad()
            reports = forward_backward(policy.wrapped, packs, loss, topology)
            sums = reduce_sums(reports, packs, policy.squared_grad_norm(), topology)
        assert np.isfinite(sums.loss)
        with phases.measure("update"):
            policy.update(recipe.optim.lr, sums.grad_norm)
    return phases


def rates(
    phases: Phases, hf: HFModelConfig, dataset: PreferencePairDataset, recipe: Recipe, peak: float | None, num_gpus: int
) -> dict[str, Any]:
    """Rates a GPU, from the median step after the first; the pairs are all of one size."""
    steps = [a + b for a, b in zip(phases.seconds["forward_backward"], phases.seconds["update"], strict=True)][1:]
    pairs_per_second = recipe.train.batch_pairs / float(np.median(steps)) / num_gpus
    pair = dataset.pairs[0]
    flops = model_flops(hf, *positions_and_products(pair, "shared"), num_targets(pair, "shared"))
    tflops = pairs_per_second * flops / 1e12
    return {
        "step_seconds": {"median": float(np.median(steps)), "min": min(steps), "max": max(steps), "count": len(steps)},
        "tokens_per_second": pairs_per_second * positions_and_products(pair, "separate")[0],
        "unique_tokens_per_second": pairs_per_second * positions_and_products(pair, "shared")[0],
        "model_tflops_per_second": tflops,
        "mfu_on_unique_tokens": tflops / peak if peak else None,
        "reference_seconds": phases.seconds["reference"][0],
        "peak_bytes": phases.peak_bytes,
    }


def planned_bytes(phases: Phases, hf: HFModelConfig, recipe: Recipe, num_gpus: int) -> float:
    """Planned bytes of PyTorch's tensors on the fullest rank, with packs as long as the longest one was."""
    total = torch.cuda.get_device_properties(phases.device).total_memory
    inputs = PlanInput(
        model=hf,
        split=Split(recipe.parallel, num_gpus),
        precision=recipe.precision,
        memory=recipe.memory,
        gpu=dataclasses.replace(find_gpu("h100"), memory=total / GIB),  # of the card, only the memory counts here
        software=dataclasses.replace(THIS_PROJECT, fused_rope=has_transformer_engine()),
    )
    plan = rank_memory(inputs, phases.longest_pack, phases.most_packs)
    return plan.total - plan.workspace


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def bench(options: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        raise RecipeError("bench-gpu measures a GPU, and PyTorch sees none here; `make bench` compares on a CPU")
    overrides = [
        "device=cuda",
        *(f"parallel.{name}={'null' if size is None else size}" for name, size in Parallel().model_dump().items()),
        "objective.name=spot_bce",
        "objective.shift.kind=none",
        "memory.recompute=none",
        f"train.batch_pairs={options.batch_pairs}",
        f"train.max_steps={options.steps}",
        *options.overrides,
    ]
    recipe, hf = load_recipe("qwen3_8b_spot", overrides), MODELS[options.model]
    if options.layers:
        hf = dataclasses.replace(hf, num_layers=options.layers)
    dataset = random_dataset(options.response, options.shared, options.batch_pairs * options.steps, hf.vocab_size)
    with parallel_groups(recipe.parallel, "cuda", recipe.seed) as topology:
        name = torch.cuda.get_device_name()  # not earlier: it starts CUDA, whose settings the groups make
        phases = train(recipe, hf, dataset, topology)
        if not topology.is_main:
            return
        report = {
            "device": name,
            "num_gpus": topology.world,
            "date": date.today().isoformat(),
            "versions": {p: installed(p) for p in ("torch", "megatron-core", "transformer-engine", "flash-attn")},
            "model": options.model,
            "layers": hf.num_layers,
            "response": options.response,
            "shared": options.shared,
            "recipe": recipe.model_dump(include={"data", "parallel", "precision", "memory", "train"}),
            **rates(phases, hf, dataset, recipe, peak_tflops(name), topology.world),
            "planned_bytes": planned_bytes(phases, hf, recipe, topology.world),
        }
    path = options.output or ROOT / "benchmarks/results" / f"{name.replace(' ', '_')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="1p7b")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, for one GPU; of the same width")
    parser.add_argument("--response", type=int, default=2000, help="tokens of a response")
    parser.add_argument("--shared", type=float, default=0.5, help="shared fraction of it")
    parser.add_argument("--batch-pairs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8, help="the first one is not counted")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="key=value", dest="overrides")
    parser.add_argument("--output", type=Path)
    try:
        bench(parser.parse_args(arguments))
    except UserError as error:
        return print_error(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())

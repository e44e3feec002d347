"""Simulates how evenly the sampler distributes pairs over data-parallel ranks. Runs no model.

    python -m benchmarks.balance --output benchmarks/results/balance.json

4,000 pairs of lognormal lengths (coefficient of variation 0.6, about 2,000 response tokens as in the paper's runs) go
through the sampler that training uses, at Qwen3-8B's cost model. A step takes as long as its slowest rank.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import ROOT
from spot_megatron.data.costs import cost_model
from spot_megatron.data.pack import num_targets, positions_and_products
from spot_megatron.data.records import TokenPair
from spot_megatron.data.sampler import BatchSampler
from spot_megatron.plan.models import PUBLISHED

NUM_PAIRS = 4000
PROMPT_MEAN, RESPONSE_MEAN, VARIATION = 200, 2000, 0.6
MOST_TOKENS = 8192  # data.max_tokens: longer pairs are drawn again
BUDGET = 16384  # data.tokens_per_microbatch: room for any pair


def lognormal_pairs(num_pairs: int, seed: int) -> list[TokenPair]:
    """Pairs whose responses share a first part that is uniform in 20 to 80 % of the shorter one."""
    rng = np.random.default_rng(seed)
    sigma = np.sqrt(np.log(1 + VARIATION**2))

    def length(mean: float) -> int:
        return max(2, int(rng.lognormal(np.log(mean) - sigma**2 / 2, sigma)))

    pairs: list[TokenPair] = []
    while len(pairs) < num_pairs:
        prompt, chosen = length(PROMPT_MEAN), length(RESPONSE_MEAN)
        rejected = max(2, int(chosen * rng.uniform(0.9, 1.1)))  # a rectified answer is about as long
        if prompt + max(chosen, rejected) > MOST_TOKENS:
            continue
        shared = int(min(chosen, rejected) * rng.uniform(0.2, 0.8))
        rejected_ids = np.ones(rejected, dtype=np.int32)
        rejected_ids[shared:] = 2
        ids = np.ones(prompt, dtype=np.int32), np.ones(chosen, dtype=np.int32), rejected_ids
        pairs.append(TokenPair(f"pair-{len(pairs)}", *ids, source="simulated"))
    return pairs


def simulate(rows: np.ndarray, costs: np.ndarray, dp_size: int, batch_pairs: int, multiple_of: int) -> dict[str, Any]:
    """One epoch's steps.

    Returns:
        slowest_over_mean: sum over steps of the slowest rank's cost / of the mean rank's; bound: the same where the
        slowest rank had just the larger of a mean rank's cost and the costliest pair's, which no dealing of whole pairs
        can beat; random: ranks take equal numbers of pairs as they come; padding: rows of padding / all rows.
    """
    sampler = BatchSampler(
        rows,
        costs,
        batch_pairs=batch_pairs,
        epochs=1,
        order="shuffled",
        seed=0,
        max_steps=None,
        dp_size=dp_size,
        tokens_per_microbatch=BUDGET,
        pairs_per_microbatch=None,
    )
    slowest = mean = bound = random = 0.0
    num_padding = num_rows = num_microbatches = 0
    for step in range(sampler.num_steps):
        batch = sampler.batch(step)
        plan = sampler.plan(step)
        of_rank = [sum(float(costs[pairs].sum()) for pairs in rank) for rank in plan]
        average = sum(of_rank) / dp_size
        slowest, mean = slowest + max(of_rank), mean + average
        bound += max(average, float(costs[batch].max()))
        random += max(float(costs[part].sum()) for part in np.array_split(np.array(batch), dp_size))
        for pairs in (pairs for rank in plan for pairs in rank):
            size = int(rows[pairs].sum())
            padded = -(-size // multiple_of) * multiple_of if pairs else multiple_of
            num_padding += padded - size
            num_rows += padded
            num_microbatches += 1
    return {
        "dp_size": dp_size,
        "batch_pairs": batch_pairs,
        "multiple_of": multiple_of,
        "slowest_over_mean": slowest / mean,
        "bound": bound / mean,
        "random": random / mean,
        "padding": num_padding / num_rows,
        "microbatches_per_rank": num_microbatches / sampler.num_steps / dp_size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/balance.json")
    options = parser.parse_args()
    pairs = lognormal_pairs(NUM_PAIRS, seed=0)
    model = cost_model(PUBLISHED["Qwen/Qwen3-8B"])
    work = [(*positions_and_products(pair, "shared"), num_targets(pair, "shared")) for pair in pairs]
    rows, costs = np.array([numbers[0] for numbers in work]), np.array([model.of(*numbers) for numbers in work])
    results = []
    print("| DP | batch | pairs a rank | slowest / mean | least possible | at random | padding to 1 / 16 / 128 |")
    print("|" + "---|" * 7)
    for dp_size, batches in ((8, (32, 64)), (16, (32, 64, 128)), (64, (32, 64, 128, 256, 512))):
        for batch_pairs in batches:
            runs = [simulate(rows, costs, dp_size, batch_pairs, multiple) for multiple in (1, 16, 128)]
            results += runs
            padding = " / ".join(f"{run['padding']:.2%}" for run in runs)
            ratios = " | ".join(f"{runs[0][key]:.3f}" for key in ("slowest_over_mean", "bound", "random"))
            print(f"| {dp_size} | {batch_pairs} | {batch_pairs / dp_size:g} | {ratios} | {padding} |")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Trains a job with this project: the functions that `make train` calls, with a stopwatch between them."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import BETA, OPTIM
from benchmarks.worker import Stopwatch, read_job, write_result
from spot_megatron.quiet import hide_known_warnings

hide_known_warnings()

from spot_megatron.model.config import transformer_config  # noqa: E402
from spot_megatron.model.gpt import build_model  # noqa: E402
from spot_megatron.objective.shift import RewardShift  # noqa: E402
from spot_megatron.parallel.groups import parallel_groups  # noqa: E402
from spot_megatron.recipe import Recipe  # noqa: E402
from spot_megatron.train.heartbeat import Heartbeat  # noqa: E402
from spot_megatron.train.optim import make_trainable  # noqa: E402
from spot_megatron.train.reference import reference_pass  # noqa: E402
from spot_megatron.train.setup import set_up  # noqa: E402
from spot_megatron.train.step import ObjectiveLoss, forward_backward, reduce_sums  # noqa: E402
from spot_megatron.weights.load import load_hf  # noqa: E402


def recipe_of(job: dict[str, Any]) -> Recipe:
    inclusive = {"kind": "cumulative_inclusive"} if job["objective"] == "spot_bco" else {"kind": "none"}
    return Recipe.model_validate(
        {
            "name": "bench",
            "output": job["output"],
            "device": "cpu",
            "model": {"hf": job["model"]},
            "data": {
                "pairs": job["pairs"],
                "max_tokens": 16384,
                "order": "file",
                "layout": job["layout"],
                "tokens_per_microbatch": 2**20,
                "pairs_per_microbatch": job["pairs_per_microbatch"],
            },
            "objective": {"name": job["objective"], "beta": BETA, "shift": inclusive},
            "train": {"batch_pairs": job["batch_pairs"], "epochs": 1, "max_steps": job["num_steps"]},
            "optim": {**OPTIM, "betas": list(OPTIM["betas"]), "schedule": "constant", "warmup_fraction": 0.0},
            "precision": {"dtype": "fp32"},
            "logging": {"tensorboard": False},
        }
    )


def main() -> None:
    job = read_job()
    recipe, watch = recipe_of(job), Stopwatch()
    losses, tokens = [], []
    timeout = recipe.parallel.timeout_minutes
    with (
        parallel_groups(recipe.parallel, "cpu", recipe.seed) as topology,
        Heartbeat(Path(recipe.output), topology.rank, topology.world, timeout, "benchmark") as heartbeat,
    ):
        run = set_up(recipe, topology, heartbeat)
        chunks = build_model(transformer_config(run.hf, recipe, "cpu"), run.hf)
        load_hf(chunks, run.weights, run.hf)
        watch.start("reference")
        reference = reference_pass(run, chunks)
        watch.stop()
        policy = make_trainable(chunks, recipe)
        shift = RewardShift(recipe.objective.shift.kind, recipe.objective.shift.decay)
        loss = ObjectiveLoss(recipe.objective, shift, reference)
        for step in range(job["num_steps"]):
            watch.start("step")
            packs = run.packs(step)
            policy.zero_grad()
            reports = forward_backward(policy.wrapped, packs, loss, topology)
            sums = reduce_sums(reports, packs, policy.squared_grad_norm(), topology)
            if not shift.moves_inside_batch:
                shift.update(sums.mean_reward)
            policy.update(OPTIM["lr"], sums.grad_norm)
            watch.stop()
            losses.append(sums.loss / sums.num_pairs)
            tokens.append([sums.num_tokens, sums.num_unique_tokens])
    versions = {"torch": torch.__version__, "megatron-core": version("megatron-core")}
    num_parameters = sum(param.numel() for chunk in chunks for param in chunk.parameters())
    write_result(job, watch, losses, tokens=tokens, versions=versions, num_parameters=num_parameters)


if __name__ == "__main__":
    main()

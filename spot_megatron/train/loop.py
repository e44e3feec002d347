"""The whole job: weights, pairs, reference pass, updates, export. Reads as the algorithm."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from spot_megatron.data.dataset import PreferencePairDataset
from spot_megatron.data.records import TokenPair, read_pairs
from spot_megatron.data.sampler import BatchSampler
from spot_megatron.data.template import TokenizedPairs, check_vocabulary, load_tokenizer, tokenize_pairs
from spot_megatron.errors import EXIT_STOPPED, CheckpointError, PairError, RecipeError
from spot_megatron.hf.config import HFModelConfig, read_hf_config
from spot_megatron.hf.folder import HFFolder
from spot_megatron.hf.hub import resolve_model
from spot_megatron.model.config import transformer_config
from spot_megatron.model.gpt import build_model
from spot_megatron.objective.losses import VALUE_AT_REFERENCE
from spot_megatron.objective.shift import RewardShift
from spot_megatron.parallel.device import make_deterministic
from spot_megatron.parallel.groups import Topology
from spot_megatron.recipe import Precision, Recipe
from spot_megatron.report import write_report
from spot_megatron.train import checkpoint
from spot_megatron.train.batches import one_pass, training_batches
from spot_megatron.train.heartbeat import Heartbeat
from spot_megatron.train.metrics import MetricsLog
from spot_megatron.train.optim import Policy, learning_rate, make_trainable
from spot_megatron.train.packing import pack_multiple
from spot_megatron.train.reference import computed_by, reference_key, reference_logps, write_reference
from spot_megatron.train.step import ObjectiveLoss, StepSums, forward_backward, reduce_sums
from spot_megatron.train.stop import StopSignal
from spot_megatron.weights.export import export_hf
from spot_megatron.weights.load import load_hf


@dataclass
class Job:
    """What a run is made of, once it is set up."""

    recipe: Recipe
    topology: Topology
    folder: Path
    hf_folder: Path
    hf: HFModelConfig
    dataset: PreferencePairDataset
    sampler: BatchSampler
    multiple_of: int
    heartbeat: Heartbeat


def run(recipe: Recipe, topology: Topology) -> int:
    """Trains under `recipe` and exports the result. Returns the exit code: 0 done, 75 stopped by a signal.

    Raises:
        UserError: recipe, pairs, weights or checkpoint cannot be used; the message says what to do.
    """
    with Heartbeat(Path(recipe.output), topology.rank, topology.world, recipe.parallel.timeout_minutes) as heartbeat:
        return work(set_up(recipe, topology, heartbeat))


def work(job: Job) -> int:
    """The job's parts in their order."""
    recipe, topology = job.recipe, job.topology
    job.heartbeat.beat(0, "loading the weights")
    chunks = build_model(transformer_config(job.hf, recipe, topology.device.type), job.hf)
    weights = HFFolder(job.hf_folder)
    load_hf(chunks, weights, job.hf)
    job.heartbeat.beat(0, "reference pass")
    reference = reference_pass(job, chunks, weights)

    policy = make_trainable(chunks, recipe)
    shift = RewardShift(recipe.objective.shift.kind, recipe.objective.shift.decay)
    stopped = train(job, policy, shift, reference)
    if stopped:
        return EXIT_STOPPED
    if recipe.export.hf:
        result = job.folder / "hf"
        job.heartbeat.beat(job.sampler.num_steps, "exporting")
        policy.gather_weights()
        export_hf(policy.bare, job.hf_folder, result, job.hf, shard_gb=recipe.export.shard_gb, replace=True)
        say(topology, f"exported to {result}")
    if topology.is_main:
        write_report(job.folder)
    return 0


def set_up(recipe: Recipe, topology: Topology, heartbeat: Heartbeat) -> Job:
    """Reads the data and prepares the run folder."""
    if recipe.deterministic:
        make_deterministic(topology.device)
    hf_folder = resolve_model(recipe.model.hf)
    hf = read_hf_config(hf_folder)
    transformer_config(hf, recipe, topology.device.type)  # its limits are told before the data is read
    tokenized = read_data(recipe, hf_folder, hf, topology)
    dataset = PreferencePairDataset.build(tokenized, seed=recipe.seed, max_tokens=recipe.data.max_tokens, pad_id=0)
    sampler = training_batches(recipe, dataset, hf, topology)
    saved = checkpoint.newest(Path(recipe.output) / "checkpoints") if recipe.checkpoint.resume == "auto" else None
    if saved:  # another recipe's run is refused before anything of it is overwritten
        checkpoint.read_state(saved, checkpoint.fixed_part(recipe, len(dataset), sampler.num_steps))
    folder = prepare_folder(recipe, topology)
    if topology.is_main:
        (folder / "dropped.json").write_text(json.dumps(tokenized.dropped, indent=1, ensure_ascii=False))
    return Job(recipe, topology, folder, hf_folder, hf, dataset, sampler, pack_multiple(recipe), heartbeat)


def read_data(recipe: Recipe, hf_folder: Path, hf: HFModelConfig, topology: Topology) -> TokenizedPairs:
    """Pair files -> tokens. Tells how many pairs were dropped and why; the run's dropped.json lists them."""
    data = recipe.data
    records = read_pairs(recipe.pair_files, data.format)
    has_text = any(not isinstance(record, TokenPair) for record in records)
    if data.enable_thinking and not has_text:
        raise RecipeError("data.enable_thinking=true: these pairs are token ids already, so no template reads it")
    tokenizer = load_tokenizer(hf_folder) if has_text else None
    tokenized = tokenize_pairs(records, tokenizer, data.max_tokens, data.enable_thinking)
    for reason, ids in tokenized.dropped.items():
        say(topology, f"dropped {len(ids)} of {len(records)} pairs: {reason} (first: {ids[0]})")
    if not tokenized.pairs:
        raise PairError(f"{recipe.data.pairs}: no pair is left to train on; see the reasons above")
    check_vocabulary(tokenized.pairs, hf.vocab_size, f"vocab_size of {hf_folder}/config.json")
    return tokenized


def prepare_folder(recipe: Recipe, topology: Topology) -> Path:
    """The run folder with recipe and environment; an earlier run is set aside if it must not be resumed."""
    folder = Path(recipe.output)
    if topology.is_main:
        if recipe.checkpoint.resume == "never" and (folder / "metrics.jsonl").exists():
            aside = next(path for n in range(1, 10**6) if not (path := folder.with_name(f"{folder.name}.{n}")).exists())
            folder.rename(aside)
            say(topology, f"set the earlier run aside as {aside}")
        try:
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecipeError(
                f"output: {folder} cannot be made ({error}); choose a folder that can be written"
            ) from None
        shutil.rmtree(folder / "heartbeat", ignore_errors=True)
        (folder / "recipe.yaml").write_text(recipe.dump(), encoding="utf-8")
        (folder / "environment.json").write_text(json.dumps(environment(topology), indent=1))
    dist.barrier()
    return folder


def reference_pass(job: Job, chunks: list[Any], weights: HFFolder) -> np.ndarray:
    """[num pairs, 2] reference log-probability sums, computed now or read from the cache."""
    topology, recipe = job.topology, job.recipe
    digest: list[Any] = [weights.digest() if topology.is_main else None]
    dist.broadcast_object_list(digest, src=0)
    key = reference_key(recipe, job.dataset, digest[0], computed_by(recipe, topology.device.type))
    cache = job.folder.parent / "reference_cache" / f"{key}.jsonl"
    plan = one_pass(recipe, job.dataset, job.hf, topology).plan(0)[topology.data_rank]
    packs = (job.dataset.pack(indices, recipe.data.layout, job.multiple_of) for indices in plan)
    reference, seconds = reference_logps(chunks, job.dataset, packs, topology, cache)
    if topology.is_main:
        write_reference(job.folder / "reference.jsonl", job.dataset, reference)
    say(topology, f"reference pass: {seconds:.1f} s" if seconds else f"reference pass: read from {cache}")
    return reference


def train(job: Job, policy: Policy, shift: RewardShift, reference: np.ndarray) -> bool:
    """All updates that are left. Returns True if a signal stopped it after saving."""
    recipe, topology, sampler = job.recipe, job.topology, job.sampler
    fixed = checkpoint.fixed_part(recipe, len(job.dataset), sampler.num_steps)
    saved = checkpoint.newest(job.folder / "checkpoints")
    first = checkpoint.load(saved, policy, shift, fixed) if saved else 0
    say(topology, f"{len(job.dataset)} pairs, steps {first} to {sampler.num_steps} of {sampler.num_steps}")
    log = MetricsLog(job.folder, recipe, sampler.num_steps, first) if topology.is_main else None
    loss = ObjectiveLoss(recipe.objective, shift, reference)

    with StopSignal(topology.device) as stop:
        for step in range(first, sampler.num_steps):
            start = time.perf_counter()
            job.heartbeat.beat(step + 1, "training")
            torch.manual_seed(hash_seed(recipe.seed, step))
            plan = sampler.plan(step)[topology.data_rank]
            packs = [job.dataset.pack(indices, recipe.data.layout, job.multiple_of) for indices in plan]

            policy.zero_grad()
            reports = forward_backward(policy.wrapped, packs, loss, topology)
            sums = reduce_sums(reports, packs, topology)
            check_sums(sums, step, recipe, shift.value)
            used_shift = shift.value
            if not shift.moves_inside_batch:
                shift.update(sums.mean_reward)
            lr = learning_rate(recipe.optim, step, sampler.num_steps)
            grad_norm = policy.update(lr)

            if log:
                log.write(metrics_row(step + 1, sums, used_shift, grad_norm, lr, time.perf_counter() - start))
            stopping = stop.on_any_rank()
            if stopping or (step + 1) % recipe.checkpoint.every_steps == 0 or step + 1 == sampler.num_steps:
                job.heartbeat.beat(step + 1, "saving")
                policy.gather_weights()
                checkpoint.save(
                    job.folder / "checkpoints", step + 1, policy, shift, fixed, job.hf_folder, recipe.checkpoint.keep
                )
            if stopping and step + 1 < sampler.num_steps:
                say(topology, f"stopped by a signal after step {step + 1}, saved; run the same command to go on")
                break
        else:
            stopping = False
    if log:
        log.close()
    return stopping


def check_sums(sums: StepSums, step: int, recipe: Recipe, shift: float) -> None:
    """Every step's loss must be finite; at step 0 the policy is the reference, so rewards are 0 (the step-0 gate)."""
    if not np.isfinite(sums.loss):
        raise CheckpointError(
            f"step {step + 1}: the loss is {sums.loss}; nothing was updated. Lower optim.lr, or check the weights"
        )
    if step > 0:
        return
    tolerance = gate_tolerance(recipe.precision)
    expected = VALUE_AT_REFERENCE[recipe.objective.name]
    loss = sums.loss / sums.num_pairs
    if sums.worst_drift > tolerance:
        raise CheckpointError(
            f"step-0 gate: before any update the policy differs from its own reference by {sums.worst_drift:.2e} nats "
            f"a token (allowed: {tolerance:.0e}); loss {loss:.6f}, expected {expected}. The cached reference is "
            "another model's, or this parallel split computes another model: delete reference_cache beside the run, "
            "and if it happens again train with parallel sizes of 1 and report it"
        )


def gate_tolerance(precision: Precision) -> float:
    """Nats a token by which two forward passes in another packing may differ."""
    if precision.fp8 != "none":
        return 1e-1
    return {"fp32": 1e-4, "bf16": 5e-2}[precision.dtype]


def metrics_row(
    step: int, sums: StepSums, shift: float, grad_norm: float, lr: float, seconds: float
) -> dict[str, float | int]:
    """Means over the step's pairs, measured before the update; rewards include beta."""
    n = sums.num_pairs
    return {
        "step": step,
        "loss": sums.loss / n,
        "reward_chosen": sums.reward_chosen / n,
        "reward_rejected": sums.reward_rejected / n,
        "reward_margin": (sums.reward_chosen - sums.reward_rejected) / n,
        "reward_accuracy": sums.num_accurate / n,
        "reward_shift": shift,
        "grad_norm": grad_norm,
        "lr": lr,
        "pairs": n,
        "tokens": sums.num_tokens,
        "unique_tokens": sums.num_unique_tokens,
        "seconds": round(seconds, 4),
    }


def hash_seed(seed: int, step: int) -> int:
    """The random state of a step, a function of seed and step alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{step}".encode()).digest()[:7], "big")


def environment(topology: Topology) -> dict[str, Any]:
    packages = ("torch", "megatron-core", "transformers", "safetensors", "numpy")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in packages},
        "device": torch.cuda.get_device_name() if topology.device.type == "cuda" else platform.processor() or "cpu",
        "processes": topology.world,
        "threads": torch.get_num_threads(),
    }


def say(topology: Topology, text: str) -> None:
    if topology.is_main:
        print(text, flush=True)

"""A training job from weights and pairs to a Hugging Face folder."""

from __future__ import annotations

import time
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch

from spot_megatron.errors import EXIT_STOPPED
from spot_megatron.model.config import transformer_config
from spot_megatron.model.gpt import build_model
from spot_megatron.objective.shift import RewardShift
from spot_megatron.parallel.groups import Topology
from spot_megatron.recipe import Recipe
from spot_megatron.report import write_report
from spot_megatron.train.export_gate import export_run
from spot_megatron.train.finite import check_gradients, check_initial_weights, check_weights
from spot_megatron.train.gate import check_step_zero
from spot_megatron.train.heartbeat import Heartbeat
from spot_megatron.train.metrics import MetricsLog, metrics_row
from spot_megatron.train.optim import Policy, learning_rate, make_trainable
from spot_megatron.train.push import push_to_hub
from spot_megatron.train.reference import reference_pass
from spot_megatron.train.run_folder import from_main, locked, say
from spot_megatron.train.setup import Setup, set_up
from spot_megatron.train.step import ObjectiveLoss, forward_backward, reduce_sums
from spot_megatron.train.stop import StopSignal
from spot_megatron.train.validation import Validation
from spot_megatron.weights.adapters import attach_adapters
from spot_megatron.weights.load import load_hf
from spot_megatron.weights.peft import export_adapter


def run(recipe: Recipe, topology: Topology) -> int:
    """Trains under `recipe` and exports the result. Returns the exit code: 0, or EXIT_STOPPED after a signal.

    Raises:
        UserError: recipe, pairs, weights or checkpoint cannot be used; the message names the remedy.
    """
    output, timeout = Path(recipe.output), recipe.parallel.timeout_minutes
    with locked(output, topology):
        start = from_main(lambda: uuid4().hex, topology)
        with Heartbeat(output, topology.rank, topology.world, timeout, start) as heartbeat:
            return work(set_up(recipe, topology, heartbeat))


def work(job: Setup) -> int:
    """Loads the model, runs the reference pass, trains and exports. Returns the exit code."""
    recipe, topology = job.recipe, job.topology
    if job.finished:
        say(topology, f"{job.folder} holds a finished run of this recipe: nothing is left to do")
        publish(job)
        return 0
    job.heartbeat.beat(0, "loading the weights")
    chunks = build_model(transformer_config(job.hf, recipe, topology.device.type), job.hf)
    load_hf(chunks, job.weights, job.hf)
    check_initial_weights(chunks, job.weights.folder)
    if recipe.lora.rank is not None:
        attach_adapters(chunks, job.hf, recipe.lora, recipe.seed)
    job.heartbeat.beat(0, "reference pass")
    reference = reference_pass(job, chunks)
    validation = Validation(job, chunks)

    policy = make_trainable(chunks, recipe)
    shift = RewardShift(recipe.objective.shift.kind, recipe.objective.shift.decay)
    stopped = train(job, policy, shift, reference, validation)
    if stopped:
        return EXIT_STOPPED
    if recipe.export.has_result:
        job.heartbeat.beat(job.sampler.num_steps, "exporting")
        policy.gather_weights()
        validation.load_best(policy)
        export(job, policy, reference)
    if topology.is_main:
        write_report(job.folder)
        job.checkpoints.mark_finished(recipe)
    publish(job)
    return 0


def export(job: Setup, policy: Policy, reference: np.ndarray) -> None:
    """Writes what the recipe exports of the weights that the model holds. Collective."""
    recipe, topology = job.recipe, job.topology
    if recipe.export.hf:
        export_run(job, policy.bare, reference)
    if recipe.export.adapter:
        export_adapter(policy.bare, job.folder / "adapter", job.hf, recipe.lora, recipe.model.hf)
        say(topology, f"adapters exported to {job.folder / 'adapter'}")


def publish(job: Setup) -> None:
    """Uploads a finished run's result if the recipe asks for it."""
    if job.recipe.export.push_to_hub and job.topology.is_main:
        address = push_to_hub(job.recipe, job.folder, job.checkpoints.identity)
        say(job.topology, f"uploaded to {address}" if address else "uploaded before")


def train(job: Setup, policy: Policy, shift: RewardShift, reference: np.ndarray, validation: Validation) -> bool:
    """Runs all updates that are left. Returns True if a signal stopped the run after saving."""
    recipe, topology, num_steps = job.recipe, job.topology, job.sampler.num_steps
    every = recipe.checkpoint.every_steps
    first = job.checkpoints.resume(policy, shift)
    validation.resume(first)
    say(topology, f"{len(job.dataset)} pairs, steps {first} to {num_steps} of {num_steps}")
    loss = ObjectiveLoss(recipe.objective, shift, reference)

    with StopSignal() as stop, MetricsLog(job.folder, recipe, num_steps, first, topology.is_main) as log:
        if first == 0:
            validation.run(0, policy, shift, log)
        for step in range(first, num_steps):
            if validation.is_over:
                break
            start = time.perf_counter()
            job.heartbeat.beat(step + 1, "training")
            torch.manual_seed(job.seed(step))
            packs = job.packs(step)

            policy.zero_grad()
            reports = forward_backward(policy.wrapped, packs, loss, topology)
            sums = reduce_sums(reports, packs, policy.squared_grad_norm(), topology)
            check_gradients(job, step, sums, reports, packs, policy.bare)
            if step == 0:
                check_step_zero(sums, recipe)

            lr, used_shift = learning_rate(recipe.optim, step, num_steps), shift.value
            if not shift.moves_inside_batch:
                shift.update(sums.mean_reward)
            policy.update(lr, sums.grad_norm)
            log.write(metrics_row(step + 1, sums, used_shift, lr, time.perf_counter() - start))

            is_best = validation.run(step + 1, policy, shift, log)
            stopping, is_last = stop.on_any_rank(), step + 1 == num_steps or validation.is_over
            job.checkpoints.advance()
            if stopping or is_last or is_best or (every and (step + 1) % every == 0):
                job.heartbeat.beat(step + 1, "saving")
                policy.gather_weights()
                check_weights(policy.bare, step + 1)
                if stopping or not is_last or not recipe.export.has_result:  # the last state is exported instead
                    job.checkpoints.save(step + 1, policy, shift, validation.best.state_dict())
            if stopping or is_last:
                job.checkpoints.finish()
            if stopping and not is_last:
                say(topology, f"stopped by a signal after step {step + 1}, saved; run the same command to continue")
                return True
    return False

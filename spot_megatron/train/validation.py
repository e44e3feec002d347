"""Validation: the policy's loss and rewards on held-out pairs, and its log-probability of texts that it should keep.

Both are forward passes like the reference pass, before the first update and every few steps. Nothing that training
reads changes in them: neither weights, gradients, the reward shift, nor the random state.

Values are kept by pair and summed in the order of the file, so that they do not depend on packs or ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from spot_megatron.data.sampler import Bins
from spot_megatron.errors import CheckpointError
from spot_megatron.model.gpt import PairGPT
from spot_megatron.objective.shift import RewardShift
from spot_megatron.recipe import Recipe
from spot_megatron.train.batches import one_pass
from spot_megatron.train.finite import check_forward, check_weights
from spot_megatron.train.microbatch import MicroBatch
from spot_megatron.train.optim import Policy
from spot_megatron.train.reference import cached_reference, forward_pass, reference_sums, reward_means
from spot_megatron.train.run_folder import say
from spot_megatron.train.step import ObjectiveLoss
from spot_megatron.weights.checkpoint import check_checksums, load_model

if TYPE_CHECKING:
    from spot_megatron.data.dataset import PreferencePairDataset
    from spot_megatron.train.metrics import MetricsLog
    from spot_megatron.train.setup import Setup


@dataclass(frozen=True)
class HeldOut:
    """A set that is measured: the run with that set as its data, how it is packed, and its reference values."""

    job: Setup
    plan: list[list[Bins]]  # lists of micro-batches, by data-parallel rank
    reference: np.ndarray  # [N, 2] log-probability sums (chosen, rejected), nats

    @classmethod
    def of(cls, job: Setup, dataset: PreferencePairDataset, chunks: Sequence[PairGPT], name: str) -> HeldOut:
        """Runs the reference pass over `dataset`, or reads its cache. Collective."""
        job = replace(job, dataset=dataset)
        batches = one_pass(job.recipe, dataset, job.hf, job.topology)
        plan = [batches.plan(step) for step in range(batches.num_steps)]
        return cls(job, plan, cached_reference(job, chunks, f"reference pass of the {name}"))

    def pair_means(self, chunks: Sequence[PairGPT], shift: float, step: int) -> dict[str, Any]:
        """Means over the pairs of loss and rewards, under the reward shift `shift`. Collective."""
        fixed = RewardShift("none", 0.0, value=shift)  # whatever the kind, this pass does not move it
        loss = ObjectiveLoss(self.job.recipe.objective, fixed, self.reference)

        def values_of(batch: MicroBatch, logp_S: Tensor) -> Tensor:
            _, _, report = loss(batch, logp_S)
            return torch.cat([report["losses"][:, None], report["rewards"]], dim=1)

        batches = map(self.job.lay_out, self.plan)
        values = forward_pass(chunks, (len(self.reference), 3), batches, self.job.topology, values_of)
        self._check(values, step)
        return {"loss": float(values[:, 0].mean()), **reward_means(values[:, 1:]), "pairs": len(values)}

    def probe_means(self, chunks: Sequence[PairGPT], step: int) -> dict[str, float]:
        """Mean log-probability of a token of the texts, in nats, and its change from the reference. Collective."""
        batches = map(self.job.lay_out, self.plan)
        logp = reference_sums(chunks, len(self.reference), batches, self.job.topology)
        self._check(logp, step)
        num_tokens = sum(len(pair.chosen_ids) for pair in self.job.dataset.pairs)
        mean, reference = float(logp[:, 0].sum()) / num_tokens, float(self.reference[:, 0].sum()) / num_tokens
        return {"probe_logp": mean, "probe_change": mean - reference}

    def _check(self, values: np.ndarray, step: int) -> None:
        check_forward([pair.id for pair in self.job.dataset.pairs], values, f"validation after step {step}")


@dataclass
class Best:
    """The best validation so far by validation.keep_best, and how many came after it."""

    key: str | None
    patience: int | None
    data: str  # digest of what is measured: other data have another best
    step: int | None = None
    value: float | None = None
    num_since: int = 0

    def look(self, row: Mapping[str, Any]) -> bool:
        """True if the validation `row` is the best one. That of step 0 has no checkpoint and does not take part."""
        if self.key is None or row["step"] == 0:
            return False
        value = float(row["probe_change" if self.key == "probe" else self.key])
        sign = -1 if self.key == "loss" else 1
        if self.value is not None and sign * value <= sign * self.value:
            self.num_since += 1
            return False
        self.step, self.value, self.num_since = row["step"], value, 0
        return True

    @property
    def out_of_patience(self) -> bool:
        return self.patience is not None and self.num_since >= self.patience

    def state_dict(self) -> dict[str, Any]:
        names = ("key", "data", "step", "value", "num_since")
        return {name: getattr(self, name) for name in names} if self.key is not None else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> bool:
        """Returns False, without a change, if `state` is of another key or of other data."""
        if (state.get("key"), state.get("data")) != (self.key, self.data):
            return False
        self.step, self.value, self.num_since = state["step"], state["value"], state["num_since"]
        return True


class Validation:
    """A run's validations. Without held-out pairs and probe every method does nothing."""

    def __init__(self, job: Setup, chunks: Sequence[PairGPT]) -> None:
        """Runs the reference passes of the held-out pairs and of the probe. Collective."""
        self.job, options = job, job.recipe.validation
        self.held_out = self.probe = None
        digests = []
        if job.held_out is not None:
            self.held_out = HeldOut.of(job, job.held_out, chunks, "held-out pairs")
            digests.append(job.held_out.fingerprint())
        if job.probe is not None:  # one sequence a text: the shared layout without a rejected side
            one_side = replace(job, recipe=with_layout(job.recipe, "shared"))
            self.probe = HeldOut.of(one_side, job.probe, chunks, "probe")
            digests.append(job.probe.fingerprint())
        data = hashlib.sha256(" ".join(digests).encode()).hexdigest()
        self.best = Best(options.keep_best, options.patience, data)
        self.num_steps = job.sampler.num_steps
        self.in_model = 0  # the step whose weights the model holds

    @property
    def is_over(self) -> bool:
        """Whether the run ends because of validation.patience."""
        return self.best.out_of_patience

    def resume(self, step: int) -> None:
        """Restores the best validation of the checkpoint after `step` updates that the run continues from. Collective.

        Raises:
            CheckpointError: the checkpoint of that validation is missing.
        """
        found, best = self.job.checkpoints.found, self.best
        self.in_model = step
        if found.newest is None or best.key is None:
            return
        if not best.load_state_dict(found.state.get("best", {})):
            say(
                self.job.topology, f"{found.newest} has no best validation by these data and {best.key}: it starts anew"
            )
        elif best.step is not None:
            self._best_checkpoint()

    def is_due(self, step: int) -> bool:
        """Whether there is a validation after `step` updates."""
        if self.held_out is None and self.probe is None:
            return False
        return step % self.job.recipe.validation.every_steps == 0 or step == self.num_steps

    def run(self, step: int, policy: Policy, shift: RewardShift, log: MetricsLog) -> bool:
        """Validates after `step` updates if it is due. True if it is the best so far by keep_best. Collective."""
        if not self.is_due(step):
            return False
        self.job.heartbeat.beat(step, "validating")
        row, self.in_model = self.measure(step, policy, shift.value), step
        is_best = self.best.look(row)
        log.write_validation(row, is_best)
        if self.best.out_of_patience:
            say(
                self.job.topology,
                f"validation.patience: {self.best.num_since} validations without a better {self.best.key} than step "
                f"{self.best.step}'s {self.best.value:.4f}; the run ends after step {step}",
            )
        return is_best

    def measure(self, step: int, policy: Policy, shift: float) -> dict[str, Any]:
        """A row of validation.jsonl. Collective.

        Raises:
            TrainingError: a weight or a log-probability is not finite.
        """
        policy.gather_weights()
        check_weights(policy.bare, step)
        device = self.job.topology.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            row: dict[str, Any] = {"step": step}
            if self.held_out is not None:
                row |= self.held_out.pair_means(policy.bare, shift, step)
            if self.probe is not None:
                row |= self.probe.probe_means(policy.bare, step)
        return row

    def load_best(self, policy: Policy) -> None:
        """With keep_best: fills the model with the weights of the best step. Collective.

        Raises:
            CheckpointError: the checkpoint of the best step is missing or damaged.
        """
        best = self.best
        if best.step is None:
            return
        say(self.job.topology, f"validation.keep_best: step {best.step} has the best {best.key}, {best.value:.4f}")
        if best.step != self.in_model:
            checkpoint = self._best_checkpoint()
            check_checksums(checkpoint)
            load_model(policy.bare, checkpoint / "model")

    def _best_checkpoint(self) -> Path:
        assert self.best.step is not None
        path = self.job.checkpoints.path(self.best.step)
        if not path.is_dir():
            raise CheckpointError(
                f"{path} is missing, the checkpoint with the best validation; restore it, or set "
                "validation.keep_best=null to export the last step"
            )
        return path


def with_layout(recipe: Recipe, layout: str) -> Recipe:
    """The recipe with another data.layout."""
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"layout": layout})})

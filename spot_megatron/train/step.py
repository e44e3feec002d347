"""One optimizer step's loss and gradients over packed pairs, through Megatron's pipeline schedules.

The scaling, once (tests/train/test_scaling.py): the loss of a micro-batch is the *sum* over its pairs, with its number
of pairs as Megatron's `num_tokens`. With `calculate_per_token_loss` Megatron adds these up over micro-batches and
data-parallel ranks and divides the summed gradient by the summed count once, so a step's loss is

    sum over the global batch's pairs / number of pairs in the global batch

however the pairs were packed, dealt or pipelined.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from torch import Tensor

from spot_megatron.data.pack import Pack
from spot_megatron.objective.losses import pair_losses, pair_rewards, sft
from spot_megatron.objective.reward import score_pairs
from spot_megatron.objective.shift import RewardShift
from spot_megatron.parallel.device import to_device
from spot_megatron.parallel.groups import Topology
from spot_megatron.parallel.pipeline import known_shapes
from spot_megatron.recipe import Objective
from spot_megatron.train.microbatch import MicroBatch, microbatch, over_context_ranks

LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Any]]]


@dataclass(frozen=True)
class StepSums:
    """A global batch's sums over pairs and the norm of its gradient, equal on every rank.

    `worst_drift` is a maximum over the pairs' sides: |log pi - log pi_ref| in nats, divided by the square root of the
    side's number of tokens.
    """

    loss: float
    reward_chosen: float
    reward_rejected: float
    num_accurate: float
    num_pairs: int
    num_tokens: int
    num_unique_tokens: int
    num_scored: int  # response tokens of both sides
    reference_nll: float  # mean token negative log-likelihood of the chosen side under the reference, nats
    grad_norm: float  # before clipping
    worst_drift: float

    @property
    def mean_reward(self) -> float:
        """(mean r+ + mean r-) / 2: the reward shift is its moving average."""
        return (self.reward_chosen + self.reward_rejected) / (2 * self.num_pairs)


def forward_backward(
    chunks: Sequence[torch.nn.Module],
    packs: Sequence[Pack],
    loss_of: Callable[[MicroBatch, Tensor], tuple[Tensor, Tensor, dict[str, Any]]],
    topology: Topology,
    forward_only: bool = False,
) -> list[dict[str, Any]]:
    """Runs every pack through the pipeline; gradients are left in the model's buffers, scaled as the module says.

    Args:
        loss_of: on the last stage, (micro-batch, token log-probabilities [S]) -> (loss sum, pair count, report).

    Returns:
        the reports of the micro-batches in order, on the last stage; elsewhere an empty list.
    """

    def forward_step(packs_left: Iterator[Pack], model: torch.nn.Module) -> tuple[Tensor, LossFunction]:
        batch = microbatch(next(packs_left), topology.device, topology.context_rank, topology.context_size)
        output = model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=None,
            packed_seq_params=batch.layout,
        )
        return output, partial(loss_of, batch)

    lengths = [len(pack.input_ids) for pack in packs]
    iterators = [iter(packs) for _ in chunks]
    with known_shapes(get_model_config(chunks[0]), lengths, forward_only):
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=list(chunks) if len(chunks) > 1 else chunks[0],
            num_microbatches=len(packs),
            seq_length=max(lengths),
            micro_batch_size=1,
            forward_only=forward_only,
        )


class ObjectiveLoss:
    """The recipe's objective as a loss of micro-batches. It holds the data that it needs, never the model."""

    def __init__(self, objective: Objective, shift: RewardShift, reference: np.ndarray) -> None:
        """`reference`: [num pairs of the dataset, 2] log-probability sums (chosen, rejected), nats."""
        self.objective = objective
        self.shift = shift
        self.reference = reference

    def __call__(self, batch: MicroBatch, logp_S: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Token log-probabilities [S] of one pack -> (loss sum, number of pairs, report of sums)."""
        # Sums over a response in float64: at -7000 nats float32 has steps of 5e-4, and a sum takes a thousand of them.
        logp_S = logp_S.double()
        pack, objective = batch.pack, self.objective

        def column(array: np.ndarray) -> Tensor:
            return to_device(array.astype(np.float64), logp_S.device)

        reference_B2 = column(self.reference[pack.pair_index])
        num_chosen, num_rejected = column(pack.num_chosen), column(pack.num_rejected)
        scores = score_pairs(
            logp_S, batch.layout.head_segment, reference_B2[:, 0], reference_B2[:, 1], num_chosen, over_context_ranks
        )
        rewards = pair_rewards(scores, objective.beta)
        chosen, rejected = (reward.detach() for reward in rewards)
        if self.shift.moves_inside_batch:
            self._move_shift(chosen, rejected)
        losses = pair_losses(
            objective.name,
            scores,
            rewards,
            self.shift.value,
            label_smoothing=objective.label_smoothing,
            sft_weight=objective.sft_weight,
        )
        # An empty pack has no pairs; its loss is the empty sum, whose gradient is zero everywhere.
        loss = losses.sum() if len(losses) else logp_S.sum()
        # Every context rank has the whole loss of these pairs; their count is Megatron's divisor, so one rank counts.
        num_counted = len(losses) if mpu.get_context_parallel_rank() == 0 else 0
        drift = torch.cat([chosen.abs() / num_chosen.sqrt(), rejected.abs() / num_rejected.sqrt()]) / objective.beta
        accurate = (chosen > rejected).double()
        reference_nll = sft(scores.reference_chosen, num_chosen).sum()
        report = {
            "losses": losses.detach(),
            "sums": torch.stack([losses.detach().sum(), chosen.sum(), rejected.sum(), accurate.sum(), reference_nll]),
            "rewards": torch.stack([chosen, rejected], dim=1),
            "worst_drift": drift.max() if len(drift) else drift.new_zeros(()),
        }
        return loss, torch.full((), num_counted, dtype=torch.int, device=logp_S.device), report

    def _move_shift(self, chosen: Tensor, rejected: Tensor) -> None:
        """The public reference's order: the micro-batch's own mean, over all data-parallel ranks, enters before use."""
        count = torch.full((), len(chosen), dtype=torch.float64, device=chosen.device)
        sums = torch.stack([(chosen + rejected).sum() / 2, count])
        dist.all_reduce(sums, group=mpu.get_data_parallel_group())
        total, num_pairs = sums.tolist()
        if num_pairs:
            self.shift.update(total / num_pairs)


def reduce_sums(
    reports: list[dict[str, Any]], packs: Sequence[Pack], squared_grad_norm: Tensor, topology: Topology
) -> StepSums:
    """Adds the last stage's reports up over micro-batches and replicas, and `squared_grad_norm` [] over all ranks.

    Two collectives, and one read of the device by the host.
    """
    sums = torch.zeros(10, dtype=torch.float64, device=topology.device)
    worst = torch.zeros(1, dtype=torch.float64, device=topology.device)
    # Tensor and context ranks of a replica have the same sums: one of them contributes.
    if topology.is_last_stage and topology.tensor_rank == topology.context_rank == 0:
        counts = np.array([[len(p.pair_index), p.num_tokens, p.num_unique_tokens, p.num_scored] for p in packs])
        sums[:5] = torch.stack([report["sums"] for report in reports]).sum(dim=0)
        sums[5:9] = to_device(counts.sum(axis=0).astype(np.float64), topology.device)
        worst[0] = torch.stack([report["worst_drift"] for report in reports]).max()
    sums[9] = squared_grad_norm
    dist.all_reduce(sums)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    loss, chosen, rejected, accurate, nll, *counted, squared_norm, drift = torch.cat([sums, worst]).tolist()
    pairs, tokens, unique, scored = map(int, counted)
    norm = math.sqrt(squared_norm)
    return StepSums(loss, chosen, rejected, accurate, pairs, tokens, unique, scored, nll, norm, drift)


def sum_over_replicas(values: Tensor) -> None:
    """In place: the last stage's values summed over data-parallel ranks, on every rank. Other stages bring zeros."""
    dist.all_reduce(values, group=mpu.get_data_parallel_group())
    dist.all_reduce(values, group=mpu.get_pipeline_model_parallel_group())

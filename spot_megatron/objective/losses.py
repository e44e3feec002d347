"""One pure function per objective, each giving the loss of every pair, [B]; a step's loss is their mean over the batch.

`reward_chosen` and `reward_rejected` are implicit rewards r(x, y), beta included. s is the logistic function, d the
reward shift, e the label smoothing. Formulas: Surgical Post-Training, arXiv 2603.01683; DPO, arXiv 2305.18290,
equation 7, and with label smoothing equation 3 of its author's "A note on DPO with noisy preferences"
(https://ericmitchell.ai/cdpo.pdf); DFT, arXiv 2508.05629; the weighted SFT term, RPO, arXiv 2404.19733, equation 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from spot_megatron.objective.reward import PairScores, implicit_reward


def smoothed_log_sigmoid(logit: Tensor, label_smoothing: float) -> Tensor:
    """(1 - e) log s(z) + e log s(-z): the log-likelihood of a positive label that is wrong with probability e."""
    return (1 - label_smoothing) * F.logsigmoid(logit) + label_smoothing * F.logsigmoid(-logit)


def spot_bce(reward_chosen: Tensor, reward_rejected: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-log s(r+) - log s(-r-): SPoT's reward-based binary cross-entropy; e smooths the labels of both terms."""
    chosen = smoothed_log_sigmoid(reward_chosen, label_smoothing)
    return -chosen - smoothed_log_sigmoid(-reward_rejected, label_smoothing)


def spot_bco(reward_chosen: Tensor, reward_rejected: Tensor, shift: Tensor) -> Tensor:
    """-log s(r+ - d) - log s(-(r- - d)): binary classifier optimisation; d is a constant in the gradient."""
    return -F.logsigmoid(reward_chosen - shift) - F.logsigmoid(-(reward_rejected - shift))


def dpo(reward_chosen: Tensor, reward_rejected: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-log s(r+ - r-); with e the conservative DPO, -(1 - e) log s(r+ - r-) - e log s(r- - r+)."""
    return -smoothed_log_sigmoid(reward_chosen - reward_rejected, label_smoothing)


def reward_sft(reward_chosen: Tensor) -> Tensor:
    """-log s(r+): the 'elastic tether', whose pull on log pi(y+|x) fades as -beta (1 - s(r+))."""
    return -F.logsigmoid(reward_chosen)


def sft(policy_chosen: Tensor, num_chosen: Tensor) -> Tensor:
    """-log pi(y+|x) / |y+|: mean token negative log-likelihood of the chosen side."""
    return -policy_chosen / num_chosen


def dft(confidence_chosen: Tensor, num_chosen: Tensor) -> Tensor:
    """-sum_t sg[p_t] log p_t / |y+|: SFT weighted by the token's own probability, a constant in the gradient."""
    return -confidence_chosen / num_chosen


def pair_rewards(scores: PairScores, beta: float) -> tuple[Tensor, Tensor]:
    """([B], [B]) rewards of the chosen and the rejected side."""
    chosen = implicit_reward(scores.policy_chosen, scores.reference_chosen, beta)
    rejected = implicit_reward(scores.policy_rejected, scores.reference_rejected, beta)
    return chosen, rejected


def pair_losses(
    name: str,
    scores: PairScores,
    rewards: tuple[Tensor, Tensor],
    shift: float,
    *,
    label_smoothing: float = 0.0,
    sft_weight: float = 0.0,
) -> Tensor:
    """Losses of the objective that a recipe calls `name`, plus sft_weight times the loss of `sft`.

    Args:
        rewards: [B] of the chosen and [B] of the rejected side, from pair_rewards.
        shift: the reward shift d; only spot_bco uses it.
        label_smoothing: in [0, 0.5); only dpo and spot_bce use it.
        sft_weight: 0 leaves the term out.

    Returns:
        [B]
    """
    chosen, rejected = rewards
    table: dict[str, Callable[[], Tensor]] = {
        "spot_bce": lambda: spot_bce(chosen, rejected, label_smoothing),
        "spot_bco": lambda: spot_bco(chosen, rejected, chosen.new_full((), shift)),
        "dpo": lambda: dpo(chosen, rejected, label_smoothing),
        "reward_sft": lambda: reward_sft(chosen),
        "sft": lambda: sft(scores.policy_chosen, scores.num_chosen),
        "dft": lambda: dft(scores.confidence_chosen, scores.num_chosen),
    }
    losses = table[name]()
    return losses + sft_weight * sft(scores.policy_chosen, scores.num_chosen) if sft_weight else losses

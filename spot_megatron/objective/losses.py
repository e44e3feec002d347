"""One pure function per objective, each giving the loss of every pair, [B]; a step's loss is their mean over the batch.

`reward_chosen` and `reward_rejected` are implicit rewards r(x, y), beta included. s is the logistic function, d the
reward shift. Formulas: Surgical Post-Training, arXiv 2603.01683; DPO, arXiv 2305.18290, equation 7; DFT, arXiv
2508.05629.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from spot_megatron.objective.reward import PairScores, implicit_reward


def spot_bce(reward_chosen: Tensor, reward_rejected: Tensor) -> Tensor:
    """-log s(r+) - log s(-r-): SPoT's reward-based binary cross-entropy."""
    return -F.logsigmoid(reward_chosen) - F.logsigmoid(-reward_rejected)


def spot_bco(reward_chosen: Tensor, reward_rejected: Tensor, shift: Tensor) -> Tensor:
    """-log s(r+ - d) - log s(-(r- - d)): binary classifier optimisation; d is a constant in the gradient."""
    return -F.logsigmoid(reward_chosen - shift) - F.logsigmoid(-(reward_rejected - shift))


def dpo(reward_chosen: Tensor, reward_rejected: Tensor) -> Tensor:
    """-log s(r+ - r-)."""
    return -F.logsigmoid(reward_chosen - reward_rejected)


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


def pair_losses(name: str, scores: PairScores, rewards: tuple[Tensor, Tensor], shift: float) -> Tensor:
    """Losses of the objective that a recipe calls `name`.

    Args:
        rewards: [B] of the chosen and [B] of the rejected side, from pair_rewards.
        shift: the reward shift d; only spot_bco uses it.

    Returns:
        [B]
    """
    chosen, rejected = rewards
    table: dict[str, Callable[[], Tensor]] = {
        "spot_bce": lambda: spot_bce(chosen, rejected),
        "spot_bco": lambda: spot_bco(chosen, rejected, chosen.new_full((), shift)),
        "dpo": lambda: dpo(chosen, rejected),
        "reward_sft": lambda: reward_sft(chosen),
        "sft": lambda: sft(scores.policy_chosen, scores.num_chosen),
        "dft": lambda: dft(scores.confidence_chosen, scores.num_chosen),
    }
    return table[name]()

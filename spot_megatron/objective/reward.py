"""Log-probabilities of a pair's sides, and the implicit reward.

Shapes: B pairs, S scored token positions of their pack.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from spot_megatron.objective.segments import CHOSEN, NUM_SEGMENTS, REJECTED, SHARED


@dataclass(frozen=True)
class PairScores:
    """Inputs of an objective. Log-probabilities are sums over response tokens, in nats, float32 or better.

    `confidence_chosen` is sum_t sg[p_t] log p_t over the chosen side, p_t the token's probability and sg[.] a constant
    in the gradient.
    """

    policy_chosen: Tensor  # [B]
    policy_rejected: Tensor  # [B]
    reference_chosen: Tensor  # [B]
    reference_rejected: Tensor  # [B]
    num_chosen: Tensor  # [B] tokens
    confidence_chosen: Tensor  # [B]


Combine = Callable[[Tensor], Tensor]  # sums over ranks that hold different tokens of the same pairs


def segment_sums(
    values_S: Tensor, segment_S: Tensor, num_pairs: int, combine: Combine | None = None
) -> tuple[Tensor, Tensor]:
    """Sums of per-token values over the chosen and the rejected side.

    `segment_S` is NUM_SEGMENTS * pair + SHARED, CHOSEN or REJECTED; a shared token counts for both sides. `combine`
    adds the sums of other ranks; its gradient must be the identity, since every rank computes the whole loss.

    Returns:
        ([B], [B]) chosen and rejected.
    """
    sums = values_S.new_zeros(num_pairs * NUM_SEGMENTS).index_add(0, segment_S, values_S).view(num_pairs, NUM_SEGMENTS)
    sums_B3 = combine(sums) if combine else sums
    return sums_B3[:, SHARED] + sums_B3[:, CHOSEN], sums_B3[:, SHARED] + sums_B3[:, REJECTED]


def implicit_reward(policy_B: Tensor, reference_B: Tensor, beta: float) -> Tensor:
    """r(x, y) = beta [log pi_theta(y|x) - log pi_ref(y|x)], the implicit reward of arXiv 2603.01683, section 3."""
    return beta * (policy_B - reference_B)


def score_pairs(
    logp_S: Tensor,
    segment_S: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    num_chosen: Tensor,
    combine: Combine | None = None,
) -> PairScores:
    """Sums the token log-probabilities [S] of a pack by pair and side; `combine` as for segment_sums."""
    num_pairs = reference_chosen.shape[0]
    policy_chosen, policy_rejected = segment_sums(logp_S, segment_S, num_pairs, combine)
    confidence_chosen, _ = segment_sums(torch.exp(logp_S.detach()) * logp_S, segment_S, num_pairs, combine)
    return PairScores(
        policy_chosen, policy_rejected, reference_chosen, reference_rejected, num_chosen, confidence_chosen
    )

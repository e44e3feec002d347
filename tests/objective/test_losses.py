"""Every objective against its formula written out in float64 numpy, its gradient, and its value at the reference."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from spot_megatron.objective.losses import pair_losses, pair_rewards
from spot_megatron.objective.reward import PairScores, score_pairs, segment_sums
from spot_megatron.objective.values import VALUE_AT_REFERENCE

BETA, SHIFT = 0.3, 0.17


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def scores(requires_grad=False):
    rng = np.random.default_rng(0)
    policy = [torch.tensor(rng.normal(-30, 9, 6), requires_grad=requires_grad) for _ in range(2)]
    reference = [torch.tensor(rng.normal(-30, 9, 6)) for _ in range(2)]
    num_chosen = torch.tensor(rng.integers(3, 20, 6), dtype=torch.float64)
    return PairScores(*policy, *reference, num_chosen, confidence_chosen=policy[0] * 0.4)


def expected(name, s):
    chosen = BETA * (s.policy_chosen - s.reference_chosen).detach().numpy()
    rejected = BETA * (s.policy_rejected - s.reference_rejected).detach().numpy()
    return {
        "spot_bce": -np.log(sigmoid(chosen)) - np.log(sigmoid(-rejected)),
        "spot_bco": -np.log(sigmoid(chosen - SHIFT)) - np.log(sigmoid(-(rejected - SHIFT))),
        "dpo": -np.log(sigmoid(chosen - rejected)),
        "reward_sft": -np.log(sigmoid(chosen)),
        "sft": -s.policy_chosen.detach().numpy() / s.num_chosen.numpy(),
        "dft": -s.confidence_chosen.detach().numpy() / s.num_chosen.numpy(),
    }[name]


@pytest.mark.parametrize("name", sorted(VALUE_AT_REFERENCE))
def test_loss_is_its_formula(name):
    s = scores()
    np.testing.assert_allclose(
        pair_losses(name, s, pair_rewards(s, BETA), SHIFT).numpy(), expected(name, s), rtol=1e-12
    )


def test_gradients_are_the_papers():
    """d L / d log pi: reward-SFT -beta (1 - s(r)); BCO adds beta s(r- - d) on the rejected side."""
    s = scores(requires_grad=True)
    pair_losses("spot_bco", s, pair_rewards(s, BETA), SHIFT).sum().backward()
    chosen, rejected = (reward.detach().numpy() for reward in pair_rewards(s, BETA))
    np.testing.assert_allclose(s.policy_chosen.grad.numpy(), -BETA * (1 - sigmoid(chosen - SHIFT)), rtol=1e-12)
    np.testing.assert_allclose(s.policy_rejected.grad.numpy(), BETA * sigmoid(rejected - SHIFT), rtol=1e-12)


@pytest.mark.parametrize("name", ["dpo", "spot_bce"])
def test_label_smoothing_is_cross_entropy_with_smoothed_labels(name):
    """Against PyTorch's own cross-entropy with soft targets."""
    s, smoothing = scores(), 0.1
    chosen, rejected = pair_rewards(s, BETA)
    bce = partial(F.binary_cross_entropy_with_logits, reduction="none")
    positive, negative = torch.full_like(chosen, 1 - smoothing), torch.full_like(chosen, smoothing)
    want = bce(chosen - rejected, positive) if name == "dpo" else bce(chosen, positive) + bce(rejected, negative)
    losses = pair_losses(name, s, (chosen, rejected), SHIFT, label_smoothing=smoothing)
    torch.testing.assert_close(losses, want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", sorted(VALUE_AT_REFERENCE))
def test_sft_weight_adds_the_token_nll(name):
    s = scores()
    nll = -s.policy_chosen.numpy() / s.num_chosen.numpy()
    losses = pair_losses(name, s, pair_rewards(s, BETA), SHIFT, sft_weight=0.7)
    np.testing.assert_allclose(losses.numpy(), expected(name, s) + 0.7 * nll, rtol=1e-12)


@pytest.mark.parametrize("name", sorted(VALUE_AT_REFERENCE))
def test_gradients_of_every_term(name):
    """Numerical differentiation in fp64, of the function of the token log-probabilities. DFT has constants in it."""
    smoothing = 0.1 if name in ("dpo", "spot_bce") else 0.0
    logp = -3 * torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = torch.exp(logp)  # of dft, held constant
    segment = torch.tensor([0, 1, 1, 2, 3, 5])
    reference, num_chosen = torch.tensor([-4.0, -2.0]).double(), torch.tensor([3.0, 1.0]).double()

    def loss(logp: torch.Tensor) -> torch.Tensor:
        s = score_pairs(logp, segment, reference, reference - 1, num_chosen)
        s = dataclasses.replace(s, confidence_chosen=segment_sums(weights * logp, segment, 2)[0])
        return pair_losses(name, s, pair_rewards(s, BETA), SHIFT, label_smoothing=smoothing, sft_weight=0.7)

    assert torch.autograd.gradcheck(loss, logp.requires_grad_())


@pytest.mark.parametrize("name", [name for name, value in VALUE_AT_REFERENCE.items() if value is not None])
def test_value_at_the_reference(name):
    same = torch.full((4,), -12.5, dtype=torch.float64)
    at_reference = PairScores(same, same, same, same, torch.ones(4), same)
    smoothing = 0.1 if name in ("dpo", "spot_bce") else 0.0
    losses = pair_losses(name, at_reference, pair_rewards(at_reference, BETA), 0.0, label_smoothing=smoothing)
    assert losses.mean().item() == pytest.approx(VALUE_AT_REFERENCE[name][0], rel=1e-12)


def test_extreme_rewards_stay_finite():
    far = torch.tensor([-1e6, 1e6], requires_grad=True)
    zero = torch.zeros(2)
    extreme = PairScores(far, -far, zero, zero, zero + 1, far)
    losses = pair_losses("spot_bce", extreme, pair_rewards(extreme, 1.0), 0.0)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert far.grad.isfinite().all()


def test_shared_tokens_count_for_both_sides():
    logp = torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0])
    segment = torch.tensor([0, 1, 2, 5, 3])  # pair 0: shared, chosen, rejected; pair 1: rejected, shared
    chosen, rejected = segment_sums(logp, segment, 2)
    assert chosen.tolist() == [-3.0, -16.0]
    assert rejected.tolist() == [-5.0, -24.0]


def test_dft_weight_is_constant_in_the_gradient():
    logp = torch.tensor([-0.5, -2.0], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    s = score_pairs(logp, torch.tensor([1, 0]), zero, zero, zero + 2)
    pair_losses("dft", s, pair_rewards(s, BETA), 0.0).sum().backward()
    np.testing.assert_allclose(logp.grad.numpy(), [-math.exp(-0.5) / 2, -math.exp(-2.0) / 2], rtol=1e-12)

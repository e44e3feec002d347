"""Sum, then divide once: the gradient in Megatron's buffers is that of (sum over pairs) / (number of pairs), however
pairs were packed (invariant 3). The same over ranks: test_parity.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spot_megatron.data.pack import build_pack
from spot_megatron.objective.losses import pair_losses, pair_rewards
from spot_megatron.objective.reward import score_pairs
from spot_megatron.objective.shift import RewardShift
from spot_megatron.train.microbatch import microbatch
from spot_megatron.train.optim import make_trainable
from spot_megatron.train.step import ObjectiveLoss, forward_backward, reduce_sums
from tests.support import make_recipe, one_process, random_model, random_pairs

PAIRS = random_pairs(7)
PACKINGS = {
    "one pack": [[0, 1, 2, 3, 4, 5, 6]],
    "uneven packs": [[0], [1, 2, 3, 4], [5, 6]],
    "an empty pack": [[0, 1, 2], [], [3, 4, 5, 6]],
    "one pair each": [[0], [1], [2], [3], [4], [5], [6]],
}


def packs_of(packing):
    return [build_pack([PAIRS[i] for i in members], members, "shared", 4, 0) for members in packing]


def reference_of(model):
    """Something that the policy is not, so that rewards and their gradients differ from pair to pair."""
    return np.random.default_rng(0).normal(-60, 4, (len(PAIRS), 2))


@pytest.mark.parametrize("objective", ["spot_bco", "dpo", "sft", "dft"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_gradient_is_the_mean_over_pairs(tmp_path, objective, packing):
    recipe = make_recipe(tmp_path, objective={"name": objective, "beta": 0.2, "shift": {"kind": "none"}})
    if objective == "spot_bco":
        recipe = make_recipe(tmp_path, objective={"name": objective, "beta": 0.2})
    with one_process(recipe) as topology:
        (model,) = random_model(recipe)
        reference = reference_of(model)
        shift = RewardShift(recipe.objective.shift.kind, 0.9, value=0.3)
        expected_loss, expected = plain_mean(model, recipe, reference, shift.value)

        policy = make_trainable([model], recipe)
        policy.zero_grad()
        packs = packs_of(PACKINGS[packing])
        reports = forward_backward(policy.wrapped, packs, ObjectiveLoss(recipe.objective, shift, reference), topology)
        sums = reduce_sums(reports, packs, policy.squared_grad_norm(), topology)
        assert sums.num_pairs == len(PAIRS)
        assert sums.loss / sums.num_pairs == pytest.approx(expected_loss, rel=1e-5)
        for name, parameter in model.named_parameters():
            error = (parameter.main_grad - expected[name]).abs().max()
            assert error <= 2e-5 * expected[name].abs().max(), name


def plain_mean(model, recipe, reference, shift):
    """The loss and its gradients by plain autograd: every pair alone, mean over pairs."""
    model.zero_grad()
    losses = []
    for index in range(len(PAIRS)):
        (pack,) = packs_of([[index]])
        batch = microbatch(pack, torch.device("cpu"))
        logp = model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=None,
            packed_seq_params=batch.layout,
        )
        chosen, rejected = torch.tensor(reference[[index]], dtype=torch.float32).unbind(dim=1)
        scores = score_pairs(logp, batch.layout.head_segment, chosen, rejected, torch.tensor(pack.num_chosen))
        losses.append(pair_losses(recipe.objective.name, scores, pair_rewards(scores, recipe.objective.beta), shift))
    mean = torch.cat(losses).mean()
    mean.backward()
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return mean.item(), grads

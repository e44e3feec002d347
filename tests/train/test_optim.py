"""The learning rate by hand, and which parameters decay."""

from __future__ import annotations

import pytest

from spot_megatron.recipe import Optim
from spot_megatron.train.optim import learning_rate, make_trainable
from tests.support import make_recipe, one_process, random_model


def rates(num_steps, **changes):
    optim = Optim(lr=1.0, **changes)
    return [learning_rate(optim, step, num_steps) for step in range(num_steps)]


def test_warm_up_starts_above_zero_and_ends_at_the_peak():
    assert rates(100, warmup_fraction=0.05)[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates(100, warmup_fraction=0.05)[5] < 1.0


def test_no_warm_up_starts_at_the_peak():
    assert rates(10, warmup_fraction=0.0)[0] == 1.0


def test_cosine_passes_its_middle_and_never_rests_at_zero():
    falling = rates(11, warmup_fraction=0.0)
    assert falling == sorted(set(falling), reverse=True)
    assert falling[-1] > 0
    assert rates(10, warmup_fraction=0.0)[5] == pytest.approx(0.5)


def test_linear_and_constant():
    assert rates(4, schedule="linear", warmup_fraction=0.0, min_lr=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4])
    assert rates(4, schedule="constant", warmup_fraction=0.0) == [1.0] * 4


def test_one_step_runs_at_the_peak():
    assert rates(1) == [1.0]


def test_matrices_decay_and_norms_do_not(tmp_path):
    recipe = make_recipe(tmp_path, optim={"lr": 0.5, "weight_decay": 0.1})
    with one_process(recipe):
        (model,) = random_model(recipe)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        policy = make_trainable([model], recipe)
        policy.zero_grad()  # no gradient: only decay can move a weight
        assert policy.squared_grad_norm().item() == 0.0
        policy.update(0.5, 0.0)
        for name, parameter in model.named_parameters():
            factor = 1.0 if parameter.dim() == 1 else 1 - 0.5 * 0.1
            assert (parameter - factor * before[name]).abs().max() < 1e-6, name

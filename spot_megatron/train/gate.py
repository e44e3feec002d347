"""The step-0 gate: before the first update the policy is its own reference, so all rewards are 0 and the loss is known.

The reference's log-probabilities come from a cache, or from another packing of the same pairs. Rounding makes them
differ from the first step's. Its errors are independent from token to token, so a sum over n tokens is off by about
sqrt(n) times one token's error; a fault (a shifted mask or position, another model's cache) adds up in proportion to n,
or is many times larger at once. Three bounds, all in terms of NOISE, one token's standard error:

    each side         |log pi - log pi_ref|               <= 6 NOISE sqrt(tokens of the side)
    the whole batch   |sum of (log pi - log pi_ref)|      <= 6 NOISE sqrt(tokens of all sides)
    the loss          |loss - value at the reference|     <= its response to such errors, see _loss_bound
"""

from __future__ import annotations

import math

from spot_megatron.errors import CheckpointError
from spot_megatron.objective.values import VALUE_AT_REFERENCE
from spot_megatron.recipe import Objective, Precision, Recipe
from spot_megatron.train.step import StepSums

SIGMAS = 6.0
NOISE = {"fp32": 1e-4, "bf16": 0.02, "fp8": 0.1}  # nats, standard error of a token's log-probability


def noise(precision: Precision) -> float:
    """Nats by which a token's log-probability may differ between two packings: one standard error."""
    return NOISE["fp8" if precision.fp8 != "none" else precision.dtype]


def check_step_zero(sums: StepSums, recipe: Recipe) -> None:
    """Compares the sums of the first step, computed before its update, with a policy that equals its reference.

    Raises:
        CheckpointError: a bound of the module is exceeded; the message gives all three values.
    """
    bound = SIGMAS * noise(recipe.precision)
    beta = recipe.objective.beta
    total = abs(sums.reward_chosen + sums.reward_rejected) / beta
    total_bound = bound * math.sqrt(sums.num_scored)
    found = [
        f"largest difference of a response {sums.worst_drift:.2e} nats x sqrt(tokens) (allowed {bound:.2e})",
        f"sum over the batch {total:.2e} nats (allowed {total_bound:.2e})",
    ]
    passed = sums.worst_drift <= bound and total <= total_bound
    if known := _loss_at_reference(sums, recipe.objective):
        loss = sums.loss / sums.num_pairs
        loss_bound = _loss_bound(sums, recipe.objective, noise(recipe.precision))
        found.append(f"loss {loss:.6f} (expected {known[1]} = {known[0]:.6f}, allowed +-{loss_bound:.1e})")
        passed = passed and abs(loss - known[0]) <= loss_bound
    if not passed:
        raise CheckpointError(
            f"step-0 gate: before any update the policy differs from its own reference: {'; '.join(found)}. Nothing "
            "was updated. Delete the folder reference_cache beside the run and start again; if it fails again, train "
            "with all parallel sizes 1 and report the difference"
        )


def _loss_at_reference(sums: StepSums, objective: Objective) -> tuple[float, str] | None:
    """The mean loss of a policy that equals its reference, and its formula; None if the sums do not determine it."""
    if not (known := VALUE_AT_REFERENCE[objective.name]) or not objective.sft_weight:
        return known
    nll = sums.reference_nll / sums.num_pairs
    return known[0] + objective.sft_weight * nll, f"{known[1]} + {objective.sft_weight:g} x reference NLL {nll:.6f}"


def _loss_bound(sums: StepSums, objective: Objective, token_noise: float) -> float:
    """By how much rounding may move the mean loss.

    -log s(r) is ln 2 - r / 2 + r^2 / 8 about 0. The first-order errors of a batch's sides are independent; those of
    second order add up, to beta^2 noise^2 / 8 a token in the mean, of which four times as much is allowed. The mean
    NLL of a chosen side is off by noise / sqrt(its tokens), at most noise.
    """
    first = SIGMAS * objective.beta / 2 * token_noise * math.sqrt(sums.num_scored)
    second = 4 * (objective.beta * token_noise) ** 2 / 8 * sums.num_scored
    sft = SIGMAS * objective.sft_weight * token_noise * math.sqrt(sums.num_pairs)
    return (first + second + sft) / sums.num_pairs + 1e-6

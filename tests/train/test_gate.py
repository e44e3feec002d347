"""The step-0 gate passes rounding in every precision and no fault: each mutation below is caught (invariant 1)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from spot_megatron.data.pack import Pack, build_pack
from spot_megatron.data.records import read_pairs
from spot_megatron.data.template import load_tokenizer, tokenize_pairs
from spot_megatron.errors import CheckpointError
from spot_megatron.hf.config import read_hf_config
from spot_megatron.hf.folder import HFFolder
from spot_megatron.model.config import transformer_config
from spot_megatron.model.gpt import build_model
from spot_megatron.objective.shift import RewardShift
from spot_megatron.recipe import Precision, load_recipe
from spot_megatron.train.gate import check_step_zero
from spot_megatron.train.reference import reference_sums
from spot_megatron.train.step import ObjectiveLoss, StepSums, forward_backward, reduce_sums
from spot_megatron.weights.load import load_hf
from tests.support import one_process

MODEL = Path("recipes/assets/qwen3_tiny")
COUNT = 32


@pytest.fixture(scope="module")
def pairs():
    records = read_pairs([MODEL / "pairs.jsonl"], "auto")[:COUNT]
    return tokenize_pairs(records, load_tokenizer(MODEL), 256, False).pairs


def recipe_of(dtype: str):
    return load_recipe("qwen3_tiny_spot", [f"precision.dtype={dtype}", "device=cpu"])


def first_step(
    dtype: str, pairs, layout="shared", per_pack=COUNT, change_pack=None, change_model=None, recipe=None
) -> StepSums:
    """The sums of a first step, against a reference that was computed pair by pair, without the change."""
    recipe = recipe or recipe_of(dtype)
    with one_process(recipe) as topology, torch.no_grad():
        hf = read_hf_config(MODEL)
        chunks = build_model(transformer_config(hf, recipe, "cpu"), hf)
        load_hf(chunks, HFFolder(MODEL), hf)

        def packs(size: int) -> list[Pack]:
            groups = np.array_split(np.arange(len(pairs)), len(pairs) // size)
            return [build_pack([pairs[i] for i in group], group.tolist(), layout, 1, 0) for group in groups]

        reference = reference_sums(chunks, len(pairs), [packs(1)], topology)
        if change_model:
            change_model(chunks[0])
        changed = [change_pack(pack) if change_pack else pack for pack in packs(per_pack)]
        loss = ObjectiveLoss(recipe.objective, RewardShift("none", 0.0), reference)
        reports = forward_backward(chunks, changed, loss, topology, forward_only=True)
        return reduce_sums(reports, changed, torch.zeros((), dtype=torch.float64), topology)


def check(sums: StepSums, dtype: str) -> None:
    """The gate of a precision; "fp8" has the widest bounds."""
    recipe = recipe_of("bf16" if dtype == "fp8" else dtype)
    if dtype == "fp8":
        recipe = recipe.model_copy(update={"precision": Precision(dtype="bf16", fp8="tensorwise")})
    check_step_zero(sums, recipe)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("layout", "per_pack"), [("shared", 32), ("shared", 4), ("separate", 8)])
def test_rounding_passes(pairs, dtype, layout, per_pack):
    check(first_step(dtype, pairs, layout, per_pack), dtype)


def predicting_row_before(pack: Pack) -> Pack:
    return dataclasses.replace(pack, head_position=np.maximum(pack.head_position - 1, 0))


def shifted_targets(pack: Pack) -> Pack:
    return dataclasses.replace(pack, head_target=np.roll(pack.head_target, 1))


def suffix_one_position_late(pack: Pack) -> Pack:
    late = np.arange(len(pack.position_ids)) >= pack.num_main
    return dataclasses.replace(pack, position_ids=pack.position_ids + late)


def suffix_from_position_zero(pack: Pack) -> Pack:
    positions = pack.position_ids.copy()
    for start, end in zip(pack.cu_suffix_q[:-1], pack.cu_suffix_q[1:], strict=True):
        positions[pack.num_main + start : pack.num_main + end] = np.arange(end - start)
    return dataclasses.replace(pack, position_ids=positions)


def another_end_token(pack: Pack) -> Pack:
    end = pack.head_target[-1]
    return dataclasses.replace(pack, head_target=np.where(pack.head_target == end, 0, pack.head_target))


def sides_exchanged(pack: Pack) -> Pack:
    segment = pack.head_segment
    return dataclasses.replace(pack, head_segment=segment + np.choose(segment % 3, [0, 1, -1]))


PACK_FAULTS = [
    predicting_row_before,
    shifted_targets,
    suffix_from_position_zero,
    another_end_token,
    sides_exchanged,
]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("fault", PACK_FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_in_a_pack_is_caught(pairs, dtype, fault):
    """FP8's bounds are applied to a fault without FP8's noise, which would only add to it."""
    sums = first_step("fp32" if dtype == "fp8" else dtype, pairs, change_pack=fault)
    with pytest.raises(CheckpointError, match="step-0 gate"):
        check(sums, dtype)


@pytest.mark.parametrize("fault", [suffix_one_position_late], ids=lambda fault: fault.__name__)
def test_a_small_fault_is_caught_in_fp32(pairs, fault):
    """0.4 nats in a response of 46 tokens: in bf16 rounding may be as large."""
    with pytest.raises(CheckpointError, match="step-0 gate"):
        check(first_step("fp32", pairs, change_pack=fault), "fp32")


def noisy(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += (0.1 * parameter.float().std() * noise).to(parameter.dtype)


def one_layer_less(model: torch.nn.Module) -> None:
    model.decoder.layers[1].mlp.linear_fc2.weight.data.zero_()


@pytest.mark.parametrize(
    ("change", "dtype"),
    [(noisy, "fp32"), (noisy, "bf16"), (one_layer_less, "fp32"), (one_layer_less, "bf16"), (one_layer_less, "fp8")],
)
def test_another_models_reference_is_caught(pairs, change, dtype):
    sums = first_step("fp32" if dtype == "fp8" else dtype, pairs, change_model=change)
    with pytest.raises(CheckpointError, match="step-0 gate"):
        check(sums, dtype)


def test_a_wrong_loss_is_caught(pairs):
    """Rewards of 0 and another loss: the objective's code, not the model, is at fault."""
    sums = first_step("fp32", pairs)
    check(sums, "fp32")
    with pytest.raises(CheckpointError, match=r"expected 2 ln 2 = 1.386294"):
        check(dataclasses.replace(sums, loss=sums.loss * 1.01), "fp32")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_gate_knows_the_loss_with_an_sft_term_and_label_smoothing(pairs, dtype):
    overrides = ["objective.name=dpo", "objective.sft_weight=0.5", "objective.label_smoothing=0.1"]
    recipe = load_recipe("qwen3_tiny_spot", [f"precision.dtype={dtype}", "device=cpu", *overrides])
    sums = first_step(dtype, pairs, per_pack=4, recipe=recipe)
    check_step_zero(sums, recipe)
    half = load_recipe("qwen3_tiny_spot", ["device=cpu", *overrides, "objective.sft_weight=0.25"])
    with pytest.raises(CheckpointError, match=r"expected ln 2 \+ 0.25 x reference NLL"):
        check_step_zero(sums, half)

"""Counted work against this project's own model on the CPU, and how time answers to the layout."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from spot_megatron.data.pack import build_pack
from spot_megatron.parallel.split import Split
from spot_megatron.plan.estimate import Planner
from spot_megatron.plan.hardware import THIS_PROJECT, find_gpu, link
from spot_megatron.plan.inputs import PlanInput
from spot_megatron.plan.kernels import head_seconds, matrix_seconds
from spot_megatron.plan.models import PUBLISHED
from spot_megatron.plan.time import StepTime, data_seconds, microbatch_seconds, step_time
from spot_megatron.plan.workload import Assumptions, Load, assumed_pairs
from spot_megatron.recipe import Memory, Parallel, Precision, Recipe
from spot_megatron.train.microbatch import microbatch
from tests.support import SHAPE, make_recipe, one_process, random_model, random_pairs

H800 = find_gpu("h800")
QWEN3_8B = PUBLISHED["Qwen/Qwen3-8B"]

# One FLOP a second, and memory of endless bandwidth: seconds are FLOPs.
COUNTER = dataclasses.replace(H800, fp32=1e-12, gemm_share_bf16=1.0, hbm=1e30)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_flops_of_the_real_model(tmp_path, recompute):
    """Matrix products of one forward and backward pass, LM head included, as PyTorch counts them."""
    recipe = make_recipe(tmp_path, memory={"recompute": recompute})
    pack = build_pack(random_pairs(20), list(range(20)), "shared", 1, 0)
    with one_process(recipe):
        model = random_model(recipe)[0]
        batch = microbatch(pack, torch.device("cpu"))
        with FlopCounterMode(display=False) as counter:
            output = model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                attention_mask=None,
                packed_seq_params=batch.layout,
            )
            output.sum().backward()
    counted = counter.get_flop_counts()["Global"]
    matrices = sum(
        flops for operator, flops in counted.items() if operator in (torch.ops.aten.mm, torch.ops.aten.addmm)
    )
    model = SHAPE
    inputs = PlanInput(model, Split(Parallel(), 1), recipe.precision, recipe.memory, COUNTER)
    layers = model.num_layers * len(pack.input_ids) * matrix_seconds(inputs) * (4 / 3 if recompute == "full" else 1)
    head = head_seconds(inputs, np.array([len(pack.head_position)]), forward_only=False)
    in_place = (
        2 * 2 * model.vocab_size * model.hidden_size * len(pack.head_position)
    )  # of the head's backward; the counter omits addmm_
    assert matrices + in_place == pytest.approx(layers + float(head[0]))


def _job(**changes) -> PlanInput:
    sizes = changes.pop("parallel", {})
    num_gpus = changes.pop("num_gpus", 8)
    split = Split(Parallel(sequence=sizes.get("tensor", 1) > 1, **sizes), num_gpus)
    defaults = {"model": QWEN3_8B, "precision": Precision(), "memory": Memory(), "gpu": H800}
    return PlanInput(split=split, **{**defaults, **changes})


PACK = np.array([8192.0, 8192 * 2000.0, 7000.0])


def _load(*ranks: tuple[float, ...]) -> Load:
    """Micro-batches of the given sizes, in packs, by rank."""
    steps = [np.array([[size * PACK for size in rank] for rank in ranks])]
    return Load(steps, 1, 0.0, 0.0, PACK[None], 8192, 0.0)


def test_parts_add_up_to_the_step():
    step = step_time(_job(), _load((1.0, 1.0), (1.0, 0.5)))
    assert step.total == pytest.approx(sum(getattr(step, field.name) for field in dataclasses.fields(StepTime)))
    assert min(vars(step).values()) >= 0


def test_imbalance_is_what_the_others_wait():
    even, uneven = step_time(_job(), _load((1.0,), (1.0,))), step_time(_job(), _load((1.5,), (0.5,)))
    assert even.imbalance == 0
    work = sum(value.sum() for value in microbatch_seconds(_job(), PACK, QWEN3_8B.num_layers, True).values())
    assert uneven.imbalance == pytest.approx(0.5 * work, rel=0.03)  # a longer pack needs more tiles in the head


def test_recompute_repeats_the_forward_pass_of_layers_but_not_the_head():
    kept = step_time(_job(), _load((1.0,)))
    again = step_time(_job(memory=Memory(recompute="full")), _load((1.0,)))
    forward = (kept.matrices + kept.elementwise) / 3 + kept.attention * 2 / 7
    assert again.recompute == pytest.approx(forward)
    assert again.total - kept.total == pytest.approx(forward, rel=0.01)
    assert again.head == kept.head


def test_tensorwise_fp8_leaves_two_layers_in_bf16():
    bf16, tensorwise, blockwise = (
        matrix_seconds(_job(precision=Precision(fp8=fp8))) for fp8 in ("none", "tensorwise", "blockwise")
    )
    all_fp8 = bf16 * H800.gemm("bf16") / H800.gemm("fp8")
    assert tensorwise == pytest.approx((2 * bf16 + 34 * all_fp8) / 36)
    assert all_fp8 < blockwise < bf16


def test_tensor_parallelism_costs_more_on_h800():
    """H800 has half of H100's NVLink; data parallelism hardly feels it."""
    load = _load((1.0,))
    slow, fast = (step_time(_job(parallel={"tensor": 2}, gpu=find_gpu(name)), load) for name in ("h800", "h100"))
    assert slow.tensor == pytest.approx(fast.tensor * 350 / 160)
    assert slow.matrices == fast.matrices


def test_pipeline_bubble():
    """(p - 1) / v of the longest micro-batch."""
    load = _load((1.0,) * 8)
    plain = step_time(_job(parallel={"pipeline": 4}), load)
    interleaved = step_time(_job(parallel={"pipeline": 4, "virtual_pipeline": 3}), load)
    assert 2.5 < plain.pipeline / interleaved.pipeline < 3.5


def test_small_models_wait_for_the_host():
    assert step_time(_job(model=PUBLISHED["Qwen/Qwen3-0.6B"]), _load((0.05,))).host > 0
    assert step_time(_job(), _load((1.0,))).host == 0


def test_collectives_between_nodes_are_bound_by_their_network_cards():
    inside, across = link(H800, 8, 1), link(H800, 16, 1)
    assert inside.ring(1e9) == pytest.approx(1e9 * 7 / 8 / 160e9)
    assert across.ring(1e9) == pytest.approx(1e9 * 15 / 16 / 160e9)  # 8 cards a node feed one group of 8 ranks a node
    assert link(H800, 16, 8).ring(1e9) == pytest.approx(1e9 * 15 / 16 / 45e9)
    assert link(H800, 16, 1).all_to_all(1e9) > link(H800, 8, 1).all_to_all(1e9)
    assert link(H800, 1, 1).ring(1e9) == link(H800, 1, 1).all_to_all(1e9) == 0


def test_gradients_hide_behind_the_backward_pass():
    gathering = 2 * QWEN3_8B.num_parameters * 7 / 8 / 160e9
    reducing = 2 * gathering
    exposed = 0.1 * gathering  # the rest is hidden behind the next forward pass
    assert data_seconds(_job(), hidden_behind=10.0) == pytest.approx(exposed + 0.1 * reducing, rel=0.01)
    assert data_seconds(_job(), hidden_behind=0.0) == pytest.approx(exposed + reducing, rel=0.01)
    assert data_seconds(_job(num_gpus=1), hidden_behind=0.0) == 0


# Minutes of the paper's run on 8 H800 (4000 pairs, 2 epochs, half of a response shared) between a safe and a tuned rate
# of matrices, counted independently; mean response, precision, recompute.
FLOORS = [
    (1500, "none", "none", 5.9, 4.9),
    (1500, "none", "full", 7.4, 6.1),
    (2000, "none", "none", 7.6, 6.2),
    (2000, "none", "full", 9.6, 7.8),
    (2000, "tensorwise", "none", 5.9, 4.9),
]


@pytest.mark.parametrize(("response", "fp8", "recompute", "safe", "tuned"), FLOORS)
def test_headline_run(response, fp8, recompute, safe, tuned):
    """Training loop and reference pass lie between the two, within 15%, once the activation is fused."""
    recipe = Recipe.model_validate(
        {
            "name": "headline", "output": "out", "model": {"hf": "Qwen/Qwen3-8B"},
            "data": {"pairs": "none", "max_tokens": 16_384, "tokens_per_microbatch": 24_576},
            "precision": {"fp8": fp8}, "memory": {"recompute": recompute},
        }
    )  # fmt: skip
    workload = assumed_pairs(Assumptions(response=response), recipe)
    tuned_software = dataclasses.replace(THIS_PROJECT, fused_swiglu=True)
    estimate = Planner(workload, QWEN3_8B, H800, software=tuned_software).estimate(recipe, 8)
    minutes = (estimate.parts["training"] + estimate.parts["reference pass"]) / 60
    assert 0.85 * tuned < minutes < 1.15 * safe

"""Every kernel, objective, precision, recompute mode and split runs an update on CUDA, and the host waits for the
device where it is meant to, and nowhere else.

Models with experts cannot be shown: sizes of their tensors are counts of tokens that the device computes. Megatron-Core
reads those counts on the host in every layer with experts (MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize).
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.nullcuda.harness import WIDE, one_of, train

# Every update reads loss, rewards and gradient norm, in one read: they say whether there is a step to take.
EVERY_UPDATE = {("train/step.py", "reduce_sums"): 1}

CASES: dict[str, dict] = {
    "bf16": {},
    "fp32": {"precision": {"dtype": "fp32"}},
    "bf16 gradients": {"precision": {"dtype": "bf16", "grad_dtype": "bf16"}},
    "separate": {"data": {"layout": "separate", "tokens_per_microbatch": 128}},
    "recompute full": {"memory": {"recompute": "full"}},
    "recompute selective": {"memory": {"recompute": "selective"}},
    "recompute above": {"memory": {"recompute_above_tokens": 64}},
    "tied": {"shape": dataclasses.replace(WIDE, tied=True)},
    "kernel sdpa": {"model": {"attention": "sdpa"}},
    "kernel torch": {"model": {"attention": "torch"}},
    "deterministic": {"deterministic": True},
    **{
        f"objective {name}": {"objective": {"name": name, "shift": {"kind": "none"}}}
        for name in ("spot_bce", "dpo", "reward_sft", "sft", "dft")
    },
}


def assert_waits(seen, allowed=EVERY_UPDATE) -> None:
    for step, waits in enumerate(seen.waits):
        assert dict(waits) == allowed, f"step {step}"


@pytest.mark.parametrize("case", CASES)
def test_one_rank(tmp_path, case):
    assert_waits(train(tmp_path, **CASES[case]))


def test_flex(tmp_path):
    """Its first steps compile, for packs of under and over 128 positions."""
    sections = {"model": {"attention": "flex"}, "data": {"tokens_per_microbatch": 256}}
    seen = train(tmp_path, steps=6, num_pairs=48, **sections)
    assert dict(seen.waits[-1]) == EVERY_UPDATE


def test_the_references_order_of_the_shift_reads_every_microbatch(tmp_path):
    seen = train(tmp_path, objective={"name": "spot_bco", "shift": {"kind": "cumulative_inclusive"}})
    assert_waits(seen, EVERY_UPDATE | {("train/step.py", "_move_shift"): seen.num_packs})


def test_adamw_is_one_pass_over_memory(tmp_path):
    """Without Transformer Engine: torch's fused AdamW, whose step counters are on the device."""
    inner = [part.optimizer for part in train(tmp_path).policy.parts]
    assert all(isinstance(optimizer, torch.optim.AdamW) for optimizer in inner)
    assert all(group["fused"] for optimizer in inner for group in optimizer.param_groups)
    assert all(state["step"].is_cuda for optimizer in inner for state in optimizer.state.values())


SPLITS = [
    (2, 0, {"tensor": 2}),
    (2, 1, {"tensor": 2, "sequence": True}),
    (2, 1, {"context": 2}),
    (8, 7, {"context": 4}),
    (2, 1, {}),
    (2, 0, {"pipeline": 2}),
    (2, 1, {"pipeline": 2}),
    (2, 0, {"pipeline": 2, "virtual_pipeline": 2}),
    (2, 1, {"pipeline": 2, "virtual_pipeline": 2}),
    (8, 0, {"tensor": 2, "sequence": True, "pipeline": 2, "context": 2}),
    (8, 7, {"tensor": 2, "sequence": True, "pipeline": 2, "context": 2}),
]


@pytest.mark.parametrize(("world", "rank", "sizes"), SPLITS, ids=str)
def test_one_rank_of_a_split(tmp_path, monkeypatch, world, rank, sizes):
    """Pipeline stages learn shapes from the host: no wait for a neighbour's."""
    with one_of(world, rank, monkeypatch):
        assert_waits(train(tmp_path, num_pairs=48, train={"batch_pairs": 16, "max_steps": 3}, parallel=sizes))

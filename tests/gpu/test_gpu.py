"""What only a CUDA machine can show: `make test-gpu`. Each test says what it needs and skips where that is missing."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.attention import kernel_attention
from spot_megatron.data.pack import build_pack
from spot_megatron.model.attention.cuda import NEEDS, PREFERRED, is_available
from spot_megatron.model.attention.pair import pair_seq_params
from spot_megatron.model.config import has_transformer_engine
from spot_megatron.model.logprob import linear_logprob
from spot_megatron.objective.losses import pair_losses, pair_rewards
from spot_megatron.objective.reward import score_pairs
from spot_megatron.parallel.device import to_device
from spot_megatron.train.__main__ import main
from tests.support import SHAPE, make_recipe, random_pairs, save_random_hf, write_token_pairs
from tools.convert.compare_logits import compare_logits

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
needs_engine = pytest.mark.skipif(not has_transformer_engine(), reason="needs Transformer Engine")

COMPACT = [{"master_weights": "remainders"}, {"moments": "bf16"}, {"master_weights": "remainders", "moments": "bf16"}]

# Wide enough for FP8 tiles of 128 and for the tensor cores.
WIDE = dataclasses.replace(
    SHAPE, hidden_size=256, intermediate_size=512, num_heads=8, num_groups=4, head_dim=64, vocab_size=512
)


def train(folder: Path, name: str, steps: int, **sections) -> list[dict]:
    """The metrics of a run of `steps` steps on the GPU (or where `sections` say)."""
    recipe = make_recipe(
        folder,
        **{
            "output": str(folder / name),
            "device": "cuda",
            "deterministic": False,
            "objective": {"name": "spot_bce", "beta": 0.1, "shift": {"kind": "none"}},
            "train": {"batch_pairs": 8, "epochs": 100, "max_steps": steps},
            "optim": {"lr": 1e-4},
            **sections,
        },
    )
    (folder / f"{name}.yaml").write_text(recipe.dump())
    assert main([str(folder / f"{name}.yaml")]) == 0
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def folder(tmp_path) -> Path:
    save_random_hf(tmp_path / "model", WIDE)
    write_token_pairs(tmp_path / "pairs.jsonl", random_pairs(64, vocab_size=512))
    return tmp_path


@pytest.mark.parametrize("kernel", dict.fromkeys([*PREFERRED, *NEEDS]))
def test_every_attention_kernel_agrees_with_sdpa(kernel):
    """On a pack of the pair layout: values and gradients."""
    if not is_available(kernel):
        pytest.skip(f"{kernel} is not installed")
    torch.manual_seed(0)
    pack = build_pack(random_pairs(12, longest=200), range(12), "shared", 128, 0)
    layout = pair_seq_params(pack, torch.device("cuda"))
    shape = {"device": "cuda", "dtype": torch.bfloat16}
    inputs = [torch.randn(len(pack.input_ids), 1, n, 64, **shape).requires_grad_() for n in (8, 4, 4)]
    results = []
    for name in (kernel, "sdpa"):
        out = kernel_attention(name, 64)(*inputs, packed_seq_params=layout)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), atol=5e-2, rtol=5e-2)


def test_the_host_does_not_wait_for_the_device():
    """Moving a pack, both attention calls, the head and the objective: nothing in them synchronises, so that a step's
    kernels can be queued ahead."""
    kernel = next(name for name in PREFERRED if is_available(name))
    if kernel == "sdpa":
        pytest.skip("SDPA takes a call a sequence, and so reads their lengths")
    pairs, device = random_pairs(12, longest=200), torch.device("cuda")
    pack = build_pack(pairs, range(12), "shared", 128, 0)
    shape = {"device": "cuda", "dtype": torch.bfloat16}
    weight = torch.randn(512, 256, **shape).requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layout = pair_seq_params(pack, device)
        inputs = [torch.randn(len(pack.input_ids), 1, n, 64, **shape).requires_grad_() for n in (8, 4, 4)]
        hidden = kernel_attention(kernel, 64)(*inputs, packed_seq_params=layout)[:, 0, :256]
        logp = linear_logprob(hidden.index_select(0, layout.head_position), weight, layout.head_target, vocab_size=512)
        reference = to_device(np.zeros((12, 2)), device)
        scores = score_pairs(
            logp.double(), layout.head_segment, *reference.unbind(1), to_device(pack.num_chosen, device)
        )
        pair_losses("spot_bco", scores, pair_rewards(scores, 0.1), 0.5).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_logits_are_those_of_transformers(folder):
    """The model as it trains on CUDA, in fp32: Transformer Engine's fused layers and rotary embedding included."""
    model, prompts = folder / "model", folder / "pairs.jsonl"
    for stage in compare_logits(model, model, prompts, "cuda"):
        print(stage.name, stage.relative)
        assert stage.relative <= 2e-3, stage.name  # matrix products of TF32 have 10 bits


def test_layouts_agree_in_fp32(folder):
    shared = train(folder, "shared", 3, precision={"dtype": "fp32"})
    separate = train(folder, "separate", 3, precision={"dtype": "fp32"}, data={"layout": "separate"})
    for ours, theirs in zip(shared, separate, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


def test_bf16_starts_at_the_reference(folder):
    rows = train(folder, "bf16", 5, precision={"dtype": "bf16"})
    assert rows[0]["loss"] == pytest.approx(1.3862944, abs=5e-3)


@needs_engine
@pytest.mark.parametrize("memory", COMPACT, ids=str)
def test_compact_states_follow_full_ones(folder, memory):
    """Masters kept as remainders are the same numbers; bf16 moments drift. Printed, and bounded."""
    full = train(folder, "full", 20, precision={"dtype": "bf16"})
    compact = train(folder, "compact", 20, precision={"dtype": "bf16"}, memory=memory)
    drift = max(abs(x["reward_margin"] - y["reward_margin"]) for x, y in zip(full, compact, strict=True))
    reached = abs(full[-1]["reward_margin"])
    print(f"{memory}: margin {compact[-1]['reward_margin']:.4f} of {reached:.4f}, largest drift {drift:.5f}")
    assert drift <= (0.1 if "moments" in memory else 0.01) * reached


@needs_engine
@pytest.mark.parametrize("memory", [{}, *COMPACT], ids=str)
def test_a_run_resumes(folder, memory):
    """Started again from its middle it goes on as it did: to rounding, since kernels may add up in another order."""
    sections = {"precision": {"dtype": "bf16"}, "memory": memory, "checkpoint": {"every_steps": 4, "keep": 9}}
    whole = train(folder, "run", 8, **sections)
    shutil.rmtree(folder / "run" / "checkpoints" / "step_00000008")
    again = train(folder, "run", 8, **sections)
    for ours, theirs in zip(again, whole, strict=True):
        assert ours["reward_margin"] == pytest.approx(theirs["reward_margin"], rel=1e-2, abs=1e-3)


@needs_engine
@pytest.mark.parametrize("fp8", ["tensorwise", "blockwise"])
def test_fp8_rewards_follow_bf16(folder, fp8):
    """Reward drift of FP8 against bf16 over 50 steps; printed, and bounded by a tenth of the margin reached."""
    bf16 = train(folder, "bf16", 50, precision={"dtype": "bf16"})
    quantised = train(folder, fp8, 50, precision={"dtype": "bf16", "fp8": fp8})
    assert quantised[0]["loss"] == pytest.approx(1.3862944, abs=2e-2)
    ours, theirs = ([row["reward_margin"] for row in rows] for rows in (quantised, bf16))
    drift = max(abs(x - y) for x, y in zip(ours, theirs, strict=True))
    print(f"{fp8}: margin {ours[-1]:.4f}, bf16 {theirs[-1]:.4f}, largest drift {drift:.4f}")
    assert drift <= 0.1 * abs(theirs[-1])

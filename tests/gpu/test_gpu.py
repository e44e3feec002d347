"""What a GPU alone can show: `make test-gpu`, within 150 s on an H100. Tests that need more than is there skip.

Signatures, devices, host waits and peak memory are shown without a GPU: tests/nullcuda.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.attention import kernel_attention
from spot_megatron.data.pack import build_pack
from spot_megatron.model.attention.cuda import KERNELS, kernel_problem, pick_kernel
from spot_megatron.model.attention.pair import pair_seq_params
from spot_megatron.model.head_memory import HeadMemory
from spot_megatron.model.logprob import linear_logprob
from spot_megatron.objective.losses import pair_losses, pair_rewards
from spot_megatron.objective.reward import score_pairs
from spot_megatron.parallel.device import to_device
from spot_megatron.parallel.installed import import_problem
from spot_megatron.train.__main__ import main
from tests.processes import ROOT
from tests.support import SHAPE, make_recipe, random_pairs, save_random_hf, write_token_pairs
from tools.convert.compare_logits import compare_logits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(30),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ENGINE = import_problem("transformer_engine.pytorch")
needs_engine = pytest.mark.skipif(ENGINE is not None, reason=f"Transformer Engine {ENGINE}")

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


@pytest.mark.timeout(90)  # FlexAttention compiles
@pytest.mark.parametrize("longest", [24, 200])
@pytest.mark.parametrize("layout", ["shared", "separate"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_attention_kernel_against_fp64(kernel, layout, longest):
    """Values and gradients on packs of under and over 128 positions a sequence: the error of each is bf16's. The
    reference is the CPU's attention, which tests/model/attention compares with the definition."""
    problem = kernel_problem(kernel)
    if problem:
        pytest.skip(problem)
    torch.manual_seed(0)
    pack = build_pack(random_pairs(6, longest=longest), range(6), layout, 8, 0)
    shape = [(len(pack.input_ids), 1, heads, 64) for heads in (8, 4, 4)]
    inputs = [torch.randn(size, device="cuda", dtype=torch.bfloat16).requires_grad_() for size in shape]
    exact = [x.detach().double().cpu().requires_grad_() for x in inputs]
    direction = torch.randn(len(pack.input_ids), 1, 8 * 64, dtype=torch.float64)
    results = []
    for name, tensors in ((kernel, inputs), (None, exact)):
        params = pair_seq_params(pack, tensors[0].device)
        out = kernel_attention(name, 64)(*tensors, packed_seq_params=params)
        grads = torch.autograd.grad((out.double() * direction.to(out.device)).sum(), tensors)
        results.append([out, *grads])
    for ours, theirs in zip(*results, strict=True):
        error = (ours.double().cpu() - theirs).norm() / theirs.norm()
        assert error <= 1e-2, f"{kernel}: relative error {error:.1e}"


def test_the_head_against_fp64():
    """Log-probabilities and both gradients in bf16, with tiles kept and tiles computed again."""
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 256, device="cuda", dtype=torch.bfloat16) for n in (300, 4096))
    target = torch.randint(0, 4000, (300,), device="cuda")
    tensors = [hidden.requires_grad_(), (0.1 * weight).requires_grad_()]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    logp = linear_logprob(*tensors, target, vocab_size=4000, memory=HeadMemory(300 * 512, 2 * 300 * 1024))
    expected = (exact[0] @ exact[1][:4000].T).log_softmax(dim=-1).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(logp.double(), expected, atol=3e-2, rtol=1e-2)
    for ours, theirs in zip(
        torch.autograd.grad(logp.sum(), tensors), torch.autograd.grad(expected.sum(), exact), strict=True
    ):
        assert (ours.double() - theirs).norm() <= 1e-2 * theirs.norm()


@pytest.mark.timeout(60)
def test_the_tiny_recipe_follows_its_cpu_run(tmp_path):
    """The embedded model's first 5 steps in bf16 on the GPU: rewards within bf16's noise of fp32 on the CPU."""
    rows = {}
    for name, options in {"cpu": ["precision.dtype=fp32"], "cuda": ["precision.dtype=bf16"]}.items():
        folder = tmp_path / name
        fixed = [f"device={name}", f"output={folder}", "train.max_steps=5", "evaluation.questions=null"]
        command = [sys.executable, "-m", "spot_megatron.train", "qwen3_tiny_spot", "--set", *fixed, *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        rows[name] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for ours, theirs in zip(rows["cuda"], rows["cpu"], strict=True):
        for key in ("reward_chosen", "reward_rejected"):
            assert ours[key] == pytest.approx(theirs[key], abs=0.05 + 0.05 * abs(theirs[key])), ours["step"]


def test_the_host_does_not_wait_for_the_device():
    """Moving a pack, both attention calls, the head and the objective: nothing in them synchronises, so that a step's
    kernels can be queued ahead."""
    kernel = pick_kernel("auto", torch.bfloat16)
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


@pytest.mark.parametrize(("dtype", "loss", "norm"), [("fp32", 1e-4, 1e-3), ("bf16", 1e-2, 1e-2)])
def test_layouts_agree(folder, dtype, loss, norm):
    """In bf16 on a CPU the losses of 4 steps differ by 3.5e-3, the norms by 0.2%; a wrong label at the first differing
    token changes the gradient by tens of per cent."""
    shared = train(folder, "shared", 3, precision={"dtype": dtype})
    separate = train(folder, "separate", 3, precision={"dtype": dtype}, data={"layout": "separate"})
    for ours, theirs in zip(shared, separate, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=loss)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=norm)


def test_bf16_starts_at_the_reference_and_follows_fp32(folder):
    rows = train(folder, "bf16", 10, precision={"dtype": "bf16"})
    assert rows[0]["loss"] == pytest.approx(1.3862944, abs=5e-3)
    wide = train(folder, "fp32", 10, precision={"dtype": "fp32"})
    drift = max(abs(x["reward_margin"] - y["reward_margin"]) for x, y in zip(rows, wide, strict=True))
    print(f"bf16: margin {rows[-1]['reward_margin']:.4f} of {wide[-1]['reward_margin']:.4f}, largest drift {drift:.5f}")
    assert drift <= 0.1 * abs(wide[-1]["reward_margin"])


def test_deterministic_runs_are_the_same_to_the_bit(folder):
    first, second = (train(folder, name, 4, deterministic=True, precision={"dtype": "bf16"}) for name in ("a", "b"))
    for ours, theirs in zip(first, second, strict=True):
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}


@needs_engine
@pytest.mark.parametrize("memory", COMPACT, ids=str)
def test_compact_states_follow_full_ones(folder, memory):
    """Masters kept as remainders are the same numbers; bf16 moments drift. Printed, and bounded."""
    full = train(folder, "full", 10, precision={"dtype": "bf16"})
    compact = train(folder, "compact", 10, precision={"dtype": "bf16"}, memory=memory)
    drift = max(abs(x["reward_margin"] - y["reward_margin"]) for x, y in zip(full, compact, strict=True))
    reached = abs(full[-1]["reward_margin"])
    print(f"{memory}: margin {compact[-1]['reward_margin']:.4f} of {reached:.4f}, largest drift {drift:.5f}")
    assert drift <= (0.1 if "moments" in memory else 0.01) * reached


@pytest.mark.parametrize("memory", [{}, *(pytest.param(memory, marks=needs_engine) for memory in COMPACT)], ids=str)
def test_a_run_resumes(folder, memory):
    """Started again from its middle it continues as before: to rounding, since kernels may add up in another order."""
    sections = {"precision": {"dtype": "bf16"}, "memory": memory, "checkpoint": {"every_steps": 4, "keep": 9}}
    whole = train(folder, "run", 8, **sections)
    (folder / "run" / "finished.json").unlink()
    again = train(folder, "run", 8, **sections)
    for ours, theirs in zip(again, whole, strict=True):
        assert ours["reward_margin"] == pytest.approx(theirs["reward_margin"], rel=1e-2, abs=1e-3)


@needs_engine
@pytest.mark.parametrize("fp8", ["tensorwise", "blockwise"])
def test_fp8_rewards_follow_bf16(folder, fp8):
    """Reward drift of FP8 against bf16 over 20 steps; printed, and bounded by a tenth of the margin reached."""
    bf16 = train(folder, "bf16", 20, precision={"dtype": "bf16"})
    quantised = train(folder, fp8, 20, precision={"dtype": "bf16", "fp8": fp8})
    assert quantised[0]["loss"] == pytest.approx(1.3862944, abs=2e-2)
    ours, theirs = ([row["reward_margin"] for row in rows] for rows in (quantised, bf16))
    drift = max(abs(x - y) for x, y in zip(ours, theirs, strict=True))
    print(f"{fp8}: margin {ours[-1]:.4f}, bf16 {theirs[-1]:.4f}, largest drift {drift:.4f}")
    assert drift <= 0.1 * abs(theirs[-1])

"""LoRA gives the same numbers, gradients and merged weights however the work is split.

All runs start from one PEFT folder in which no B is zero, so that every A has a gradient from the first step on. With
beta 1 of zero, AdamW's first moment is the step's gradient: it is compared as the checkpoints of step 2 hold it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from spot_megatron.hf.config import read_hf_config
from spot_megatron.recipe import Lora
from spot_megatron.weights.peft import CONFIG, PREFIX, WEIGHTS, adapter_shapes
from tests.support import random_pairs, write_token_pairs
from tests.train.test_parity import BASE, COMPARED, MOE_SPLITS, SPLITS, TOLERANCE, load_all, metrics, train_all
from tests.weights.models import make_folder

pytestmark = pytest.mark.timeout(900)

LORA = Lora(rank=4, alpha=8)
MODELS = {"dense": {"tied": False}, "tied": {"tied": True}, "moe": {"tied": False, "family": "qwen3_moe_some"}}
ALL = SPLITS | MOE_SPLITS
FAST = {"dense": ("full_recompute", "tp2_pp2", "cp2_tp2_sp", "pp2_dp2"), "moe": ("ep2_etp2",)}  # processes: 1, and 4
SLOW = {
    "dense": ("unpacked", "tp2", "tp2_sp", "pp2", "vpp2", "cp2", "dp2", "tp2_sp_pp2", "tp2_dp2",
              "cp2_dp2", "vpp2_dp2", "pp4"),
    "tied": ("pp2", "tp2_pp2"),
    "moe": ("full_recompute", "tp2_sp", "ep2", "ep2_uneven_pairs", "ep2_tp2", "etp2", "etp2_pp2", "ep2_pp2", "ep2_cp2"),
}  # fmt: skip


def make_adapter(folder: Path, model: Path, lora: Lora = LORA, scale: float = 0.1) -> Path:
    """A PEFT folder of random adapters over `model`."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(3)
    shapes = adapter_shapes(lora, read_hf_config(model))
    tensors = {name: scale * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": lora.rank, "lora_alpha": lora.alpha}))
    return folder


def train(folder: Path, splits: dict[str, tuple[str, ...]]) -> dict[str, Path]:
    """The run folders of every split of every model, and of one rank."""
    write_token_pairs(folder / "pairs.jsonl", random_pairs(22))
    jobs = {}
    for model, names in splits.items():
        make_folder(folder / model, **MODELS[model])
        adapter = make_adapter(folder / f"{model}_adapter", folder / model)
        for name in ("one_rank", *names):
            num_processes, changes = ALL[name]
            lora = {"rank": LORA.rank, "alpha": LORA.alpha, "adapter": str(adapter)}
            optim = {**BASE["optim"], "betas": [0.0, 0.95], "clip_grad_norm": 0.0}
            changes = {
                **changes,
                "lora": lora,
                "optim": optim,
                "export": {"adapter": True},
                "checkpoint": {"every_steps": 2},
            }
            jobs[f"{model}-{name}"] = (model, num_processes, changes)
    return train_all(folder, jobs)


@pytest.fixture(scope="module")
def fast_runs(tmp_path_factory) -> dict[str, Path]:
    return train(tmp_path_factory.mktemp("lora"), FAST)


@pytest.fixture(scope="module")
def slow_runs(tmp_path_factory) -> dict[str, Path]:
    return train(tmp_path_factory.mktemp("lora"), SLOW)


def gradients(run: Path) -> dict[str, torch.Tensor]:
    """The second step's gradient of every adapter, whole."""
    (checkpoint,) = (run / "checkpoints").glob("step_*")
    state: dict[str, torch.Tensor] = {}
    reader = FileSystemReader(checkpoint / "optimizer")
    _load_state_dict(state, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    prefix = "optimizer.state.exp_avg."
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def check(runs: dict[str, Path], label: str) -> None:
    run, base = runs[label], runs[f"{label.split('-')[0]}-one_rank"]
    for row, want in zip(metrics(run), metrics(base), strict=True):
        for key in [key for key in COMPARED if (key, row["step"]) != ("reward_accuracy", 1)]:
            assert row[key] == pytest.approx(want[key], abs=TOLERANCE, rel=TOLERANCE), (row["step"], key)
    for what, of_run, of_base in (
        ("gradient", gradients(run), gradients(base)),
        ("adapter", load_all(run / "adapter"), load_all(base / "adapter")),
        ("merged weight", load_all(run / "hf"), load_all(base / "hf")),
    ):
        assert of_run.keys() == of_base.keys(), what
        for name, tensor in of_base.items():
            assert (of_run[name] - tensor).abs().max() <= TOLERANCE, (what, name)


@pytest.mark.parametrize("label", [f"{model}-{name}" for model, names in FAST.items() for name in names])
def test_nothing_depends_on_the_split(fast_runs, label):
    check(fast_runs, label)


@pytest.mark.slow
@pytest.mark.parametrize("label", [f"{model}-{name}" for model, names in SLOW.items() for name in names])
def test_nothing_depends_on_other_splits(slow_runs, label):
    check(slow_runs, label)


@pytest.mark.parametrize("model", FAST)
def test_the_comparison_means_something(fast_runs, model):
    """Every A and B has a gradient and moved by far more than the tolerance, and so did the weights that they adapt."""
    run = fast_runs[f"{model}-one_rank"]
    folder = run.parent.parent
    found = gradients(run)
    before, after = load_all(folder / f"{model}_adapter"), load_all(run / "adapter")
    assert {f"{PREFIX}{name}.weight" for name in found} == before.keys() == after.keys()
    for name, gradient in found.items():
        assert gradient.abs().max() > 10 * TOLERANCE, name
        assert (after[f"{PREFIX}{name}.weight"] - before[f"{PREFIX}{name}.weight"]).abs().max() > 10 * TOLERANCE, name
    base, merged = load_all(folder / model), load_all(run / "hf")
    adapted = {name for name in base if f"{PREFIX}{name.removesuffix('.weight')}.lora_A.weight" in before}
    assert all(torch.equal(base[name], merged[name]) for name in base.keys() - adapted)
    assert all((base[name] - merged[name]).abs().max() > 100 * TOLERANCE for name in adapted)

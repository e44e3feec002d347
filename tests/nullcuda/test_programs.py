"""The programs that run on a GPU, from start to end: training with save, export and resume, and the benchmarks."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import attention, ceilings, head_gpu
from spot_megatron.objective.values import VALUE_AT_REFERENCE
from spot_megatron.train import loop
from spot_megatron.train.__main__ import main
from tests.nullcuda.harness import WIDE
from tests.processes import ROOT
from tests.support import make_recipe, random_pairs, save_random_hf, write_token_pairs


@pytest.fixture
def read_values(monkeypatch):
    """What a step reads from the device, where nothing was computed: the values of a run that has not learnt yet."""
    reduce_sums = loop.reduce_sums

    def sums(reports, packs, squared_grad_norm, topology):
        zeros = reduce_sums(reports, packs, squared_grad_norm, topology)
        num_pairs = sum(len(pack.pair_index) for pack in packs)
        value, _ = VALUE_AT_REFERENCE["spot_bce"]
        return dataclasses.replace(zeros, loss=value * num_pairs, num_pairs=num_pairs, num_scored=num_pairs)

    monkeypatch.setattr(loop, "reduce_sums", sums)


def test_train_save_export_resume(tmp_path, read_values):
    save_random_hf(tmp_path / "model", WIDE)
    write_token_pairs(tmp_path / "pairs.jsonl", random_pairs(32, vocab_size=512))
    for _ in range(2):
        recipe = make_recipe(
            tmp_path,
            device="cuda",
            precision={"dtype": "bf16"},
            objective={"name": "spot_bce", "shift": {"kind": "none"}},
            train={"batch_pairs": 8, "epochs": 1, "max_steps": 4},
            checkpoint={"every_steps": 2},
        )
        (tmp_path / "recipe.yaml").write_text(recipe.dump())
        assert main([str(tmp_path / "recipe.yaml")]) == 0
        rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2, 3, 4]
        assert (tmp_path / "run" / "hf" / "config.json").exists()
        assert (tmp_path / "run" / "checkpoints" / "step_00000002").exists()
        (tmp_path / "run" / "finished.json").unlink()  # as if the run had been stopped half-way
    assert torch.cuda.memory_allocated() < 2**30


@pytest.mark.parametrize(
    ("program", "options"),
    [
        (ceilings, []),
        (head_gpu, ["--scored", "2048"]),
        (attention, ["--responses", "1200", "--repeats", "1"]),
    ],
    ids=["ceilings", "head", "attention"],
)
def test_benchmarks(tmp_path, program, options):
    assert program.main([*options, "--output", str(tmp_path / "report.json")]) == 0
    assert json.loads((tmp_path / "report.json").read_text())["device"] == "NVIDIA H100 80GB HBM3"


def test_the_allocator_grows_its_segments():
    """In a process of its own: the setting is made where the process groups start, before PyTorch reads it."""
    code = """
import torch
from spot_megatron.parallel.groups import parallel_groups
from spot_megatron.recipe import Parallel
with parallel_groups(Parallel(), "cuda", 1):
    block = torch.empty(2**26, device="cuda")
    assert all(segment["is_expandable"] for segment in torch.cuda.memory.memory_snapshot())
"""
    environment = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]

"""Transformer Engine's layers, where it is installed, with or without a GPU: the parameters of all ranks are those of
the weight map, and the optimizer that a recipe asks for can be made."""

from __future__ import annotations

import pytest

from spot_megatron.hf.config import read_hf_config
from spot_megatron.hf.names import hf_shapes
from spot_megatron.model.config import has_transformer_engine
from tests.processes import ROOT, output_of, run
from tests.weights.models import make_folder

pytestmark = pytest.mark.skipif(not has_transformer_engine(), reason="Transformer Engine is not installed")

CASES = {
    "qwen3 tp2 pp2": ("qwen3", ["parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2"]),
    "qwen3 cp2 vpp2": ("qwen3", ["parallel.context=2", "parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "qwen2 tp2": ("qwen2", ["parallel.tensor=2"]),
    "llama fp8 tensorwise": ("llama", ["precision.fp8=tensorwise"]),
    "qwen3 fp8 blockwise": ("qwen3", ["precision.fp8=blockwise", "memory.recompute_above_tokens=512"]),
    "qwen3 compact": ("qwen3", ["memory.master_weights=remainders", "memory.moments=bf16"]),
    "moe ep2 tp2": ("qwen3_moe_some", ["parallel.expert=2", "parallel.tensor=2", "parallel.sequence=true"]),
    "moe ep2 pp2": ("qwen3_moe", ["parallel.expert=2", "parallel.pipeline=2"]),
}


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_is_in_the_weight_map(tmp_path, case):
    family, overrides = CASES[case]
    model = make_folder(tmp_path / "model", family=family, tied=False)
    worker = [str(ROOT / "tests/weights/engine_worker.py"), str(model), *overrides]
    assert run(worker, tmp_path / "log") == 0, output_of(tmp_path / "log")[-3000:]
    lines = output_of(tmp_path / "log").splitlines()
    total = sum(map(_size, hf_shapes(read_hf_config(model)).values()))
    assert f"parameters {total}" in lines
    assert "optimizer transformer_engine" in lines
    assert "fused weight gradients True" in lines
    assert any(line.startswith("layers TE") for line in lines)


def _size(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) > 1 else 1)

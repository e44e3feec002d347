"""make doctor compares Megatron with transformers, and fails where they differ."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

from safetensors.torch import load_file, save_file

from tools.doctor import TINY, compare_with_transformers, host_memory_of_saves


def test_the_embedded_model_agrees(capsys):
    assert compare_with_transformers("cpu") == 0
    assert "transformers and Megatron agree to" in capsys.readouterr().out


def test_a_difference_is_found(tmp_path, capsys):
    shutil.copytree(TINY, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.down_proj.weight"][0] *= 1.5
    save_file(tensors, file, metadata={"format": "pt"})
    assert compare_with_transformers("cpu", tmp_path / "model") == 1
    assert "first difference: layer 0" in capsys.readouterr().out


def test_the_host_memory_of_saves(monkeypatch):
    def lines(free_gb: float) -> list[str]:
        monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=free_gb * 1e9))
        return host_memory_of_saves("NVIDIA H100 80GB HBM3", 8)

    ample, scarce = lines(2000), lines(8)
    assert any(line.startswith("yes  qwen3_8b_spot:") for line in ample)
    assert not any("235b" in line for line in ample)  # 8 GPUs do not hold it
    assert len(scarce) == len(ample)
    assert any(line.startswith("no   qwen3_8b_spot:") for line in scarce)
    assert host_memory_of_saves("NVIDIA T4", 8) == ["?    host memory of a save: NVIDIA T4 is unknown to make plan"]

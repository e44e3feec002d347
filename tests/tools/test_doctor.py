"""make doctor compares Megatron with transformers, and fails where they differ."""

from __future__ import annotations

import shutil

from safetensors.torch import load_file, save_file

from tools.doctor import TINY, compare_with_transformers


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

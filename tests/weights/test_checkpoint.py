"""The model part of Megatron checkpoints in one process: data types, and checkpoints that cannot be used."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

from spot_megatron.errors import CheckpointError
from spot_megatron.hf.checksums import CHECKSUMS
from spot_megatron.hf.side_files import load_kinds
from spot_megatron.weights.checkpoint import check_checksums, load_model, save_checksums, save_model
from tests.support import SHAPE, make_recipe, one_process, random_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(recipe, parameters, folder) of a saved fp32 model, in a world that lasts for the module."""
    folder = tmp_path_factory.mktemp("saved")
    recipe = make_recipe(folder)
    with one_process(recipe):
        chunks = random_model(recipe)
        save_model(chunks, folder / "model")
        yield recipe, dict(chunks[0].named_parameters()), folder / "model"


def load(recipe, folder, shape=SHAPE, dtype=torch.float32):
    chunks = random_model(recipe, shape, dtype)
    for parameter in chunks[0].parameters():
        parameter.data.fill_(float("inf"))
    load_model(chunks, folder)
    return dict(chunks[0].named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_take_the_models_type(saved, dtype):
    recipe, parameters, folder = saved
    loaded = load(recipe, folder, dtype=dtype)
    assert loaded.keys() == parameters.keys()
    for name, value in loaded.items():
        assert value.dtype == dtype
        assert torch.equal(value, parameters[name].to(dtype)), name


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_layers": 2}, "shape mismatch"),
        ({"hidden_size": 64}, "shape mismatch"),
        ({"tied": True}, "output_layer.weight"),
        ({"vocab_size": 150}, "'vocab_size': 101"),
        ({"vocab_size": 50}, "'vocab_size': 101"),
    ],
)
def test_another_models_checkpoint(saved, change, reason):
    recipe, _, folder = saved
    with pytest.raises(CheckpointError, match=reason):
        load(recipe, folder, replace(SHAPE, **change))


def cut(length):
    return lambda file: file.write_bytes(file.read_bytes()[:length])


@pytest.mark.parametrize(
    ("pattern", "damage"),
    [
        ("metadata.json", lambda file: file.unlink()),
        ("metadata.json", cut(5)),
        (".metadata", lambda file: file.unlink()),
        (".metadata", cut(100)),
        ("common.pt", lambda file: file.unlink()),
        ("common.pt", cut(100)),
        ("*.distcp", lambda file: file.unlink()),
        ("*.distcp", cut(500)),
        ("*.distcp", cut(-100)),
    ],
)
def test_damaged_checkpoint(saved, tmp_path, pattern, damage):
    recipe, _, folder = saved
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    if pattern == "common.pt" and not (copy / pattern).exists():
        pytest.skip("this Megatron-Core writes no common.pt")
    damage(min(copy.glob(pattern)))
    with pytest.raises(CheckpointError) as caught:
        load(recipe, copy)
    assert str(copy) in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("content", [None, "{", "[]", '{"a": "F33"}'])
def test_unreadable_note_of_the_types(tmp_path, content):
    if content is not None:
        (tmp_path / "hf_dtypes.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"hf_dtypes\.json"):
        load_kinds(tmp_path)


def test_code_in_the_metadata_is_not_run(saved, tmp_path, monkeypatch):
    recipe, _, folder = saved
    shutil.copytree(folder, tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "copy" / ".metadata").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(CheckpointError, match=r"\.metadata refers to os\.system, .*may run code"):
        load(recipe, tmp_path / "copy")
    assert not (tmp_path / "ran").exists()


def test_checksums_of_a_checkpoint(saved, tmp_path):
    _, _, folder = saved
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy / "model")
    check_checksums(copy)  # as a checkpoint of Megatron-Core, without SHA256SUMS
    save_checksums(copy)
    check_checksums(copy)
    for file in [path for path in copy.rglob("*") if path.is_file() and path.name != CHECKSUMS]:
        original = file.read_bytes()
        file.write_bytes(original[:-1] + bytes([original[-1] ^ 4]))
        with pytest.raises(CheckpointError, match=rf"{file.name} is damaged"):
            check_checksums(copy)
        file.write_bytes(original)

"""What a user gets wrong ends with exit code 2 and one paragraph that names the place and the remedy, no traceback."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spot_megatron.train.__main__ import main
from spot_megatron.train.loggers import LOGGERS
from tests.support import make_recipe, random_pairs, save_random_hf, write_token_pairs

GOOD = {"id": "a", "prompt": "p", "chosen": "c", "rejected": "r"}


@pytest.fixture
def folder(tmp_path) -> Path:
    save_random_hf(tmp_path / "model")
    write_token_pairs(tmp_path / "pairs.jsonl", random_pairs(8))
    return tmp_path


def run(folder: Path, capsys: pytest.CaptureFixture, *overrides: str, **sections) -> str:
    """The one-paragraph message of a run that must end with exit code 2."""
    (folder / "recipe.yaml").write_text(make_recipe(folder, **sections).dump())
    code = main([str(folder / "recipe.yaml"), *(["--set", *overrides] if overrides else [])])
    message = capsys.readouterr().err
    assert code == 2, message
    assert message.count("\n") == 1
    assert "Traceback" not in message
    return message


def write_pairs(folder: Path, *lines: str) -> None:
    (folder / "pairs.jsonl").write_text("".join(line + "\n" for line in lines))


def test_unknown_key_names_the_nearest(folder, capsys):
    message = run(folder, capsys, "optim.lrr=1")
    assert "unknown key 'optim.lrr'" in message
    assert "did you mean optim.lr?" in message
    assert "recipe.yaml" in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("parallel.sequence=true", ["parallel.sequence", "parallel.tensor"]),
        ("objective={name: dpo, shift: {kind: ema}}", ["shift", "spot_bco"]),
        ("precision={dtype: bf16, fp8: tensorwise}", ["precision.fp8", "CUDA"]),
        ("device=cuda", ["device", "cpu"]),
        ("parallel.tensor=3", ["3"]),
        ("optim.lr=fast", ["optim.lr", "fast"]),
        ("model.hf=nowhere", ["model.hf", "nowhere"]),
        ("data.enable_thinking=true", ["enable_thinking", "token ids"]),
    ],
)
def test_impossible_options(folder, capsys, override, words):
    message = run(folder, capsys, override)
    assert all(word in message for word in words), message


def test_fp8_without_transformer_engine(folder, monkeypatch, capsys):
    """On a CUDA machine without Transformer Engine, Megatron-Core would train in bf16 and say nothing."""
    from spot_megatron.errors import RecipeError
    from spot_megatron.model.config import check_fp8
    from spot_megatron.recipe import Precision

    monkeypatch.setattr("spot_megatron.model.config.has_transformer_engine", lambda: False)
    with pytest.raises(RecipeError, match="Transformer Engine"):
        check_fp8(Precision(fp8="blockwise"), "cuda")
    monkeypatch.setattr("spot_megatron.model.config.has_transformer_engine", lambda: True)
    check_fp8(Precision(fp8="blockwise"), "cuda")
    with pytest.raises(RecipeError, match="with experts set precision"):
        check_fp8(Precision(fp8="blockwise"), "cuda", has_experts=True)


def test_tensor_parallel_that_does_not_divide_the_heads(folder, capsys, monkeypatch):
    from spot_megatron.errors import RecipeError
    from spot_megatron.parallel.split import check_parallel
    from spot_megatron.recipe import Parallel
    from tests.support import SHAPE

    with pytest.raises(
        RecipeError, match=r"parallel.tensor=8 .* does not divide the model's 4 key-value heads.*\[1, 2, 4\]"
    ):
        check_parallel(SHAPE, Parallel(tensor=8))


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([json.dumps(GOOD), '{"id": "b", "prompt": '], [":2", "JSON"]),
        ([json.dumps({**GOOD, "chosen": ""})], [":1", "chosen", "empty"]),
        ([json.dumps({**GOOD, "rejected": "c"})], [":1", "chosen", "rejected"]),
        ([json.dumps(GOOD), json.dumps(GOOD)], [":2", "a", ":1"]),
        ([], ["pairs.jsonl"]),
    ],
)
def test_bad_pairs(folder, capsys, lines, words):
    write_pairs(folder, *lines)
    message = run(folder, capsys)
    assert "pairs.jsonl" in message
    assert all(word in message for word in words), message


def test_missing_pair_file(folder, capsys):
    (folder / "pairs.jsonl").unlink()
    assert "pairs.jsonl" in run(folder, capsys)


def test_all_pairs_too_long(folder, capsys):
    (folder / "recipe.yaml").write_text(make_recipe(folder, data={"max_tokens": 8}).dump())
    assert main([str(folder / "recipe.yaml")]) == 2
    output = capsys.readouterr()
    assert "too_long" in output.out
    assert "dropped" in output.out
    assert "pairs.jsonl" in output.err


def test_a_pair_over_the_budget(folder, capsys):
    message = run(folder, capsys, data={"tokens_per_microbatch": 10})
    assert "data.tokens_per_microbatch" in message
    assert "pair-" in message


def test_token_id_beyond_the_vocabulary(folder, capsys):
    write_token_pairs(folder / "pairs.jsonl", random_pairs(4, vocab_size=140))
    message = run(folder, capsys)
    assert "vocab_size" in message
    assert "101" in message


def test_missing_shard(folder, capsys):
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model" / "model.safetensors").unlink()
    (folder / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    message = run(folder, capsys)
    assert "model-00001-of-00001.safetensors" in message


def test_tensor_of_the_wrong_shape(folder, capsys):
    path = folder / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = torch.ones(47)
    save_file(tensors, path, metadata={"format": "pt"})
    message = run(folder, capsys)
    assert "model.norm.weight" in message
    assert "47" in message
    assert "48" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(folder, capsys, value):
    path = folder / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight"][0, 3] = value
    save_file(tensors, path, metadata={"format": "pt"})
    message = run(folder, capsys)
    assert f"{folder}/model: the weights are not finite; first parameter decoder.layers.1.mlp.linear_fc2" in message


def test_weights_that_overflow(folder, capsys):
    path = folder / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight"] += 1e38
    save_file(tensors, path, metadata={"format": "pt"})
    message = run(folder, capsys)
    assert "reference pass: the log-probabilities of 8 of 8 pairs are not finite" in message
    assert not (folder / "reference_cache").exists()


@pytest.mark.parametrize("package", sorted(LOGGERS))
def test_a_missing_logger_is_found_before_the_data_is_read(folder, capsys, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    (folder / "pairs.jsonl").unlink()
    message = run(folder, capsys, logging={package: True})
    assert f"logging.{package}=true" in message
    assert "pip install" in message

"""tools.convert: there and back bit for bit, verify sees every kind of difference, mistakes end with code 2."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.processes import ROOT
from tests.weights.models import FAMILIES, OTHER_FILES, make_folder
from tools.convert.__main__ import main


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("source") / "model", tied=False, dtype="mixed")


@pytest.fixture(scope="module")
def imported(source, tmp_path_factory):
    output = tmp_path_factory.mktemp("imported") / "deep" / "checkpoint"
    assert main(["import", "--hf", str(source), "--output", str(output)]) == 0
    return output


def export(checkpoint, output, *more):
    return main(["export", "--checkpoint", str(checkpoint), "--output", str(output), *more])


def verify(a, b):
    return main(["verify", "--a", str(a), "--b", str(b)])


def test_there_and_back_needs_only_the_checkpoint(source, imported, tmp_path, capfd):
    moved = tmp_path / "moved"
    shutil.copytree(imported, moved)
    assert export(moved, tmp_path / "out", "--shard-gb", "4e-5") == 0
    assert verify(source, tmp_path / "out") == 0
    assert "bit for bit" in capfd.readouterr().out
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    for name in OTHER_FILES:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_the_side_files_are_verbatim(source, imported):
    for name in [*OTHER_FILES, "config.json", "generation_config.json"]:
        assert (imported / "hf" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda t: t["model.norm.weight"].__setitem__(7, 3.0), "model.norm.weight: 1 of 64 values differ, by up to "),
        (lambda t: t.update(x=torch.ones(1)), "x: only in "),
        (lambda t: t.pop("lm_head.weight"), "lm_head.weight: only in "),
        (lambda t: t.update({"model.norm.weight": t["model.norm.weight"].half()}), "values differ, by up to "),
        (lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:8].clone()}), ", float32 (8,) in "),
        (lambda t: t["model.norm.weight"].__setitem__(0, float("nan")), "1 of 64 values differ, by up to nan"),
    ],
)
def test_verify_prints_each_difference(source, tmp_path, capfd, change, line):
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors")
    assert verify(source, copy) == 1
    printed, largest, first = capfd.readouterr().out.splitlines()
    assert line in printed
    assert largest.startswith("head: 1 tensors differ" + ", by up to " * ("values" in line))
    assert first == "first difference: head"


def test_verify_names_the_first_layer_that_differs(source, tmp_path, capfd):
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    tensors = load_file(copy / "model.safetensors")
    for layer in (2, 1):
        tensors[f"model.layers.{layer}.input_layernorm.weight"][3] += 0.5 * layer
    tensors["model.norm.weight"][0] += 4
    save_file(tensors, copy / "model.safetensors")
    assert verify(source, copy) == 1
    assert capfd.readouterr().out.splitlines()[3:] == [
        "layer 1: 1 tensors differ, by up to 0.5",
        "layer 2: 1 tensors differ, by up to 1",
        "head: 1 tensors differ, by up to 4",
        "first difference: layer 1",
    ]


PROMPTS = "".join(json.dumps({"prompt_ids": ids}) + "\n" for ids in ([5, 17, 80, 3, 44, 9], [100], list(range(60))))


@pytest.mark.parametrize("family", FAMILIES)
def test_verify_logits(tmp_path, capfd, family):
    """transformers and Megatron agree on the folder and on its checkpoint; a damaged layer is found where it is."""
    folder = make_folder(tmp_path / "model", family=family, tied=False)
    (tmp_path / "prompts.jsonl").write_text(PROMPTS)
    assert main(["import", "--hf", str(folder), "--output", str(tmp_path / "checkpoint")]) == 0
    for other in ("model", "checkpoint"):
        arguments = ["--a", str(folder), "--b", str(tmp_path / other), "--logits", str(tmp_path / "prompts.jsonl")]
        assert main(["verify", *arguments]) == 0
        assert "layer 3: largest difference" in capfd.readouterr().out
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.2.self_attn.o_proj.weight"
    tensors[name] = tensors[name] * 1.001
    shutil.copytree(folder, tmp_path / "other")
    save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    arguments = ["--a", str(folder), "--b", str(tmp_path / "other"), "--logits", str(tmp_path / "prompts.jsonl")]
    assert main(["verify", *arguments]) == 1
    assert capfd.readouterr().out.splitlines()[-1] == "first difference: layer 2"


def test_prompts_that_cannot_be_read(source, tmp_path, capfd):
    for content, words in [
        (None, "cannot be read"),
        ("", "holds no prompts"),
        ('{"x": 1}\n', ":1: "),
        ("{", ":1: "),
    ]:
        if content is not None:
            (tmp_path / "prompts").write_text(content)
        assert main(["verify", "--a", str(source), "--b", str(source), "--logits", str(tmp_path / "prompts")]) == 2
        assert words in capfd.readouterr().err


def test_mistakes_end_with_code_2_and_one_paragraph(source, imported, tmp_path, capfd):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    unfinished = tmp_path / "unfinished"
    shutil.copytree(imported, unfinished)
    (unfinished / "model" / "metadata.json").unlink()
    for arguments, words in [
        (["import", "--hf", str(tmp_path / "absent"), "--output", str(tmp_path / "o")], ["does not exist"]),
        (["import", "--hf", str(source), "--output", str(tmp_path / "used")], ["exists already"]),
        (["import", "--hf", str(source), "--output", str(source / "inside")], ["lies inside"]),
        (
            ["import", "--hf", str(source), "--output", str(tmp_path / "o"), "--set", "parallel.tensor=3"],
            ["parallel.tensor=3", "divide"],
        ),
        (
            ["import", "--hf", str(source), "--output", str(tmp_path / "o"), "--set", "parallel.tensr=2"],
            ["parallel.tensr", "parallel.tensor"],
        ),
        (
            ["import", "--hf", str(source), "--output", str(tmp_path / "o"), "--set", "optim.lr=1"],
            ["optim.lr", "parallel"],
        ),
        (
            ["export", "--checkpoint", str(source), "--output", str(tmp_path / "o")],
            ["not a checkpoint", "model/ and hf/"],
        ),
        (["export", "--checkpoint", str(unfinished), "--output", str(tmp_path / "o")], ["metadata.json is missing"]),
        (["export", "--checkpoint", str(imported), "--output", str(tmp_path / "used")], ["exists already"]),
        (["verify", "--a", str(source), "--b", str(tmp_path)], ["holds no weights"]),
        (["verify", "--a", str(source), "--b", str(source), "--device", "cuda"], ["--device", "--logits"]),
    ]:
        assert main(arguments) == 2
        message = capfd.readouterr().err
        assert all(word in message for word in words), message
        assert "Traceback" not in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["unfinished", "used"]


def test_a_split_that_fits_is_no_obstacle(source, tmp_path):
    sets = ["--set", "parallel.tensor=2", "parallel.pipeline=2"]
    assert main(["import", "--hf", str(source), "--output", str(tmp_path / "split"), *sets]) == 0


def test_as_a_program(source, tmp_path):
    command = [sys.executable, "-m", "tools.convert", "verify", "--a", str(source), "--b", str(source)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")

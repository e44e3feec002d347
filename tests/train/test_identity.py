"""A resumed run has the data, the weights, the date and the reference of the run that it continues, or is refused."""

from __future__ import annotations

import hashlib
import json
import re
from datetime import datetime
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spot_megatron.files import file_sha256, write_json
from spot_megatron.train import data as run_data
from spot_megatron.train.__main__ import main
from tests.support import make_recipe, random_pairs, save_random_hf, write_token_pairs


@pytest.fixture
def folder(tmp_path) -> Path:
    """A run of 4 steps that ended after its export, so that the next launch continues after step 2."""
    save_random_hf(tmp_path / "model")
    write_token_pairs(tmp_path / "pairs.jsonl", random_pairs(8))
    recipe = make_recipe(tmp_path, train={"batch_pairs": 2, "epochs": 1}, checkpoint={"every_steps": 2, "keep": 2})
    (tmp_path / "recipe.yaml").write_text(recipe.dump())
    assert main([str(tmp_path / "recipe.yaml")]) == 0
    (tmp_path / "run" / "finished.json").unlink()
    return tmp_path


def resume(folder: Path, capsys: pytest.CaptureFixture) -> tuple[int, str]:
    capsys.readouterr()
    code = main([str(folder / "recipe.yaml")])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def write_state(file: Path, state: dict) -> None:
    """Replaces a checkpoint's state.json, as if it had been saved so."""
    write_json(file, state)
    sums = file.with_name("SHA256SUMS")
    sums.write_text(re.sub(r"\w+(?=  state\.json)", file_sha256(file), sums.read_text()))


def test_nothing_has_changed(folder, capsys):
    code, text = resume(folder, capsys)
    assert code == 0
    assert "steps 2 to 4 of 4" in text
    assert "reference pass: read from" in text
    assert "WARNING" not in text


@pytest.mark.parametrize("step", [0, 3])
def test_other_pairs_in_the_same_file(folder, capsys, step):
    pairs = random_pairs(8)
    pairs[step].chosen_ids[0] = (pairs[step].chosen_ids[0] + 1) % 100
    write_token_pairs(folder / "pairs.jsonl", pairs)
    before = (folder / "run" / "environment.json").read_text()
    code, text = resume(folder, capsys)
    assert code == 2
    assert "token ids of data.pairs have changed" in text
    assert "checkpoint.resume=never" in text
    assert (folder / "run" / "environment.json").read_text() == before


def test_other_weights_in_the_same_folder(folder, capsys):
    path = folder / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] += 0.001
    save_file(tensors, path, metadata={"format": "pt"})
    code, text = resume(folder, capsys)
    assert code == 2
    assert "weights of model.hf, its config.json or lora.adapter have changed" in text


def test_a_checkpoint_without_digests_is_continued_loudly(folder, capsys):
    file = folder / "run" / "checkpoints" / "step_00000002" / "state.json"
    state = json.loads(file.read_text())
    for name in [name for name in state["recipe"] if name.startswith("digest")]:
        del state["recipe"][name]
    del state["started"]
    write_state(file, state)
    code, text = resume(folder, capsys)
    assert code == 0
    assert text.count("WARNING") == 2
    assert "without a digest of the pairs" in text
    assert "without a digest of the initial weights" in text


def test_a_checkpoint_without_checksums_is_continued_loudly(folder, capsys):
    (folder / "run" / "checkpoints" / "step_00000002" / "SHA256SUMS").unlink()
    code, text = resume(folder, capsys)
    assert code == 0
    assert "has no SHA256SUMS, so damage to its files may go unnoticed" in text


def test_prompts_keep_the_first_date(folder, capsys, monkeypatch):
    """Whichever of the files the date is read from, templates get the same."""
    dates = []
    tokenize = run_data.tokenize_pairs
    monkeypatch.setattr(
        run_data, "tokenize_pairs", lambda *arguments: [dates.append(arguments[-1]), tokenize(*arguments)][1]
    )
    first = datetime(2020, 2, 29, 23, 59, 59)
    checkpoints = folder / "run" / "checkpoints"
    file = checkpoints / "step_00000002" / "state.json"
    write_state(file, json.loads(file.read_text()) | {"started": first.isoformat()})
    assert resume(folder, capsys)[0] == 0
    assert json.loads((folder / "run" / "environment.json").read_text())["started"] == first.isoformat()
    for path in checkpoints.iterdir():
        path.rename(folder / f"aside_{path.name}")
    assert resume(folder, capsys)[0] == 0  # from finished.json
    (folder / "run" / "finished.json").unlink()
    assert resume(folder, capsys)[0] == 0  # from environment.json
    assert set(dates) == {first}


METRICS = [
    (lambda data: data, [1, 2, 3, 4], None),
    (lambda data: data[:-20], [1, 2, 3, 4], None),  # step 4, which is trained again, was cut off by a full disk
    (lambda data: b"\xff" + data[1:], [2, 3, 4], "rows of 1 of 2 steps are missing or damaged"),
    (lambda data: data.replace(b'"loss"', b'"lots"', 1), [2, 3, 4], "rows of 1 of 2 steps are missing or damaged"),
    (lambda data: data[data.index(b"\n") + 1 :], [2, 3, 4], "rows of 1 of 2 steps are missing or damaged"),
]


@pytest.mark.parametrize(("damage", "steps", "warning"), METRICS)
def test_damaged_metrics_do_not_stop_a_resume(folder, capsys, damage, steps, warning):
    file = folder / "run" / "metrics.jsonl"
    file.write_bytes(damage(file.read_bytes()))
    code, text = resume(folder, capsys)
    assert code == 0, text
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == steps
    assert (warning in text) if warning else ("WARNING" not in text)


def caches(folder: Path) -> list[Path]:
    return list((folder / "reference_cache").glob("*.jsonl"))


def test_a_flipped_bit_in_the_cache(folder, capsys):
    (cache,) = caches(folder)
    data = bytearray(cache.read_bytes())
    data[len(data) // 2] ^= 1
    cache.write_bytes(data)
    code, text = resume(folder, capsys)
    assert code == 2
    assert f"{cache} is damaged" in text
    assert "delete the file" in text


def test_a_cache_of_other_numbers(folder, capsys):
    """Whole and well-formed, but not this model's: the sample that is computed again differs."""
    (cache,) = caches(folder)
    *lines, _ = cache.read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    text = "".join(
        json.dumps(row | {"logp_chosen": row["logp_chosen"] + 0.1}, separators=(",", ":")) + "\n" for row in rows
    )
    digest = hashlib.sha256(text.encode()).hexdigest()
    cache.write_text(text + json.dumps({"sha256": digest}, separators=(",", ":")) + "\n")
    code, text = resume(folder, capsys)
    assert code == 2
    assert f"{cache} does not fit this model: pair pair-" in text


def test_another_split_has_a_cache_of_its_own(folder):
    assert len(caches(folder)) == 1
    assert main([str(folder / "recipe.yaml"), "--set", "checkpoint.resume=never", "data.layout=separate"]) == 0
    assert len(caches(folder)) == 2
    torch.use_deterministic_algorithms(False)

"""Hugging Face <-> Megatron, every family at TP {1,2,4} x PP {1,2,4} x EP {1,2}: one start of processes for many."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spot_megatron.hf.folder import HFFolder, same_bits
from spot_megatron.hf.index import INDEX_FILE
from tests.processes import output_of, run
from tests.weights.models import OTHER_FILES, causal_pack, logits_of_transformers, make_folder
from tests.weights.parallel_worker import READERS, layouts
from tools.convert.convert import import_folder

MODELS = {
    "qwen3": {"tied": True},
    "qwen3_untied": {"tied": False, "dtype": "mixed", "shard_size": "40KB", "seed": 1},
    "llama": {"tied": True, "dtype": "bf16", "shard_size": "20KB", "seed": 2},
    "qwen2": {"tied": False, "dtype": "mixed", "seed": 3},
    "qwen3_moe": {"tied": False, "dtype": "mixed", "shard_size": "40KB", "seed": 4},
    "qwen3_moe_some": {"tied": True, "dtype": "bf16", "seed": 5},
}
RESULTS = {
    model: [*layouts(4, has_experts="moe" in model), "imported", *(f"written-{layout}" for layout in READERS)]
    for model in MODELS
}
CASES = [(model, result) for model, results in RESULTS.items() for result in results]
CASES_WITH_LOGITS = [(model, result) for model, result in CASES if not result.endswith("vpp2")]


def make_all(folder: Path, num_processes: int) -> Path:
    """The working folder after so many processes have done everything in parallel_worker.py."""
    (folder / "logits").mkdir()
    for name, options in MODELS.items():
        source = make_folder(folder / "models" / name, family=name.removesuffix("_untied"), **options)
        import_folder(source, folder / "imported" / name)
    code = run(
        ["-m", "tests.weights", str(folder)], folder / "log", num_processes, timeout=280 if num_processes == 4 else 1500
    )
    assert code == 0, output_of(folder / "log")[-6000:]
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_all(tmp_path_factory.mktemp("parallel"), 4)


@pytest.mark.parametrize(("model", "result"), CASES)
def test_there_and_back_bit_for_bit(folder, model, result):
    check_round_trip(folder, model, result)


def check_round_trip(folder, model, result):
    source, copy = folder / "models" / model, folder / "exported" / f"{result}-{model}"
    left, right = HFFolder(copy), HFFolder(source)
    assert left.names() == right.names()
    assert [name for name in left.names() if not same_bits(left.read(name), right.read(name))] == []
    assert (copy / INDEX_FILE).exists()
    for name in OTHER_FILES:
        assert (copy / name).read_bytes() == (source / name).read_bytes()
    assert not list((folder / "exported").glob(".*"))


def test_every_rank_writes_its_share(folder):
    """Four ranks that hold the whole model each: four times as many files as one stage of tensor ranks would need."""
    sizes = [file.stat().st_size for file in (folder / "exported" / "tp1-qwen3").glob("*.safetensors")]
    assert len(sizes) >= 4
    assert max(sizes) < 1.5 * sum(sizes) / len(sizes) + 30_000


@pytest.mark.parametrize(("model", "result"), CASES_WITH_LOGITS)
def test_logits_of_transformers(folder, model, result):
    """Largest difference below 1e-4 in fp32, on every rank that has logits."""
    files = list((folder / "logits").glob(f"{result}-{model}-*.pt"))
    assert files
    expected = logits_of_transformers(folder / "models" / model, causal_pack()[1])
    for file in files:
        for ours, theirs in zip(torch.load(file), expected, strict=True):
            assert theirs.std() > 0.3
            assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.timeout(1600)
@pytest.mark.parametrize("num_processes", [8, 16])
def test_there_and_back_in_many_processes(tmp_path, num_processes):
    """The rest of the grid. Every process is a Python of its own: about a minute and 6 GB for sixteen."""
    make_all(tmp_path, num_processes)
    for model in MODELS:
        for layout in layouts(num_processes, has_experts="moe" in model):
            check_round_trip(tmp_path, model, layout)

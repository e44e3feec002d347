"""Model folders that the tests of this folder only read."""

import pytest

from tests.weights.models import FAMILIES, make_folder

CASES = {family: {"family": family, "tied": False, "dtype": "mixed"} for family in FAMILIES} | {
    "tied": {"tied": True, "dtype": "bf16", "shard_size": "20KB"},
    "tied_moe": {"family": "qwen3_moe", "tied": True, "shard_size": "20KB"},
}


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    base = tmp_path_factory.mktemp("sources")
    return {name: make_folder(base / name, **options) for name, options in CASES.items()}


@pytest.fixture(scope="session")
def large(tmp_path_factory):
    """34 MB of weights: several batches and, with small files, many outputs."""
    sizes = {"vocab_size": 4000, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 16}
    return make_folder(tmp_path_factory.mktemp("large") / "model", tied=False, dtype="bf16", shard_size="9MB", **sizes)

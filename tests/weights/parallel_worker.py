"""The program of test_parallel.py, in several processes: `python -m tests.weights FOLDER`.

For every parallel layout and every model in FOLDER/models: load, compute logits, export. Then checkpoints across
layouts: imported by one process and loaded here, written here and loaded under another layout.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist

from spot_megatron.hf.config import HFModelConfig, read_hf_config
from spot_megatron.hf.folder import HFFolder
from spot_megatron.model.config import transformer_config
from spot_megatron.model.gpt import PairGPT, build_model
from spot_megatron.parallel.groups import Topology, parallel_groups
from spot_megatron.weights.checkpoint import load_model, save_model
from spot_megatron.weights.export import export_hf
from spot_megatron.weights.load import load_hf
from tests.support import make_recipe
from tests.weights.models import causal_pack, logits_of_megatron

LAYOUTS: dict[str, dict[str, int]] = {
    "tp1": {},
    "tp2": {"tensor": 2},
    "tp4": {"tensor": 4},
    "pp2": {"pipeline": 2},
    "pp4": {"pipeline": 4},
    "tp2pp2": {"tensor": 2, "pipeline": 2},
    "pp2vpp2": {"pipeline": 2, "virtual_pipeline": 2},
    "ep2": {"expert": 2},
    "tp2ep2": {"tensor": 2, "expert": 2},
    "pp2ep2": {"pipeline": 2, "expert": 2},
    "tp2pp2ep2": {"tensor": 2, "pipeline": 2, "expert": 2},
    # eight processes
    "tp2pp4": {"tensor": 2, "pipeline": 4},
    "tp4pp2": {"tensor": 4, "pipeline": 2},
    "tp4ep2": {"tensor": 4, "expert": 2},
    "pp4ep2": {"pipeline": 4, "expert": 2},
    "tp2pp4ep2": {"tensor": 2, "pipeline": 4, "expert": 2},
    "tp4pp2ep2": {"tensor": 4, "pipeline": 2, "expert": 2},
    # sixteen
    "tp4pp4": {"tensor": 4, "pipeline": 4},
    "tp4pp4ep2": {"tensor": 4, "pipeline": 4, "expert": 2},
}


def layouts(num_processes: int, has_experts: bool) -> list[str]:
    """The splits to test with this number of processes, without those that tests of fewer processes cover."""
    sizes = {name: split.get("tensor", 1) * split.get("pipeline", 1) for name, split in LAYOUTS.items()}
    for name in ("tp4ep2", "pp4ep2"):
        sizes[name] = 8
    fewest = {4: 1, 8: 8, 16: 16}[num_processes]
    return [
        name
        for name, split in LAYOUTS.items()
        if fewest <= sizes[name] <= num_processes and (has_experts or "expert" not in split)
    ]


def writer_layout(has_experts: bool) -> str:
    """The layout that saves a checkpoint for the others to load."""
    return "tp2pp2ep2" if has_experts else "tp2pp2"


READERS = ("tp1", "tp4", "pp4", "pp2vpp2")  # the layouts that load it


def run_layout(folder: Path, layout: str, sources: list[Path], stores: list[dist.TCPStore | None]) -> None:
    """Loads and exports every model under one layout."""
    split = LAYOUTS[layout]
    recipe = make_recipe(folder, parallel={**split, "sequence": False})
    with parallel_groups(recipe.parallel, "cpu", recipe.seed) as topology:
        for source in sources:
            config = read_hf_config(source)
            has_experts = bool(config.moe_layers)
            parallel = {**split, "sequence": has_experts and split.get("tensor", 1) > 1}
            recipe = make_recipe(folder, parallel=parallel)
            imported, written = folder / "imported" / source.name / "model", folder / "written" / source.name
            cases = {layout: lambda chunks, s=source, c=config: load_hf(chunks, HFFolder(s), c)}
            if layout == writer_layout(has_experts):
                cases["imported"] = lambda chunks, i=imported: load_model(chunks, i)
            if layout in READERS and written.exists():
                cases[f"written-{layout}"] = lambda chunks, w=written: load_model(chunks, w)
            for name, fill in cases.items():
                chunks = build_model(transformer_config(config, recipe, "cpu"), config)
                for chunk in chunks:
                    for parameter in chunk.parameters():
                        parameter.data.fill_(float("inf"))  # a parameter that is not filled is found
                fill(chunks)
                check_padding(chunks, topology)
                if name == "imported":
                    save_model(chunks, written)
                report(folder, chunks, source, config, f"{name}-{source.name}")
        stores.append(new_store())


def check_padding(chunks: list[PairGPT], topology: Topology) -> None:
    """Rows that pad the vocabulary are zero, on every rank that has some."""
    tables = [p for chunk in chunks for n, p in chunk.named_parameters() if "word_embeddings" in n or "output_lay" in n]
    for table in tables:
        num_rows = table.shape[0]
        first = chunks[0].real_vocab_size - topology.tensor_rank * num_rows
        assert not table[max(first, 0) :].any()


def report(folder: Path, chunks: list[PairGPT], source: Path, config: HFModelConfig, result: str) -> None:
    """Saves this rank's logits, if it has any, and exports the model."""
    if len(chunks) == 1 and dist.get_world_size() == 4:
        logits = logits_of_megatron(chunks, causal_pack()[0], config)
        if logits:
            torch.save(logits, folder / "logits" / f"{result}-{dist.get_rank()}.pt")
    export_hf(chunks, source, folder / "exported" / result, config, shard_gb=6e-5)


def main(folder: Path) -> None:
    models = sorted((folder / "models").iterdir())
    has_experts = {source: bool(read_hf_config(source).moe_layers) for source in models}
    wanted = {source: layouts(dist_world(), has_experts[source]) for source in models}
    stores: list[dist.TCPStore | None] = []
    # The writers first: they write what others load.
    for layout in sorted(LAYOUTS, key=lambda name: name not in map(writer_layout, (False, True))):
        sources = [source for source in models if layout in wanted[source]]
        if sources:
            run_layout(folder, layout, sources, stores)


def dist_world() -> int:
    return int(os.environ["WORLD_SIZE"])


def new_store() -> dist.TCPStore | None:
    """Has the next process groups meet at a store of their own: torchrun's still holds the keys of the last ones."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if dist.get_rank() == 0 else None
    port = [store.port if store else None]
    dist.broadcast_object_list(port)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port[0]))
    return store

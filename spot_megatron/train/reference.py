"""The reference pass: one forward over the data with the initial policy, cached on disk.

The frozen reference is the model before its first update, so its log-probabilities come from the very model, precision,
layout and kernels that training uses, once. The cache's name is a digest of everything they depend on.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from spot_megatron.data.dataset import PreferencePairDataset
from spot_megatron.data.pack import Pack
from spot_megatron.errors import CheckpointError
from spot_megatron.model.attention.cuda import pick_kernel
from spot_megatron.model.config import DTYPES
from spot_megatron.model.gpt import PairGPT
from spot_megatron.parallel.device import to_device
from spot_megatron.parallel.groups import Topology
from spot_megatron.recipe import Recipe
from spot_megatron.train.step import MicroBatch, forward_backward, side_sums, sum_over_replicas


def computed_by(recipe: Recipe, device: str) -> str:
    """The software, device and attention kernel behind this process's numbers."""
    names = ("torch", "megatron-core", "transformer-engine", "flash-attn")
    versions = [f"{name} {version}" for name in names if (version := _version(name))]
    on_cuda = device == "cuda"
    kernel = pick_kernel(recipe.model.attention, DTYPES[recipe.precision.dtype]) if on_cuda else "cpu_attention"
    return ", ".join([*versions, device, kernel])


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def reference_key(recipe: Recipe, dataset: PreferencePairDataset, weights_digest: str, software: str) -> str:
    """Hex digest naming a cache: weights, tokens, precision, layout, and `software`, which says what computes."""
    parts = {
        "weights": weights_digest,
        "pairs": dataset.fingerprint(),
        "precision": recipe.precision.model_dump(),
        "layout": recipe.data.layout,
        "software": software,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def reference_logps(
    chunks: Sequence[PairGPT],
    dataset: PreferencePairDataset,
    packs: Iterable[Pack],
    topology: Topology,
    cache: Path,
) -> tuple[np.ndarray, float]:
    """[num pairs, 2] log-probability sums (chosen, rejected) in nats, float64, equal on every rank.

    Reads `cache` where it exists, else computes and writes it; `packs` are this rank's share of the data, laid out only
    when they are needed.

    Returns:
        the sums, and the seconds spent computing (0.0 when read).
    """
    found: list[Any] = [_read_cache(cache, dataset) if topology.is_main and cache.exists() else None]
    dist.broadcast_object_list(found, src=0)
    if found[0] is not None:
        return found[0], 0.0
    start = time.perf_counter()
    sums = reference_sums(chunks, len(dataset), list(packs), topology)
    if topology.is_main:
        write_reference(cache, dataset, sums)
    return sums, time.perf_counter() - start


def write_reference(path: Path, dataset: PreferencePairDataset, sums: np.ndarray) -> None:
    """One object a pair: id, logp_chosen, logp_rejected. Appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = (
        json.dumps({"id": pair.id, "logp_chosen": chosen, "logp_rejected": rejected}, ensure_ascii=False)
        for pair, (chosen, rejected) in zip(dataset.pairs, sums.tolist(), strict=True)
    )
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("w", encoding="utf-8") as file:
        file.write("\n".join(rows) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _read_cache(path: Path, dataset: PreferencePairDataset) -> np.ndarray:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if [row["id"] for row in rows] != [pair.id for pair in dataset.pairs]:
        raise CheckpointError(f"{path} does not list this data's pairs although its name says so; delete the file")
    return np.array([[row["logp_chosen"], row["logp_rejected"]] for row in rows], dtype=np.float64)


@torch.no_grad()
def reference_sums(chunks: Sequence[PairGPT], num_pairs: int, packs: Sequence[Pack], topology: Topology) -> np.ndarray:
    """[num_pairs, 2] sums (chosen, rejected) in nats, float64, on every rank; `packs` are this rank's share."""
    sums = torch.zeros(num_pairs, 2, dtype=torch.float64, device=topology.device)

    def collect(batch: MicroBatch, logp_S: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        chosen, rejected = side_sums(batch, logp_S)
        sums[to_device(batch.pack.pair_index, sums.device)] = torch.stack([chosen, rejected], dim=1).double()
        return logp_S.sum(), torch.full((), len(chosen), dtype=torch.int, device=logp_S.device), {}

    forward_backward(chunks, packs, collect, topology, forward_only=True)
    sum_over_replicas(sums)
    return sums.cpu().numpy()

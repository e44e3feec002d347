"""The reference pass: one forward over the data with the initial policy, cached on disk.

The frozen reference is the model before its first update, so its log-probabilities come from the very model, precision,
layout and kernels that training uses, once. The cache's name is a digest of everything they depend on.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from spot_megatron.data.dataset import PreferencePairDataset
from spot_megatron.data.pack import Pack
from spot_megatron.errors import CheckpointError
from spot_megatron.files import dump_line, write_rows
from spot_megatron.model.attention.cuda import pick_kernel
from spot_megatron.model.config import DTYPES
from spot_megatron.model.gpt import PairGPT
from spot_megatron.parallel.device import to_device
from spot_megatron.parallel.groups import Topology
from spot_megatron.recipe import Recipe
from spot_megatron.train.batches import one_pass
from spot_megatron.train.finite import check_forward
from spot_megatron.train.gate import SIGMAS, noise
from spot_megatron.train.microbatch import MicroBatch, side_sums
from spot_megatron.train.run_folder import from_main, say
from spot_megatron.train.step import forward_backward, sum_over_replicas

if TYPE_CHECKING:
    from spot_megatron.train.setup import Setup

SAMPLE = 8  # pairs that are computed again when a cache is read


def computed_by(recipe: Recipe, device: str) -> str:
    """Software, device and attention kernel behind this process's numbers."""
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


def reference_key(job: Setup) -> str:
    """Hex digest naming a cache: weights, tokens, precision, layout, split of the model, software and device.

    Packing and data parallelism are not part of it: they change sums by rounding only, which check_sample bounds.
    """
    split = job.recipe.parallel.model_dump(exclude={"timeout_minutes"})
    parts = {
        "weights": job.weights_digest,
        "pairs": job.dataset.fingerprint(),
        "precision": job.recipe.precision.model_dump(),
        "layout": job.recipe.data.layout,
        "split": split,
        "software": computed_by(job.recipe, job.topology.device.type),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def reference_pass(job: Setup, chunks: Sequence[PairGPT]) -> np.ndarray:
    """[num pairs, 2] log-probability sums of the training pairs; see cached_reference. Writes reference.jsonl."""
    reference = cached_reference(job, chunks, "reference pass")
    if job.topology.is_main:
        write_rows(job.folder / "reference.jsonl", rows_of(job.dataset, reference))
    return reference


def cached_reference(job: Setup, chunks: Sequence[PairGPT], name: str) -> np.ndarray:
    """[num pairs, 2] log-probability sums (chosen, rejected) in nats, float64, equal on every rank. Collective.

    They are read from the cache where it has them, and a sample is computed again; else they are computed and cached.
    `name` is the pass's in messages.

    Raises:
        CheckpointError: the cache is damaged, or differs from the sample.
        TrainingError: a log-probability is not finite.
    """
    topology, dataset = job.topology, job.dataset
    cache = job.folder.parent / "reference_cache" / f"{reference_key(job)}.jsonl"
    cached: np.ndarray | None = from_main(lambda: read_reference(cache, dataset) if cache.exists() else None, topology)
    if cached is None:
        start = time.perf_counter()
        reference = reference_sums(chunks, len(dataset), all_packs(job), topology)
        check_forward([pair.id for pair in dataset.pairs], reference, name)
        if topology.is_main:
            write_reference(cache, dataset, reference)
        say(topology, f"{name}: {time.perf_counter() - start:.1f} s")
    else:
        reference = cached
        check_sample(job, chunks, reference, cache)
        say(topology, f"{name}: read from {cache}")
    return reference


def all_packs(job: Setup) -> Iterator[list[Pack]]:
    """This rank's share of the data, a list of packs at a time; each list has as many on every rank."""
    batches = one_pass(job.recipe, job.dataset, job.hf, job.topology)
    return (job.lay_out(batches.plan(step)) for step in range(batches.num_steps))


def check_sample(job: Setup, chunks: Sequence[PairGPT], reference: np.ndarray, cache: Path) -> None:
    """Computes SAMPLE pairs again, spread over the data, and compares them with `reference`. Collective.

    Raises:
        CheckpointError: a side differs by more than the step-0 gate allows.
    """
    sample = sample_of(len(reference), SAMPLE)
    again = sample_sums(job, chunks, sample)
    lengths = np.array([[len(job.dataset.pairs[i].chosen_ids), len(job.dataset.pairs[i].rejected_ids)] for i in sample])
    drift = np.abs(again - reference[sample]) / np.sqrt(np.maximum(lengths, 1))
    bound = SIGMAS * noise(job.recipe.precision)
    if not (drift <= bound).all():
        worst = job.dataset.pairs[sample[drift.max(axis=1).argmax()]].id
        raise CheckpointError(
            f"{cache} does not fit this model: pair {worst}, computed again, differs by {drift.max():.2e} nats x "
            f"sqrt(tokens) (allowed {bound:.2e}); delete the file"
        )


def sample_of(num_pairs: int, size: int) -> np.ndarray:
    """Indices of at most `size` pairs, spread over the data."""
    return np.unique(np.linspace(0, num_pairs - 1, min(size, num_pairs)).round().astype(int))


def sample_sums(job: Setup, chunks: Sequence[PairGPT], sample: np.ndarray) -> np.ndarray:
    """[len(sample), 2] sums (chosen, rejected) in nats of the pairs `sample`, each in its own pack. Collective."""
    ranks, stages = job.topology.data_size, job.topology.pipeline_size
    count = -(-len(sample) // (ranks * stages)) * stages  # micro-batches a rank: interleaved stages need a multiple
    plan = [[[int(i)] for i in sample[rank::ranks]] for rank in range(ranks)]
    plan = [bins + [[] for _ in range(count - len(bins))] for bins in plan]
    return reference_sums(chunks, len(job.dataset), [job.lay_out(plan)], job.topology)[sample]


def reward_means(rewards_N2: np.ndarray) -> dict[str, float]:
    """Means over N pairs of their (chosen, rejected) rewards, by the names of metrics.jsonl."""
    chosen, rejected = rewards_N2.T
    return {
        "reward_chosen": float(chosen.mean()),
        "reward_rejected": float(rejected.mean()),
        "reward_margin": float((chosen - rejected).mean()),
        "reward_accuracy": float((chosen > rejected).mean()),
    }


def rows_of(dataset: PreferencePairDataset, sums: np.ndarray) -> list[dict[str, Any]]:
    """One object a pair: id, logp_chosen, logp_rejected."""
    return [
        {"id": pair.id, "logp_chosen": chosen, "logp_rejected": rejected}
        for pair, (chosen, rejected) in zip(dataset.pairs, sums.tolist(), strict=True)
    ]


def write_reference(path: Path, dataset: PreferencePairDataset, sums: np.ndarray) -> None:
    """The rows of the pairs, then the SHA-256 of their lines. Written atomically."""
    rows = rows_of(dataset, sums)
    digest = hashlib.sha256(b"".join(map(dump_line, rows))).hexdigest()
    write_rows(path, [*rows, {"sha256": digest}])


def read_reference(path: Path, dataset: PreferencePairDataset) -> np.ndarray:
    """[num pairs, 2] sums that write_reference wrote. Raises CheckpointError if a byte of them has changed."""
    *lines, last = path.read_bytes().splitlines(keepends=True) or [b""]
    if last != dump_line({"sha256": hashlib.sha256(b"".join(lines)).hexdigest()}):
        raise CheckpointError(f"{path} is damaged: its lines do not have the SHA-256 of its last line; delete the file")
    rows = [json.loads(line) for line in lines]
    if [row["id"] for row in rows] != [pair.id for pair in dataset.pairs]:
        raise CheckpointError(f"{path} does not list this data's pairs although its name says so; delete the file")
    return np.array([[row["logp_chosen"], row["logp_rejected"]] for row in rows], dtype=np.float64)


def reference_sums(
    chunks: Sequence[PairGPT], num_pairs: int, batches: Iterable[Sequence[Pack]], topology: Topology
) -> np.ndarray:
    """[num_pairs, 2] sums (chosen, rejected) in nats, float64, on every rank; zeros for pairs that no pack holds."""
    return forward_pass(
        chunks, (num_pairs, 2), batches, topology, lambda batch, logp_S: torch.stack(side_sums(batch, logp_S), dim=1)
    )


@torch.no_grad()
def forward_pass(
    chunks: Sequence[PairGPT],
    shape: tuple[int, int],
    batches: Iterable[Sequence[Pack]],
    topology: Topology,
    values_of: Callable[[MicroBatch, Tensor], Tensor],
) -> np.ndarray:
    """K values of every pair, `shape` [num pairs, K] float64, on every rank; zeros for pairs that no pack holds.

    Args:
        batches: this rank's packs, forwarded one list after the other.
        values_of: on the last stage, (micro-batch, token log-probabilities [S]) -> [B, K], equal on every context rank.
    """
    values = torch.zeros(shape, dtype=torch.float64, device=topology.device)

    def collect(batch: MicroBatch, logp_S: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        values[to_device(batch.pack.pair_index, values.device)] = values_of(batch, logp_S).double()
        num_pairs = len(batch.pack.pair_index)
        return logp_S.sum(), torch.full((), num_pairs, dtype=torch.int, device=logp_S.device), {}

    for packs in batches:
        forward_backward(chunks, packs, collect, topology, forward_only=True)
    sum_over_replicas(values)
    return values.cpu().numpy()

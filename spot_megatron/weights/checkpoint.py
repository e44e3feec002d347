"""The model part of a Megatron distributed checkpoint, written and read under any parallel split; its checksums."""

from __future__ import annotations

import json
import pickle
import queue
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from torch.distributed.checkpoint.api import CheckpointException

from spot_megatron.errors import CheckpointError
from spot_megatron.hf.checksums import file_names, sums_of, verify_checksums, write_checksums
from spot_megatron.model.gpt import PairGPT
from spot_megatron.model.lora import adapters_of, has_adapters
from spot_megatron.parallel.versions import own_async_writer
from spot_megatron.weights.dist_metadata import METADATA, check_metadata

SHARED_FROM_BYTES = 1 << 30  # of a rank's weights: a replica's writer process takes some 250 MB and seconds of its own


def save_model(chunks: Sequence[PairGPT], folder: Path) -> None:
    """Writes the parameters of `chunks` (unwrapped) into the empty or new `folder`; with LoRA, those of the adapters.
    Collective.

    megatron.core writes metadata.json last, so that a folder without it is incomplete. It starts writer processes: the
    program needs an `if __name__ == "__main__"` guard.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _save(chunks, folder)


class ModelWrite:
    """save_model in three parts, of which the second may run in a thread. The weights are copied when it is made."""

    def __init__(self, chunks: Sequence[PairGPT], folder: Path) -> None:
        """Collective."""
        folder.mkdir(parents=True, exist_ok=True)
        self._request = _save(chunks, folder, async_sharded_save=True, **own_async_writer())
        self._results: dict[int, Any] = {}
        staged = self._request.preload_fn() if self._request.preload_fn else []
        self._buckets = [
            (path, key, (texts, [(item, tensor.clone() if on_cpu(chunks) else tensor) for item, tensor in tensors]))
            for path, key, (texts, tensors) in staged
        ]

    def write(self) -> None:
        """Writes this rank's files. megatron.core's own function forks processes, which a thread should not."""
        for number, bucket in enumerate(self._buckets):
            written, running = queue.SimpleQueue[tuple[int, Any]](), queue.Queue[int]()
            running.put(number)
            FileSystemWriterAsync.write_preloaded_data(
                self._request.async_fn.args[0],  # transforms of the storage writer
                local_proc_idx=number,
                write_bucket=bucket,
                results_queue=written,
                count_queue=running,
                use_fsync=True,
            )
            _, results = written.get()
            if isinstance(results, Exception):
                raise results
            self._results[number] = results
        self._buckets.clear()

    def finish(self) -> None:
        """Writes .metadata and metadata.json. Collective; after `write` on every rank.

        megatron.core passes results through one queue of the process. They are put there only now: those of a save that
        is never finished would become the metadata of the next one.
        """
        if self._results:
            self._request.async_fn_args[2].put(self._results)
        for finalize in self._request.finalize_fns:
            finalize()


def on_cpu(chunks: Sequence[PairGPT]) -> bool:
    return next(chunks[0].parameters()).device.type == "cpu"


def _save(chunks: Sequence[PairGPT], folder: Path, **options: Any) -> AsyncRequest:
    """megatron.core's save; with async_sharded_save its plan, and no file is written yet. Collective."""
    strategy = get_default_save_sharded_strategy()
    replicas = mpu.get_data_parallel_group(with_context_parallel=True)
    trained = [parameter for chunk in chunks for parameter in chunk.parameters() if parameter.requires_grad]
    num_bytes = sum(parameter.nbytes for parameter in trained)
    if replicas.size() > 1 and num_bytes > SHARED_FROM_BYTES:  # else the first replica writes everything
        strategy = FullyParallelSaveStrategyWrapper(strategy, replicas)
    return dist_checkpointing.save(
        model_state(chunks), str(folder), strategy, content_metadata=_content(chunks), **options
    )


def load_model(chunks: Sequence[PairGPT], folder: Path) -> None:
    """Fills `chunks` from a folder of save_model, written under any parallel split. Collective.

    Rows that pad the vocabulary become zero where the checkpoint has fewer; values are cast to the parameters' type.

    Raises:
        CheckpointError: the folder is incomplete or damaged, or belongs to another model.
    """
    check_format(folder)
    content = _read_content(folder)
    if content != _content(chunks):  # megatron.core accepts any vocabulary size, because of the padding
        raise CheckpointError(f"{folder} holds another model: {content} instead of {_content(chunks)}")
    try:
        loaded = dist_checkpointing.load(model_state(chunks), str(folder), strict="raise_all")
    except (
        CheckpointException,
        CheckpointingException,
        pickle.UnpicklingError,
        OSError,
        EOFError,
        ValueError,
    ) as error:
        raise CheckpointError(f"{folder} is damaged or holds another model: {one_line(error)}") from error
    for key, chunk in zip(_keys(chunks), chunks, strict=True):
        missing, unexpected = chunk.load_state_dict(loaded[key], strict=False)
        assert not unexpected, unexpected
        assert has_adapters(chunk) or all(name.endswith("_extra_state") for name in missing), missing


def check_format(folder: Path) -> None:
    """Checks the files of a Megatron distributed checkpoint before megatron.core reads them.

    Raises:
        CheckpointError: a file is missing or damaged, or loading it could run code.
    """
    for name in ("metadata.json", METADATA):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} is not a complete Megatron distributed checkpoint: {name} is missing")
    try:
        backend = json.loads((folder / "metadata.json").read_text())["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{folder / 'metadata.json'} is damaged ({error!r}); use another checkpoint") from None
    if backend != "torch_dist":
        raise CheckpointError(f"{folder / 'metadata.json'}: the format {str(backend)!r} is not supported")
    check_metadata(folder)


def save_checksums(folder: Path, known: Mapping[str, str] | None = None) -> None:
    """Writes SHA256SUMS of all files in a complete checkpoint. Collective: each rank reads its share of the files.

    `known` holds digests that this rank has computed already.
    """
    of_ranks = _gather_sums(known or {})
    rank, world_size = dist.get_rank(), dist.get_world_size()
    names = [name for name in file_names(folder) if name not in of_ranks]
    of_ranks |= _gather_sums(sums_of(folder, names[rank::world_size]))
    if rank == 0:
        write_checksums(folder, of_ranks)
    dist.barrier()


def _gather_sums(mine: Mapping[str, str]) -> dict[str, str]:
    """All ranks' digests, on every rank. Collective."""
    shares: list[Mapping[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(shares, dict(mine))
    return {name: digest for share in shares for name, digest in share.items()}


def check_checksums(folder: Path) -> None:
    """Compares a checkpoint with its SHA256SUMS, if it has one. Collective: each rank reads its share of the files.

    Raises:
        CheckpointError: a file is missing, added, truncated or changed. Every rank raises, naming the same file.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    message: str | None = None
    try:
        verify_checksums(folder, CheckpointError, rank=rank, world_size=world_size)
    except CheckpointError as error:
        message = str(error)
    messages: list[str | None] = [None] * world_size
    dist.all_gather_object(messages, message)
    first = next(filter(None, messages), None)
    if first is not None:
        raise CheckpointError(first)


def _content(chunks: Sequence[PairGPT]) -> dict[str, int]:
    """Facts that the shapes on disk do not hold, because of the padding."""
    return {"vocab_size": chunks[0].real_vocab_size}


def _read_content(folder: Path) -> dict[str, int] | None:
    """Reads common.pt, or, with Megatron-Core 0.19, the place among the tensors that older versions do not read."""
    try:
        return dist_checkpointing.load_content_metadata(str(folder))
    # AttributeError: Megatron-Core 0.16 raises it if common.pt is missing.
    except (
        CheckpointingException,
        RuntimeError,
        pickle.PickleError,
        OSError,
        EOFError,
        ValueError,
        AttributeError,
    ) as error:
        newer = "" if (folder / "common.pt").exists() else ", or was written by a newer Megatron-Core"
        raise CheckpointError(f"{folder} is damaged{newer}: {one_line(error)}") from error
    except CheckpointException as error:
        raise CheckpointError(f"{folder} is damaged: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """Kind and text of an error; of one that wraps the ranks' own errors, which are often the same, the first."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__} {' '.join(str(error).split())}"[:300]


def model_state(chunks: Sequence[PairGPT]) -> dict[str, Any]:
    """Each chunk's sharded state dict, without Transformer Engine's `_extra_state`; with LoRA, that of its adapters.

    That state is empty except under FP8 with delayed scaling, which is not supported; without it a checkpoint can be
    loaded both with Transformer Engine and on the CPU.
    """
    return {
        key: _adapter_state(chunk) if has_adapters(chunk) else _whole_state(chunk)
        for key, chunk in zip(_keys(chunks), chunks, strict=True)
    }


def _whole_state(chunk: PairGPT) -> dict[str, Any]:
    return {name: value for name, value in chunk.sharded_state_dict().items() if not name.endswith("_extra_state")}


def _adapter_state(chunk: PairGPT) -> dict[str, ShardedTensor]:
    """The chunk's adapters as parts of a distributed checkpoint. Keys are global names, so any split can load them."""
    found = {}
    for name, adapter in adapters_of(chunk):
        layout = adapter.layout
        replica = (
            mpu.get_expert_data_parallel_rank()
            if layout.is_expert
            else mpu.get_data_parallel_rank(with_context_parallel=True)
        )
        for matrix, side, parameter in adapter.named_sides():
            dim, rank = layout.split_dim(side), layout.ranks.rank()
            offsets = [] if dim is None else [(dim, rank, layout.ranks.size())]
            found[f"{name}.{matrix.leaf}_{side}"] = ShardedTensor.from_rank_offsets(
                f"{matrix.module}.lora_{side}",
                parameter,
                *offsets,
                replica_id=(0, rank if dim is None else 0, replica),
            )
    return found


def _keys(chunks: Sequence[PairGPT]) -> list[str]:
    """A key for each model chunk (virtual pipeline stage) of this process; on disk, layers have their global number."""
    return [f"model{number}" for number in range(len(chunks))]

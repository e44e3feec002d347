"""The model part of a Megatron distributed checkpoint: any parallel layout writes it, any other reads it."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from torch.distributed.checkpoint.api import CheckpointException

from spot_megatron.errors import CheckpointError
from spot_megatron.model.gpt import PairGPT

SHARED_FROM_BYTES = 1 << 30  # of a rank's weights: a replica's writer process takes some 250 MB and seconds of its own


def save_model(chunks: Sequence[PairGPT], folder: Path) -> None:
    """Writes the parameters of `chunks` (unwrapped) into the empty or new `folder`. Collective.

    megatron.core writes metadata.json last, so that a folder without it is incomplete. It starts processes for the
    writing: the program needs an `if __name__ == "__main__"` guard.
    """
    folder.mkdir(parents=True, exist_ok=True)
    strategy = get_default_save_sharded_strategy()
    replicas = mpu.get_data_parallel_group(with_context_parallel=True)
    num_bytes = sum(parameter.nbytes for chunk in chunks for parameter in chunk.parameters())
    if replicas.size() > 1 and num_bytes > SHARED_FROM_BYTES:  # else the first replica writes everything
        strategy = FullyParallelSaveStrategyWrapper(strategy, replicas)
    dist_checkpointing.save(model_state(chunks), str(folder), strategy, content_metadata=_content(chunks))


def load_model(chunks: Sequence[PairGPT], folder: Path) -> None:
    """Fills `chunks` from save_model's folder, whatever the parallel layout that wrote it. Collective.

    Rows that pad the vocabulary become zero where the checkpoint has fewer; values are cast to the parameters' type.

    Raises:
        CheckpointError: the folder is no complete checkpoint, or is another model's.
    """
    for name in ("metadata.json", ".metadata"):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} is no complete Megatron distributed checkpoint: {name} is missing")
    content = _read_content(folder)
    if content != _content(chunks):  # megatron.core accepts any number of rows, because of the padding
        raise CheckpointError(f"{folder} holds another model: {content}, where {_content(chunks)} is wanted")
    try:
        loaded = dist_checkpointing.load(model_state(chunks), str(folder), strict="raise_all")
    except CheckpointException as error:  # one reason a rank; they have the same
        reason = next(iter(error.failures.values()))[0]
        raise CheckpointError(f"{folder} is damaged or holds another model: {one_line(reason)}") from error
    except (CheckpointingException, pickle.UnpicklingError, OSError, EOFError, ValueError) as error:
        raise CheckpointError(f"{folder} is damaged or holds another model: {one_line(error)}") from error
    for key, chunk in zip(_keys(chunks), chunks, strict=True):
        missing, unexpected = chunk.load_state_dict(loaded[key], strict=False)
        assert not unexpected, unexpected
        assert all(name.endswith("_extra_state") for name in missing), missing


def _content(chunks: Sequence[PairGPT]) -> dict[str, int]:
    """What the shapes on disk do not tell."""
    return {"vocab_size": chunks[0].real_vocab_size}


def _read_content(folder: Path) -> dict[str, int] | None:
    """From common.pt, or where Megatron-Core 0.19 puts it: among the tensors, where older ones do not look."""
    try:
        return dist_checkpointing.load_content_metadata(folder)
    # AttributeError: how Megatron-Core 0.16 tells that common.pt is missing.
    except (
        CheckpointingException,
        RuntimeError,
        pickle.PickleError,
        OSError,
        EOFError,
        ValueError,
        AttributeError,
    ) as error:
        newer = "" if (folder / "common.pt").exists() else ", or a newer Megatron-Core than this one wrote it"
        raise CheckpointError(f"{folder} is damaged{newer}: {one_line(error)}") from error
    except CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise CheckpointError(f"{folder} is damaged: {one_line(reason)}") from error


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__} {' '.join(str(error).split())}"[:300]


def model_state(chunks: Sequence[PairGPT]) -> dict[str, Any]:
    """Each chunk's sharded state dict, without Transformer Engine's `_extra_state`.

    That state is empty except under FP8 with delayed scaling, which is not offered; without it a checkpoint moves
    between Transformer Engine and the CPU.
    """
    return {
        key: {name: value for name, value in chunk.sharded_state_dict().items() if not name.endswith("_extra_state")}
        for key, chunk in zip(_keys(chunks), chunks, strict=True)
    }


def _keys(chunks: Sequence[PairGPT]) -> list[str]:
    """The names of virtual pipeline stages in this process; on disk layers have their global number."""
    return [f"model{number}" for number in range(len(chunks))]

"""A checkpoint whose files a thread writes while training continues.

The ranks plan the files and copy weights and optimizer state to host memory, then each rank's thread writes and digests
its own files. A thread issues no collectives: they would race with those of training. The ranks finish the checkpoint
together between two steps.
"""

from __future__ import annotations

import threading
from pathlib import Path

import torch
import torch.distributed as dist

from spot_megatron.hf.checksums import sums_of
from spot_megatron.train.optim import Policy
from spot_megatron.train.optimizer_state import OptimizerWrite
from spot_megatron.weights.checkpoint import ModelWrite, save_checksums


class BackgroundWrite:
    """The model and optimizer parts of one checkpoint."""

    def __init__(self, policy: Policy, folder: Path) -> None:
        """Blocks until the state is copied. Collective."""
        self.folder = folder
        self._parts: list[ModelWrite | OptimizerWrite] = [
            ModelWrite(policy.bare, folder / "model"),
            OptimizerWrite(policy, folder / "optimizer"),
        ]
        self._sums: dict[str, str] = {}
        self._error: BaseException | None = None
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        # A daemon: an error in training ends the process without the checkpoint, whose folder is a partial one.
        self._thread = threading.Thread(target=self._write, args=(device,), name="checkpoint", daemon=True)
        self._thread.start()

    def _write(self, device: int | None) -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)  # a thread begins on the first
            for part in self._parts:
                part.write()
            mine = self.folder.rglob(f"__{dist.get_rank()}_*.distcp")
            self._sums = sums_of(self.folder, [path.relative_to(self.folder).as_posix() for path in mine])
        except BaseException as error:  # raised by finish, on the main thread
            self._error = error

    def is_done_everywhere(self) -> bool:
        """Whether every rank's thread has ended. Collective."""
        flag = torch.full((), float(not self._thread.is_alive()))
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        return bool(flag.item())

    def finish(self) -> None:
        """Blocks until the checkpoint is complete in its folder. Collective.

        Raises:
            OSError, RuntimeError: a thread could not write, on every rank.
        """
        self._thread.join()
        errors: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, None if self._error is None else repr(self._error))
        if self._error is not None:
            raise self._error
        failed = next(filter(None, errors), None)
        if failed is not None:
            raise RuntimeError(f"rank {errors.index(failed)}: {failed}")
        for part in self._parts:
            part.finish()
        save_checksums(self.folder, self._sums)

"""SIGTERM, SIGINT and SIGUSR1 (from Slurm before its time limit) as a request: finish the step, save, and exit."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME_REQUEST_SECONDS = 1.0  # a terminal and Slurm signal a whole family of processes, and a launcher its child again


class StopSignal:
    """Within it, the first such signal and all of the next second are remembered. Later ones act as outside, except
    SIGUSR1, which is ignored."""

    def __init__(self) -> None:
        self._flag = torch.zeros(1)  # on the host: asking does not wait for the update that runs on the device
        self._received_at: float | None = None
        self._before = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def __enter__(self) -> StopSignal:
        for number in self._before:
            signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._received_at is None:
            self._received_at = now
        elif number != signal.SIGUSR1 and now - self._received_at > SAME_REQUEST_SECONDS:
            signal.signal(number, self._before[signal.Signals(number)])
            signal.raise_signal(number)

    def on_any_rank(self) -> bool:
        """True if any rank received such a signal; the same on every rank. Collective."""
        self._flag.fill_(float(self._received_at is not None))
        dist.all_reduce(self._flag, op=dist.ReduceOp.MAX)
        return bool(self._flag.item())

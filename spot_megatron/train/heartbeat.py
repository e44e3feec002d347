"""Each rank's progress as a file, a report when no rank progresses, and an end for all ranks when one fails.

    heartbeat/rank_3         {"step", "doing", "time" in seconds since 1970, "host", "pid", "start"}, as each part of a
                             run begins; touched as long as the process runs; "start" is equal on the ranks of a start
    heartbeat/stuck.txt      which ranks are behind, and since when; also printed, by the rank that notices first
    heartbeat/rank_3.stack   rank 3's stack when it noticed
    heartbeat/nccl_rank_3    NCCL's last collectives (CUDA only), for `torchfrtrace --prefix nccl_rank_ heartbeat`

torch.distributed ends a collective that waits longer than the recipe's parallel.timeout_minutes with an error of its
own. The report comes before that, while every rank is still where it hangs.

A rank that waits in a collective for a rank that has failed cannot handle signals. The thread here sees the failure in
the files (or that the process has gone) and ends its own process GRACE seconds later, when the failed rank has printed
its message.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from spot_megatron.errors import EXIT_FAILURE

REPORT_AT = 0.8  # of the time-out
GRACE = 8.0  # seconds that the processes of a failed run may take to end by themselves
FINISHED, FAILED = "finished", "failed"


class Heartbeat:
    """This rank's file, and a thread that watches over it. The first beat makes the folder.

    `start` is the same on all ranks of a start, and another at each start in the same folder: files of earlier starts
    do not count. Their times cannot say that, since the ranks of one start do not begin at the same moment.
    """

    def __init__(self, run: Path, rank: int, world: int, timeout_minutes: float, start: str) -> None:
        self.folder = run / "heartbeat"
        self._rank, self._world, self._timeout, self._start = rank, world, 60 * timeout_minutes, start
        self._last = time.time()
        self._step = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    def beat(self, step: int, doing: str) -> None:
        """`step` counts the updates begun; 0 stands for the time before the first."""
        self._last = time.time()
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f".rank_{self._rank}"
        self._step = step
        place = {"host": socket.gethostname(), "pid": os.getpid(), "start": self._start}
        beat = {"step": step, "doing": doing, "time": self._last, **place}
        partial.write_text(json.dumps(beat), encoding="utf-8")
        partial.replace(self.folder / f"rank_{self._rank}")

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # the run folder cannot be written: the error that ends the run
            self.beat(self._step, FINISHED if kind is None else f"{FAILED}: {kind.__name__}")

    def _watch(self) -> None:
        limit = REPORT_AT * self._timeout
        while not self._ended.wait(min(limit / 20, 2)):
            self._end_with_failed_rank()
            with contextlib.suppress(FileNotFoundError):  # before the first beat
                os.utime(self.folder / f"rank_{self._rank}")
            if time.time() - self._last > limit:
                self._report()
                return

    def _end_with_failed_rank(self) -> None:
        """Ends this process, if another rank has failed and this one does not end by itself."""
        failed = failed_rank(self.folder, self._world, self._start)
        if failed is None or self._ended.wait(GRACE):
            return
        self.beat(self._step, f"{FAILED}: ended because rank {failed} failed")
        print(f"[rank {self._rank}] ended because rank {failed} failed", file=sys.stderr, flush=True)
        os._exit(EXIT_FAILURE)

    def _report(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"rank_{self._rank}.stack").open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        text = report(self.folder, self._world, self._start, self._timeout)
        try:
            with (self.folder / "stuck.txt").open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            return  # another rank has printed it
        print(text, file=sys.stderr, flush=True)


def failed_rank(folder: Path, world: int, start: str) -> int | None:
    """The first rank of this start that has failed, or whose process on this host has gone before it finished."""
    host = socket.gethostname()
    for rank in range(world):
        with contextlib.suppress(OSError, ValueError):
            beat = _read(folder / f"rank_{rank}")
            if beat is None or beat.get("start") != start or beat["doing"] == FINISHED:
                continue
            if beat["doing"].startswith(FAILED) or (beat["host"] == host and not _is_running(beat["pid"])):
                return rank
    return None


def _is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def report(folder: Path, world: int, start: str, timeout: float) -> str:
    """The text of stuck.txt: the ranks that are behind, and every rank's last beat in this start."""
    now, limit = time.time(), REPORT_AT * timeout
    beats = {
        rank: beat for rank in range(world) if (beat := _read(folder / f"rank_{rank}")) and beat.get("start") == start
    }
    absent = [rank for rank in range(world) if rank not in beats]
    silent = [rank for rank, beat in beats.items() if now - beat["alive"] > limit / 4]
    least = min((beat["step"] for beat in beats.values()), default=0)
    behind = [rank for rank, beat in beats.items() if beat["step"] == least]
    if absent:
        cause = f"{_ranks(absent)} not there yet"
    elif silent:
        cause = f"{_ranks(silent)} stopped or gone, no sign of life"
    elif len(behind) < world:
        cause = f"{_ranks(behind)} behind the others"
    else:
        cause = "all ranks are in the same step; the one whose stack ends outside a collective is the cause"
    lines = [f"STUCK: no progress for {limit:.0f} s: {cause}."]
    for rank, beat in sorted(beats.items(), key=lambda item: (item[1]["step"], item[1]["time"])):
        lines.append(
            f"  rank {rank:<4} step {beat['step']:<6} {beat['doing']}, begun {now - beat['time']:.0f} s ago, "
            f"alive {now - beat['alive']:.0f} s ago, on {beat['host']}"
        )
    lines.append(f"Stack of each rank: {folder}/rank_*.stack")
    lines.append(f"Collectives end with an error after {timeout:.0f} s. Only slow? Raise parallel.timeout_minutes.")
    return "\n".join(lines) + "\n"


def record_collectives(run: Path) -> None:
    """NCCL keeps its last collectives and writes them when one times out. Call it before the process groups start.

    Source: PyTorch's tutorial "Flight Recorder for Debugging Stuck Jobs"; the names TORCH_FR_ are 2.8's.
    """
    prefix = str(run.absolute() / "heartbeat" / "nccl_rank_")
    for name, value in {
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_FR_DUMP_TEMP_FILE": prefix,
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": prefix,
    }.items():
        os.environ.setdefault(name, value)


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:16])) + (f" and {len(ranks) - 16} more" if len(ranks) > 16 else "")
    return f"rank {shown} is" if len(ranks) == 1 else f"ranks {shown} are"


def _read(path: Path) -> dict[str, Any] | None:
    """A rank's last beat, and as "alive" when its process last showed a sign of life."""
    if not path.exists():
        return None
    return json.loads(path.read_text(encoding="utf-8")) | {"alive": path.stat().st_mtime}

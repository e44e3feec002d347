"""kill -9 at random moments: afterwards nothing incomplete is in a result's place, and the same command ends alike."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from spot_megatron.errors import EXIT_USER_ERROR
from tests.faults import programs
from tests.faults.programs import Program
from tests.faults.table import Table

CHAIN = 5  # kills in one folder before its run may finish


def kill_often(
    make: Callable[[Path], Program],
    count: int,
    folder: Path,
    rng: random.Random,
    table: Table,
    kind: str,
    starts_at: Callable[[Program], bool] = lambda program: True,
    share: float = 1.0,
) -> None:
    """Kills `make(output)` `count` times, in chains, and compares each chain's end with an undisturbed run.

    `starts_at` is asked from the start on; the moment of a kill is drawn from the time after it is true, or from its
    first `share`: a program that continues its work has less left at every start.
    """
    undisturbed = make(folder / "undisturbed" / "out")
    undisturbed.folder.parent.mkdir(parents=True)
    log = folder / "undisturbed" / "log.txt"
    process = undisturbed.start(log)
    delay = _until(process, lambda: starts_at(undisturbed))
    code = process.wait()
    assert code == 0, process.output()
    expected = undisturbed.results(undisturbed.folder)
    seconds = max(time.monotonic() - process.started - delay, 0.05)
    chain = 0
    while count > 0:
        chain += 1
        length = min(CHAIN, count)
        count -= length
        program = make(folder / f"chain_{chain}" / "out")
        program.folder.parent.mkdir(parents=True)
        log = program.folder.parent / "log.txt"
        killed, finished = 0, False
        for _ in range(length):
            process = program.start(log)
            _until(process, lambda: starts_at(program))  # noqa: B023
            time.sleep(rng.random() * seconds * share)
            finished = process.poll() is not None
            killed += not finished
            process.kill()
            reason = programs.sound(program)
            if reason is not None:
                table.add(kind, "kill -9", "silent", f"{log}: {reason}")
            if finished:
                break
        if not finished or process.code:  # conversions refuse to write over a finished result
            process = program.start(log)
            process.wait()
        code, output = process.code, process.output()
        if code == EXIT_USER_ERROR and "exists already" in output:  # killed after its last file was in place
            code = 0
        found = program.results(program.folder) if code == 0 else {}
        names = programs.differing(found, expected) if code == 0 else []
        verdict = "lost" if code else "silent" if names else "recovered"
        table.add(kind, "kill -9", verdict, f"{log}: exit code {code}, differing {names}\n{output[-2000:]}", killed)
        count += length - killed  # those that came too late
        if verdict == "recovered":
            shutil.rmtree(program.folder.parent)
        print(f"{kind}: {table.count(kind)} kills", flush=True)


def _until(process: programs.Process, condition: Callable[[], bool]) -> float:
    """Seconds from the start until the condition is true, or the program has ended."""
    while not condition() and process.poll() is None:
        time.sleep(0.005)
    return time.monotonic() - process.started

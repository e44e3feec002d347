"""Faults of the machine: a full disk, a folder that cannot be written, a second run, a rank that dies."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.faults import programs
from tests.faults.table import Table
from tests.processes import free_port


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path | None]:
    """A tmpfs of that size at `folder`; None where this user may not mount."""
    folder.mkdir(parents=True)
    options = ["-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(["mount", *options], capture_output=True).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def full_disk(folder: Path, recipe: Path, expected: dict, count: int, rng: random.Random, table: Table) -> None:
    """The disk, or where nothing can be mounted a file, is full at a random size; then there is room."""
    for number in range(count):
        kilobytes = rng.randrange(100, 24_000)
        with small_disk(folder / f"disk_{number}", kilobytes) as disk:
            program = programs.train((disk or folder / f"run_{number}") / "out", recipe)
            limit = None if disk else 1024 * rng.randrange(10, 3_000)
            code, output = program.run(folder / "full.txt", bytes_limit=limit)
            reason = programs.sound(program)
            if reason is not None:
                table.add("train", "disk full", "silent", reason)
            if disk:
                remount(disk, "size=256m")
            again, later = program.run(folder / "later.txt")
            same = again == 0 and not programs.differing(program.results(program.folder), expected)
            words = ("are free on its disk", "No space left on device", "File too large")
            is_named = code == 0 or (code == 2 and str(program.folder) in output and any(w in output for w in words))
            is_named = is_named and "Traceback" not in output
            verdict = "lost" if again else "silent" if not same else "recovered" if is_named else "unnamed"
            table.add("train", "disk full", verdict, f"{kilobytes} kB: {output[-1500:]}\n{later[-1500:]}")
    print("disk full: done", flush=True)


def read_only(folder: Path, recipe: Path, table: Table) -> None:
    with small_disk(folder / "read_only", 1000) as disk:
        if disk is None:
            print("read-only folder: not tried, this user may not mount")
            return
        remount(disk, "ro")
        code, output = programs.train(disk / "out", recipe).run(folder / "log.txt")
        is_named = code == 2 and str(disk) in output and "Traceback" not in output
        table.add("train", "read-only folder", "detected" if is_named else "unnamed", output)
    print("read-only folder: done", flush=True)


def two_runs(folder: Path, recipe: Path, expected: dict, table: Table) -> None:
    """The second starts while the first is stopped within its training, and is refused."""
    folder.mkdir(parents=True)
    program = programs.train(folder / "out", recipe)
    first = program.start(folder / "first.txt")
    while not (folder / "out" / "metrics.jsonl").exists() and first.poll() is None:
        time.sleep(0.005)
    os.kill(first.pid, signal.SIGSTOP)
    code, output = program.run(folder / "second.txt")
    os.kill(first.pid, signal.SIGCONT)
    refused = code == 2 and f"process {first.pid}" in output and "is training in" in output
    table.add("train", "second run in the folder", "detected" if refused else "unnamed", f"{code}: {output}")
    assert first.wait() == 0, first.output()
    names = programs.differing(program.results(program.folder), expected)
    if names:
        table.add("train", "second run in the folder", "silent", str(names))
    print("two runs: done", flush=True)


def rank_killed(folder: Path, recipe: Path, count: int, rng: random.Random, table: Table) -> None:
    """Two data-parallel ranks without torchrun, one killed while both train; then both start again."""

    def start(output: Path) -> list[programs.Process]:
        program, port = programs.train(output, recipe), str(free_port())
        common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        logs = [output.parent / f"rank_{rank}.txt" for rank in range(2)]
        return [
            program.start(log, environment=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank, log in enumerate(logs)
        ]

    def finish(output: Path) -> dict:
        ranks = start(output)
        codes = [rank.wait() for rank in ranks]
        assert codes == [0, 0], "\n".join(rank.output() for rank in ranks)
        return programs.trained(output)

    (folder / "undisturbed").mkdir(parents=True)
    expected = finish(folder / "undisturbed" / "out")
    for number in range(count):
        output = folder / f"killed_{number}" / "out"
        output.parent.mkdir()
        ranks = start(output)
        while not (output / "metrics.jsonl").exists() and all(rank.poll() is None for rank in ranks):
            time.sleep(0.005)
        time.sleep(rng.random() * 0.3)
        victim = rng.randrange(2)
        ranks[victim].kill()
        begin = time.monotonic()
        code = ranks[1 - victim].wait(120)
        seconds = time.monotonic() - begin
        output_text = ranks[1 - victim].output()
        same = not programs.differing(finish(output), expected)
        table.add("train on 2 ranks", "one rank killed", "recovered" if same else "silent", output_text[-1500:])
        print(f"rank {victim} killed: the other ended after {seconds:.1f} s with code {code}", flush=True)

"""Writes planned output files with several processes: resumable, with checksums and a progress bar.

A journal lists finished files with their SHA-256. A conversion that was killed resumes with the missing files; it reads
the existing ones once and keeps those that match the journal.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from spot_megatron.errors import WeightError
from spot_megatron.files import file_sha256
from tools.convert.copy_plan import Failed, OutputFile, Written, plan_digest

JOURNAL = ".journal.jsonl"


def copy_files(files: Sequence[OutputFile], folder: Path, num_workers: int) -> list[Written]:
    """Writes every file into `folder`, which may hold some of them from an earlier run of the same plan.

    Raises:
        WeightError: the disk is full, or a file cannot be read or written; finished files are kept.
    """
    done = _resume(files, folder)
    waiting = [file for file in files if file.name not in done]
    total, left = sum(f.num_bytes for f in files), sum(f.num_bytes for f in waiting)
    free = shutil.disk_usage(folder).free
    if left > free:
        raise WeightError(
            f"{folder.parent}: {left / 1e9:.2f} GB are to be written, {free / 1e9:.2f} GB are free; free disk space"
        )
    start = time.perf_counter()
    bar = tqdm(total=total, initial=total - left, unit="B", unit_scale=True, disable=None, smoothing=0.1)
    with bar, (folder / JOURNAL).open("a") as journal:
        for written in _run(waiting, folder, num_workers, bar):
            journal.write(json.dumps(asdict(written)) + "\n")
            journal.flush()
            os.fsync(journal.fileno())
            done[written.name] = written
    seconds = time.perf_counter() - start
    kept = f", {len(files) - len(waiting)} of {len(files)} files kept from before" if len(waiting) < len(files) else ""
    print(f"{left / 1e9:.3f} GB in {seconds:.1f} s, {left / 1e9 / seconds:.2f} GB/s{kept}", file=sys.stderr)
    return [done[file.name] for file in files]


def _resume(files: Sequence[OutputFile], folder: Path) -> dict[str, Written]:
    """The finished files of this plan. Removes all other files from the folder."""
    plan = {"plan": plan_digest(files), "inputs": _input_states(files)}
    lines = (folder / JOURNAL).read_text().splitlines() if (folder / JOURNAL).exists() else []
    noted = []
    for line in lines:
        try:
            noted.append(json.loads(line))
        except ValueError:  # cut off when the process was killed
            break
    done: dict[str, Written] = {}
    if noted and noted[0] == plan:
        for entry in noted[1:]:
            written = Written(**{**entry, "bad_names": tuple(entry["bad_names"])})
            file = folder / written.name
            if file.exists() and file_sha256(file) == written.sha256:
                done[written.name] = written
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in done:
            path.unlink()
    journal = "".join(json.dumps(entry) + "\n" for entry in (plan, *map(asdict, done.values())))
    (folder / JOURNAL).write_text(journal)
    return done


def _input_states(files: Sequence[OutputFile]) -> list[list[str | int]]:
    """Name, length and modification time of every input: a changed input makes another plan."""
    inputs = {stripe.file for file in files for block in file.blocks for rows in block.rows for stripe in rows.stripes}
    return [[name, (stat := os.stat(name)).st_size, stat.st_mtime_ns] for name in sorted(inputs)]


def _run(files: Sequence[OutputFile], folder: Path, num_workers: int, bar: tqdm) -> Iterator[Written]:
    """Yields files as they are finished. The first error stops all processes."""
    answers: queue.Queue[int | Written | Failed | None] = queue.Queue()
    tasks: queue.SimpleQueue[OutputFile] = queue.SimpleQueue()
    for file in sorted(files, key=lambda f: -f.num_bytes):
        tasks.put(file)
    workers = [_start_worker(folder) for _ in range(min(num_workers, len(files)))]
    threads = [threading.Thread(target=_feed, args=(worker, tasks, answers), daemon=True) for worker in workers]
    try:
        for thread in threads:
            thread.start()
        running = len(threads)
        while running:
            content = answers.get()
            if content is None:
                running -= 1
            elif isinstance(content, int):
                bar.update(content)
            elif isinstance(content, Failed):
                raise _explain(content, folder)
            else:
                yield content
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def _start_worker(folder: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "tools.convert.copy_worker"]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    assert worker.stdin is not None
    pickle.dump(folder, worker.stdin)
    worker.stdin.flush()
    return worker


def _feed(worker: subprocess.Popen[bytes], tasks: queue.SimpleQueue, answers: queue.Queue) -> None:
    """Sends files to one worker, one at a time, and forwards its answers; the last one is None."""
    assert worker.stdin is not None and worker.stdout is not None
    try:
        while not tasks.empty():
            try:
                file = tasks.get_nowait()
            except queue.Empty:
                break
            pickle.dump(file, worker.stdin)
            worker.stdin.flush()
            while isinstance(content := pickle.load(worker.stdout), int):
                answers.put(content)
            answers.put(content)
    except (EOFError, BrokenPipeError, pickle.UnpicklingError):
        answers.put(Failed(f"a copy process ended unexpectedly (exit code {worker.wait()})", None))
    answers.put(None)


def _explain(failure: Failed, folder: Path) -> WeightError:
    again = "finished files are kept; run the same command again to resume"
    if failure.errno in (errno.ENOSPC, errno.EDQUOT):
        return WeightError(f"{folder.parent} is full ({failure.message}); free disk space: {again}")
    return WeightError(f"{failure.message}; {again}")

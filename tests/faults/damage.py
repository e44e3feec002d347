"""Flipped bits and cut files: each is refused by name, or an intact checkpoint is used instead, or nothing changes."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.faults import programs
from tests.faults.programs import Program
from tests.faults.table import Table


def flip(path: Path, rng: random.Random) -> str:
    content = bytearray(path.read_bytes())
    place, bit = rng.randrange(len(content)), rng.randrange(8)
    content[place] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {place}"


def cut(path: Path, rng: random.Random) -> str:
    size = path.stat().st_size
    left = 0 if rng.random() < 0.2 else rng.randrange(size)
    with path.open("r+b") as file:
        file.truncate(left)
    return f"{left} of {size} bytes left"


FAULTS: dict[str, Callable[[Path, random.Random], str]] = {"bit flip": flip, "truncation": cut}


def damage(
    kind: str,
    origin: Path,
    file: str,
    make: Callable[[Path], Program],
    expected: dict,
    names: Sequence[str],
    count: int,
    rng: random.Random,
    table: Table,
    faults: Sequence[str] = tuple(FAULTS),
) -> None:
    """Injects each fault `count` times into `file` of a copy of `origin`, then runs `make(copy)`.

    A refusal must contain one of `names`. So must the log of a run that succeeds because something else was used.
    """
    work = origin.with_name(f"{origin.name}_damaged")
    for fault in faults:
        for _ in range(count):
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(origin, work)
            place = FAULTS[fault](work / file, rng)
            program = make(work)
            code, output = program.run(work / "log.txt")
            is_named = any(name in output for name in names) and "Traceback" not in output
            detail = f"{file}, {place}: exit code {code}\n{output[-1500:]}"
            if code:
                table.add(kind, fault, "detected" if code == 2 and is_named else "unnamed", detail)
                continue
            changed = programs.differing(program.results(program.folder), expected)
            detail = f"{detail}\ndiffering: {changed}"
            table.add(kind, fault, "silent" if changed else "recovered" if is_named else "harmless", detail)
    shutil.rmtree(work, ignore_errors=True)
    print(f"{kind}: done", flush=True)

"""`python -m tests.faults [--kills 220] [--damages 6] [--seed N] [--output FILE]`: injects faults and prints a table.

Programs are killed by SIGKILL at random moments, files that the project writes or reads get flipped bits and are cut,
disks fill up, ranks die. The exit code is 1 if a result was lost, changed in silence, or refused without the file's
name. The seed is printed.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import random
import sys
import tempfile
import warnings
from pathlib import Path

PARTS = ("train", "train_async", "reference", "import", "export", "elicit", "rectify", "evaluation", "damage", "world")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=220, help="in all, spread over the programs")
    parser.add_argument("--damages", type=int, default=6, help="of each sort in each kind of file")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    parser.add_argument("--folder", type=Path, help="work folder, which is kept; default: a temporary one")
    parser.add_argument("--output", type=Path, help="also write the table to this file, with date and machine")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OPENAI_API_KEY", "none")
    from tests.faults.suite import run_suite

    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="faults_") as temporary:
        folder = options.folder or Path(temporary)
        table = run_suite(folder, options.parts, options.kills, options.damages, random.Random(options.seed))
    print(table.markdown())
    print("\n\n".join(table.details))
    if options.output:
        machine = f"{os.cpu_count()} CPUs, Linux {platform.release()}, Python {platform.python_version()}"
        header = (
            f"# Injected faults\n\n{datetime.date.today()}, {machine}; `python -m tests.faults --seed {options.seed}"
        )
        options.output.write_text(
            f"{header} --kills {options.kills} --damages {options.damages}`\n\n{table.markdown()}"
        )
    return 1 if table.details else 0


if __name__ == "__main__":
    sys.exit(main())

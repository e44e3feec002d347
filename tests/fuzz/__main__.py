"""`python -m tests.fuzz TARGET [--seconds N] [--corpus DIR]`: coverage-guided fuzzing with atheris (extra `fuzz`).

A target may return or raise UserError; anything else is a finding, which libFuzzer writes to a file and prints. Seeds
are in tests/fuzz/seeds/TARGET. `--replay FILES` runs inputs without atheris.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

SEEDS = Path(__file__).parent / "seeds"


def main() -> int:
    from tests.fuzz.targets import TARGETS

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", type=Path, help="folder that keeps new inputs; default: a temporary one")
    parser.add_argument("--replay", type=Path, nargs="+", metavar="FILE")
    options = parser.parse_args()
    if options.replay:
        for path in options.replay:
            TARGETS[options.target](path.read_bytes())
        return 0
    import atheris

    corpus = options.corpus or Path(tempfile.mkdtemp(prefix="fuzz_"))
    shutil.copytree(SEEDS / options.target, corpus, dirs_exist_ok=True)
    arguments = [f"-max_total_time={options.seconds}", "-timeout=20", "-rss_limit_mb=3000", "-max_len=4096"]
    atheris.Setup([sys.argv[0], *arguments, str(corpus)], TARGETS[options.target])
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())

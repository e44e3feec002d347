"""`python -m tools.report RUN [--against RUN2 ...]`: writes RUN/report.html and prints its path.

The page needs no network. A run that is still training or was killed can be reported as well. `--against` draws other
runs' curves on the same axes and lists the differences between their recipes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from spot_megatron.errors import UserError, print_error
from spot_megatron.report import write_report


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder that `make train` wrote, the recipe's `output`")
    parser.add_argument("--against", type=Path, nargs="+", default=[], metavar="RUN2", help="runs to compare with")
    options = parser.parse_args(arguments)
    try:
        print(write_report(options.run, options.against))
    except UserError as error:
        return print_error(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`make plan`: estimates memory and time of a recipe, and searches faster configurations. Runs without a GPU.

    python -m tools.plan qwen3_8b_spot --gpus 8
    python -m tools.plan qwen3_32b_spot --gpus 16 --gpu h100 --best --figure plan.html

Pairs come from --pairs, else from the recipe's files if they exist, else their lengths are assumed (see --assume).
Exit codes: 0 it fits, 1 it does not, 2 the input is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from spot_megatron.errors import UserError, positive_int, print_error
from spot_megatron.plan.estimate import make_planner
from spot_megatron.plan.hardware import find_gpu
from spot_megatron.plan.search import best_configurations, cheapest_fits
from spot_megatron.plan.text import as_dict, text
from spot_megatron.recipe import load_recipe


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except UserError as error:
        return print_error(error)


def _run(options: argparse.Namespace) -> int:
    gpu = find_gpu(options.gpu)
    recipe = load_recipe(options.recipe, options.overrides)
    planner = make_planner(recipe, gpu, options.pairs, options.assume)
    estimate = planner.estimate(recipe, options.gpus)
    fits = [] if estimate.fits else cheapest_fits(planner, recipe, options.gpus)
    best = best_configurations(planner, recipe, options.gpus) if options.best else []
    print(json.dumps(as_dict(estimate, fits, best), indent=1) if options.json else text(estimate, fits, best))
    if options.figure:
        from spot_megatron.plan.figure import write_figure  # Bokeh takes half a second to import

        write_figure(options.figure, estimate, fits, best)
        print(f"wrote {options.figure}", file=sys.stderr)  # standard output may be --json
    return 0 if estimate.fits else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="name of a recipe in recipes/, or a YAML file")
    parser.add_argument("--gpus", type=positive_int, default=8, help="GPUs of the inputs (default 8)")
    parser.add_argument("--gpu", default="h800", help="h800 (default), h100, h200, a100 or b200, 8 in a node")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="key=value", dest="overrides")
    parser.add_argument("--pairs", nargs="+", type=Path, default=[], help="pair files to plan for")
    parser.add_argument(
        "--assume", nargs="+", default=[], metavar="key=number", help="pairs, prompt, response (tokens), cv, shared"
    )
    parser.add_argument("--best", action="store_true", help="search the fastest configurations that fit")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="write a page with the plan's bars")
    return parser


if __name__ == "__main__":
    sys.exit(main())

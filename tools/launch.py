"""`make train`: checks the recipe, trains with as many processes as it needs, then evaluates the result.

Prints the plain command that it runs. Exit codes are the training program's: 0 done, 1 failure, 2 the input is wrong,
75 stopped by a signal after saving.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
from pathlib import Path

from spot_megatron.errors import EXIT_STOPPED, UserError, positive_int, print_error
from spot_megatron.files import write_text
from spot_megatron.recipe import Recipe, load_recipe
from spot_megatron.report import write_report
from tools.preflight import check_recipe
from tools.training_process import STOP_SIGNALS, run_alone, run_under_torchrun, torchrun_options


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.launch", description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--set", nargs="*", action="extend", default=[], metavar="key=value", dest="overrides")
    parser.add_argument(
        "--processes", type=positive_int, help="processes on this node; default: its GPUs, else the model's ranks"
    )
    parser.add_argument("--nodes", type=positive_int, default=1, help="nodes; start the same command on each of them")
    options = parser.parse_args(arguments)
    try:
        recipe = load_recipe(options.recipe, options.overrides)
        num_gpus = count_gpus(recipe)
        num_processes = options.processes or num_gpus or max(1, recipe.parallel.model_ranks // options.nodes)
        check_recipe(recipe, num_processes * options.nodes, num_gpus)
    except UserError as error:
        return print_error(error)
    command = [
        "-m",
        "spot_megatron.train",
        options.recipe,
        *(["--set", *options.overrides] if options.overrides else []),
    ]
    if num_processes == options.nodes == 1:
        code = run_alone(command)
    else:
        code = run_under_torchrun([*torchrun_options(recipe, num_processes, options.nodes), *command])
    if code == 0 and os.environ.get("NODE_RANK", "0") == "0":
        if recipe.evaluation.questions:
            code = _evaluate(recipe)
        print(f"report: {Path(recipe.output) / 'report.html'}")
    return code


def count_gpus(recipe: Recipe) -> int:
    """GPUs of this node that the recipe may use."""
    import torch

    return torch.cuda.device_count() if recipe.device != "cpu" else 0


def _evaluate(recipe: Recipe) -> int:
    """Evaluates after training and returns the exit code. If it fails, the same command retries it."""
    before = {
        number: signal.signal(number, signal.default_int_handler)
        for number in STOP_SIGNALS
        if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        evaluate(recipe)
    except UserError as error:
        return print_error(error)
    except KeyboardInterrupt:
        print("stopped during the evaluation; run the same command to continue", file=sys.stderr, flush=True)
        return EXIT_STOPPED
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def evaluate(recipe: Recipe) -> None:
    """Evaluates the base and the result on the recipe's questions; writes evaluation.json and the report.

    The responses lie in the run's folder `evaluation`, where the same command continues after a stop.

    Raises:
        UserError: the questions, the base model or the result cannot be used.
    """
    from spot_megatron.hf.hub import resolve_model
    from tools.eval.__main__ import evaluate as evaluate_models
    from tools.eval.__main__ import parser
    from tools.eval.table import table

    run, base_folder, asked = Path(recipe.output), resolve_model(recipe.model.hf), recipe.evaluation
    command = ["--model", str(run / "hf"), "--base", str(base_folder), "--questions", str(asked.questions)]
    for key, value in asked.model_dump(exclude={"questions"}).items():
        command += [f"--{key.replace('_', '-')}", str(value)]
    print("+ python -m tools.eval " + shlex.join(command), flush=True)
    found = evaluate_models(parser().parse_args(command), run / "evaluation")
    write_text(run / "evaluation.json", json.dumps(found, indent=1, ensure_ascii=False))
    print(table(found), flush=True)
    write_report(run)


if __name__ == "__main__":
    sys.exit(main())

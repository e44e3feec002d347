"""`make train`: starts the training program with as many processes as the recipe needs, then asks the result questions.

Prints the plain command that it runs. Exit codes are the training program's: 0 done, 1 failure, 2 the input is wrong,
75 stopped by a signal after saving.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from spot_megatron.errors import EXIT_STOPPED, EXIT_USER_ERROR, UserError, WeightError, positive_int, print_error
from spot_megatron.files import write_text
from spot_megatron.recipe import Recipe, load_recipe
from spot_megatron.report import write_report
from tools.eval.questions import read_questions

RESTARTS = 3  # of a node's processes, each time from the newest checkpoint
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # the training saves on these, see train/stop.py
ONE_REQUEST_SECONDS = 1.0  # `timeout` and others signal a program and then its group: still one request


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
        check_evaluation(recipe)
    except UserError as error:
        return _tell(error)
    num_processes = options.processes or default_processes(recipe, options.nodes)
    command = [
        "-m",
        "spot_megatron.train",
        options.recipe,
        *(["--set", *options.overrides] if options.overrides else []),
    ]
    if num_processes == options.nodes == 1:
        code = _run([sys.executable, *command])
    else:
        code = _torchrun([*torchrun_options(recipe, num_processes, options.nodes), *command])
    if code == 0 and os.environ.get("NODE_RANK", "0") == "0":
        if recipe.evaluation.questions:
            code = _evaluate(recipe)
        print(f"report: {Path(recipe.output) / 'report.html'}")
    return code


def default_processes(recipe: Recipe, num_nodes: int) -> int:
    """The node's GPUs where there are any, else one process a rank of the model."""
    import torch

    num_gpus = torch.cuda.device_count() if recipe.device != "cpu" else 0
    return num_gpus or max(1, recipe.parallel.model_ranks // num_nodes)


def torchrun_options(recipe: Recipe, num_processes: int, num_nodes: int) -> list[str]:
    """On several nodes MASTER_ADDR and MASTER_PORT name the first of them, as under torchrun, and NODE_RANK this one.

    A node that was lost and started again meets the others anew, and the run goes on from its newest checkpoint. Each
    process writes a log of its own; the first of a node, rank 0 among them, is shown as well.
    """
    options = ["--nproc-per-node", str(num_processes)]
    if num_nodes == 1:
        return [*options, "--standalone"]
    address, port = os.environ.get("MASTER_ADDR", "localhost"), os.environ.get("MASTER_PORT", "29500")
    options += ["--nnodes", str(num_nodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{address}:{port}"]
    options += ["--rdzv-id", recipe.name, "--max-restarts", str(RESTARTS if recipe.checkpoint.resume == "auto" else 0)]
    meeting = "read_timeout=600"  # seconds to wait for the first node; else 60
    if "NODE_RANK" in os.environ:  # else torchrun looks whether the address is this node's, which it cannot always tell
        meeting += f",is_host={int(os.environ['NODE_RANK'] == '0')}"
    logs = Path(recipe.output) / "logs" / f"node_{os.environ.get('NODE_RANK', '0')}"
    return [*options, "--rdzv-conf", meeting, "--log-dir", str(logs), "--redirects", "3", "--tee", "0:3"]


def _torchrun(arguments: list[str]) -> int:
    """Runs torchrun in this process. It turns every failure into 1, but its error knows what failed first, and how."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher import api

    class Agent(api.LocalElasticAgent):
        """Starts failed processes again, except after a refused input or a stop that was asked for."""

        def _monitor_workers(self, worker_group: Any) -> Any:
            result = super()._monitor_workers(worker_group)
            if any(failure.exitcode in (EXIT_USER_ERROR, EXIT_STOPPED) for failure in result.failures.values()):
                self._remaining_restarts = 0
                self._exit_barrier_timeout = 30  # the first node holds the store, and must not leave before the others
                self._exit_barrier()
            return result

    print("+ torchrun " + shlex.join(arguments), flush=True)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")  # seconds to save in after SIGTERM; else 30
    # A store that the agents share tells a node that comes back nothing: it waits for rank 0 (pytorch issue 135712).
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    api.LocalElasticAgent = Agent  # type: ignore[misc]
    try:
        run.main(arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode not in (EXIT_USER_ERROR, EXIT_STOPPED):
            print(f"rank {rank} failed first, with exit code {failure.exitcode}", file=sys.stderr, flush=True)
        return failure.exitcode
    except RendezvousError as error:
        print(f"the nodes could not meet (again): {error}", file=sys.stderr, flush=True)
        return 1
    except SignalException:
        return EXIT_STOPPED
    return 0


def check_evaluation(recipe: Recipe) -> None:
    """What the questions after the training need, looked at before it.

    Raises:
        UserError: the question file is wrong, or the model folder has no tokenizer to ask with.
    """
    if recipe.evaluation.questions is None:
        return
    read_questions(Path(recipe.evaluation.questions))
    folder = Path(recipe.model.hf).expanduser()
    if folder.is_dir() and not any(folder.glob("tokenizer*")):
        raise WeightError(
            f"evaluation.questions: the questions are texts, and {folder} has no tokenizer; copy the model's "
            "tokenizer.json and tokenizer_config.json there, or leave evaluation.questions out"
        )


def _evaluate(recipe: Recipe) -> int:
    """Asks the questions and tells what stops it. The training is done and stays; the same command asks again."""
    before = {
        number: signal.signal(number, signal.default_int_handler)
        for number in STOP_SIGNALS
        if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        evaluate(recipe)
    except UserError as error:
        return _tell(error)
    except KeyboardInterrupt:
        print("stopped in the evaluation; run the same command to go on", file=sys.stderr, flush=True)
        return EXIT_STOPPED
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def evaluate(recipe: Recipe) -> None:
    """The base and the result answer the recipe's questions; the run keeps the answer and its report shows it.

    Raises:
        UserError: the questions, the base model or the result cannot be used.
    """
    from transformers.utils import logging as transformers_logging

    from spot_megatron.hf.hub import resolve_model
    from tools.eval.accuracy import evaluate as accuracy_of
    from tools.eval.accuracy import table
    from tools.eval.sample import Decoding

    transformers_logging.disable_progress_bar()
    run, base_folder, asked = Path(recipe.output), resolve_model(recipe.model.hf), recipe.evaluation
    command = ["--model", str(run / "hf"), "--base", str(base_folder), "--questions", str(asked.questions)]
    for key, value in asked.model_dump(exclude={"questions"}, exclude_defaults=True).items():
        command += [f"--{key.replace('_', '-')}", str(value)]
    print("+ python -m tools.eval " + shlex.join(command), flush=True)
    questions = read_questions(Path(str(asked.questions)))
    decoding = Decoding(**asked.model_dump(exclude={"questions", "samples"}))
    base, model = (accuracy_of(folder, questions, decoding, asked.samples) for folder in (base_folder, run / "hf"))
    write_text(run / "evaluation.json", json.dumps({"base": base, "model": model}, indent=1))
    print(table(model, base), flush=True)
    write_report(run)


def _tell(error: UserError) -> int:
    return print_error(error)


def _run(command: list[str]) -> int:
    """Runs the program and passes stop signals on. Returns its exit code; 75 where such a signal ended it.

    As torchrun does, in a session of its own: there Ctrl-C reaches it once, from here, and not a second time from the
    terminal, which would end it before it has saved.
    """
    print("+ " + shlex.join(["python", *command[1:]]), flush=True)
    child: subprocess.Popen | None = None
    asked: dict[int, float] = {}  # signal -> when it was passed on

    def pass_on(number: int, frame: FrameType | None) -> None:
        number = signal.SIGTERM if number == signal.SIGHUP else number  # a lost terminal must not lose the run
        if time.monotonic() - asked.get(number, -ONE_REQUEST_SECONDS) >= ONE_REQUEST_SECONDS:
            asked[number] = time.monotonic()
            if child:
                child.send_signal(number)

    listened = [number for number in (*STOP_SIGNALS, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, pass_on) for number in listened}
    try:
        child = subprocess.Popen(command, start_new_session=True)
        for number in list(asked):  # came while it was being started
            child.send_signal(number)
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code >= 0:
        return code
    print(f"the training process was ended by {signal.Signals(-code).name}", file=sys.stderr, flush=True)
    if -code not in STOP_SIGNALS:
        return 1
    print("run the same command to go on from the newest checkpoint", file=sys.stderr, flush=True)
    return EXIT_STOPPED


if __name__ == "__main__":
    sys.exit(main())

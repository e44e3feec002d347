"""Starts the training program, as one child process or under torchrun, and passes stop signals on."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from spot_megatron.errors import EXIT_FAILURE, EXIT_STOPPED, EXIT_USER_ERROR
from spot_megatron.recipe import Recipe
from spot_megatron.train.__main__ import END_WITH_PARENT

RESTARTS = 3  # of a node's processes, each time from the newest checkpoint
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # the training saves on these, see train/stop.py
ONE_REQUEST_SECONDS = 1.0  # `timeout` and others signal a program and then its group: still one request


def run_alone(arguments: list[str]) -> int:
    """Runs `python ARGUMENTS` and passes stop signals on. Returns its exit code, or 75 if such a signal ended it.

    The child gets a session of its own, as under torchrun: Ctrl-C reaches it once, from here, and not a second time
    from the terminal, which would end it before it has saved. It ends with this process, even after SIGKILL.
    """
    print("+ " + shlex.join(["python", *arguments]), flush=True)
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
    environment = {**os.environ, END_WITH_PARENT: str(os.getpid())}
    try:
        child = subprocess.Popen([sys.executable, *arguments], start_new_session=True, env=environment)
        for number in list(asked):  # received before the child had started
            child.send_signal(number)
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code >= 0:
        return code
    print(f"the training process was ended by {signal.Signals(-code).name}", file=sys.stderr, flush=True)
    if -code not in STOP_SIGNALS:
        return EXIT_FAILURE
    print("run the same command to continue from the newest checkpoint", file=sys.stderr, flush=True)
    return EXIT_STOPPED


def torchrun_options(recipe: Recipe, num_processes: int, num_nodes: int) -> list[str]:
    """On several nodes MASTER_ADDR and MASTER_PORT name the first of them, as under torchrun, and NODE_RANK this one.

    A node that was lost and started again meets the others anew, and the run continues from its newest checkpoint. Each
    process writes its own log; the first of a node, rank 0 among them, is shown as well.
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


def run_under_torchrun(arguments: list[str]) -> int:
    """Runs `torchrun ARGUMENTS` in this process. Returns the exit code of the first process that failed, else 0.

    torchrun itself turns every failure into exit code 1; its exception names the first failure.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher import api

    class Agent(api.LocalElasticAgent):
        """Starts failed processes again, except after a refused input or a requested stop."""

        def _monitor_workers(self, worker_group: Any) -> Any:
            result = super()._monitor_workers(worker_group)
            if any(failure.exitcode in (EXIT_USER_ERROR, EXIT_STOPPED) for failure in result.failures.values()):
                self._remaining_restarts = 0
                self._exit_barrier_timeout = 30  # the first node holds the store, and must not leave before the others
                self._exit_barrier()
            return result

    print("+ torchrun " + shlex.join(arguments), flush=True)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")  # seconds to save in after SIGTERM; else 30
    # With a store shared by the agents, a node that comes back waits for rank 0 forever (pytorch issue 135712).
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
        return EXIT_FAILURE
    except SignalException:
        print("stopped by a signal; run the same command to continue", file=sys.stderr, flush=True)
        return EXIT_STOPPED
    return 0

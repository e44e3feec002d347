"""`torchrun --nproc-per-node N -m spot_megatron.train RECIPE [--set key=value ...]`; one process needs no torchrun."""

from __future__ import annotations

import argparse
import ctypes
import errno
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from spot_megatron.errors import EXIT_STOPPED, CheckpointError, UserError, print_error
from spot_megatron.quiet import hide_known_warnings

UNDER_TORCHRUN = "TORCHELASTIC_RUN_ID"
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
END_WITH_PARENT = "SPOT_MEGATRON_END_WITH_PARENT"  # process id of the launcher, set by tools/training_process.py


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m spot_megatron.train", description=__doc__)
    parser.add_argument("recipe", help="name of a recipe in recipes/, or a YAML file")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="key=value", dest="overrides")
    options = parser.parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, _stop_at_once)
    try:
        return _train(options.recipe, options.overrides)
    except UserError as error:
        _print(error)
        return error.exit_code


def _train(name: str, overrides: list[str]) -> int:
    from spot_megatron.recipe import load_recipe

    recipe = load_recipe(name, overrides)  # before the slow imports, so that a typing error is reported at once
    hide_known_warnings()

    from spot_megatron.parallel.groups import parallel_groups, pick_device
    from spot_megatron.train.heartbeat import record_collectives
    from spot_megatron.train.loop import run

    end_with_parent()
    record_collectives(Path(recipe.output))
    with parallel_groups(recipe.parallel, pick_device(recipe.device), recipe.seed) as topology:
        try:
            return run(recipe, topology)
        except OSError as error:
            if error.errno not in DISK_IS_FULL:
                raise
            raise CheckpointError(
                f"{recipe.output}: {error.strerror} ({error.filename or 'while writing a file'}); make room and run "
                "the same command again: it continues from the newest checkpoint"
            ) from error


def _stop_at_once(number: int, frame: FrameType | None) -> None:
    """Outside the updates (train/stop.py) there is nothing to save, and a second signal within them must not wait."""
    ended_by_torchrun = UNDER_TORCHRUN in os.environ and number == signal.SIGTERM  # it prints the reason itself
    if not ended_by_torchrun and os.environ.get("RANK", "0") == "0":
        os.write(2, b"stopped at once by a signal; run the same command to continue from the newest checkpoint\n")
    os._exit(EXIT_STOPPED)


def end_with_parent() -> None:
    """Under torchrun's agent or `make train`: ends this process when the parent is killed, so that none is orphaned."""
    if sys.platform != "linux" or not (UNDER_TORCHRUN in os.environ or END_WITH_PARENT in os.environ):
        return
    pr_set_pdeathsig = 1  # linux/prctl.h
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if END_WITH_PARENT in os.environ and os.getppid() != int(os.environ[END_WITH_PARENT]):
        os._exit(EXIT_STOPPED)  # it was killed before the line above


def _print(error: UserError) -> None:
    """Every rank meets the same mistake: rank 0 prints it, the others only if rank 0 has not ended them by then."""
    rank = int(os.environ.get("RANK", 0))
    if rank:
        time.sleep(2)
    print_error(error, "" if rank == 0 else f"[rank {rank}] ")


if __name__ == "__main__":
    sys.exit(main())

"""Runs a list of training jobs one after the other in each process of a torchrun group: `worker.py jobs.json`.

jobs.json lists recipe files. Starting Python and Megatron takes longer than these jobs, so they share processes.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")

from spot_megatron.parallel.groups import parallel_groups  # noqa: E402
from spot_megatron.recipe import load_recipe  # noqa: E402
from spot_megatron.train.loop import run  # noqa: E402
from spot_megatron.weights import checkpoint  # noqa: E402
from tests.processes import free_port  # noqa: E402


def main() -> int:
    jobs = Path(sys.argv[1])
    for number, recipe_file in enumerate(json.loads(jobs.read_text())):
        recipe = load_recipe(recipe_file)
        if "RANK" in os.environ:
            meet_anew(jobs.with_suffix(f".port{number}"))
        with parallel_groups(recipe.parallel, "cpu", recipe.seed) as topology:
            if recipe.checkpoint.every_steps == 1:  # every replica writes its share of the weights, as of large models
                checkpoint.SHARED_FROM_BYTES = 0
            code = run(recipe, topology)
        if code:
            return code
    return 0


def meet_anew(file: Path) -> None:
    """Every job has a rendezvous of its own: torchrun's still holds the keys of the job before."""
    if os.environ["RANK"] == "0":
        file.with_suffix(".new").write_text(str(free_port()))
        file.with_suffix(".new").rename(file)
    while not file.exists():
        time.sleep(0.01)
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="False", MASTER_ADDR="127.0.0.1", MASTER_PORT=file.read_text())


if __name__ == "__main__":
    sys.exit(main())
